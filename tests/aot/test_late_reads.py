"""A backward reads tensors and Python's variables as they are when autograd calls it: compiled, it
reads the same, or is refused."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_function, grad, jit, jvp, min_cut_rematerialization_partition, vjp, vmap
from aotfunc.errors import AotfuncError, CaptureError, CheckpointWarning
from tests.functions import Square
from tests.reference import assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ull backward hook is (firing|called)"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]

WAYS = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager"),
    "jit in jit": lambda f: jit(lambda *args: jit(f)(*args)),
}


class Scaled(torch.autograd.Function):
    """Keeps its factor where autograd does not look."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def hooked(hook, after=lambda: None):
    """A function whose value has the hook; ``after`` follows."""

    def f(x):
        v = x.sin()
        v.register_hook(hook)
        after()
        return v * 1

    return f


def of_itself(x):
    v = x.sin()
    v.register_hook(lambda g: g * v.mean().detach())
    v += x * 0.5
    return v


def by_a_view(x):
    rows = torch.ones(2, 3)
    row, v = rows[0], x.sin()
    v.register_hook(lambda g: g * row)
    rows.mul_(4)
    return v * 1


def by_an_argument(x):
    def f(x, b):
        v = x.sin()
        v.register_hook(lambda g: g * b[0])
        b.add_(1)
        return v * 1

    return f(x, x.detach().expand(2, 3).clone())


def made_later(x):
    v = x.sin()
    v.register_hook(lambda g: g * factor)
    factor = x.detach() * 7
    return v * 1


def bound_anew(x):
    factor, v = torch.ones(3), x.sin()
    v.register_hook(lambda g: g * factor)
    factor = factor + 5
    return v * 1


def appended(x):
    factors, v = [torch.ones(3)], x.sin()
    v.register_hook(lambda g: g * sum(factors))
    factors.append(x.detach())
    return v * 1


def kept_in_ctx(x):
    factor = torch.ones(3)
    y = Scaled.apply(x, factor)
    factor.add_(1)
    return y * 1


def the_argument_kept(x):
    h = x * 1
    y = Scaled.apply(h, h.detach())
    h.add_(1)
    return y * 1


def a_gradient_before(x):
    factor, v = torch.ones(3), x.sin()
    v.register_hook(lambda g: g * factor)
    (g,) = torch.autograd.grad(v.sum(), x, retain_graph=True)
    factor.add_(1)
    return v * 1 + g


#: backwards that read what is made or written to later, and would read it as it was
TOO_LATE = {
    f.__name__: f
    for f in (
        *(of_itself, by_a_view, by_an_argument, made_later, bound_anew, appended, kept_in_ctx),
        *(the_argument_kept, a_gradient_before),
    )
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TOO_LATE)
def test_what_is_made_or_written_to_later(name, way):
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with pytest.raises(CaptureError, match=r"afterwards.*test_late_reads.*clone\(\)"):
        WAYS[way](TOO_LATE[name])(x)
    y = WAYS[way](TOO_LATE[name])(x.detach()) if name.startswith("the_arg") else None
    assert y is None or torch.equal(y, x)  # no backward, no matter


def module(hook):
    def f(C, buffer):
        m = nn.Linear(3, 3, bias=False)
        hook(m, buffer)
        return C(lambda x: (m(x), buffer.add_(1))[0] * 1)

    return f


def nested(f):
    """``f`` within another compiled function, which writes to what it reads."""

    def g(C, buffer):
        inner = C(lambda x, b: hooked(lambda g: g * f(b))(x))
        return C(lambda x: (inner(x, buffer), buffer.add_(1))[0] * 1)

    return g


def passed_on(C, buffer):
    def inner(x):
        b, v = x.detach() * 2, x.sin()
        v.register_hook(lambda g: g * b)
        return v * 1, b

    inner = C(inner)

    def f(x):
        y, b = inner(x)
        b.add_(1)
        return y * 1

    return C(f)


#: of a buffer outside, which the function writes to: by what autograd calls, and by what is
#: recorded
CALLED = {
    "hook": lambda C, b: C(hooked(lambda g: g * b, lambda: b.add_(1))),
    "module, full": module(
        lambda m, b: m.register_full_backward_hook(lambda m, gi, go: (gi[0] * b,))
    ),
    "module, pre": module(
        lambda m, b: m.register_full_backward_pre_hook(lambda m, go: (go[0] * b,))
    ),
}
BUFFERS = {
    "nested": nested(lambda b: b),
    "nested, a view": nested(lambda b: b[:1]),
    "nested, a result": passed_on,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_that_is_written_to_later(name, way):
    x, b = torch.ones(3, requires_grad=True), torch.ones(3)
    f = BUFFERS[name](WAYS[way], b)
    with pytest.raises(CaptureError, match="written to afterwards"):
        f(x * 1)
    assert_same(b, torch.ones(3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLED)
def test_a_buffer_that_is_written_to_before_autograd_calls_a_hook(name, way):
    def run(C):
        torch.manual_seed(0)
        x, b = torch.ones(3, requires_grad=True), torch.ones(3)
        f = CALLED[name](C, b)
        for _ in range(2):
            f(x * 1).sum().backward()
        return x.grad, b

    assert_same(run(WAYS[way]), run(lambda f: f))


@pytest.mark.parametrize("way", WAYS)
def test_what_hooks_outside_read(way):
    """Autograd calls these itself."""

    def run(C):
        m, b = nn.Linear(3, 3, bias=False), torch.ones(3)
        nn.init.eye_(m.weight)
        m.weight.register_hook(lambda g: g * b)
        m.weight.register_post_accumulate_grad_hook(lambda p: (p.grad.mul_(b), None)[1])
        C(lambda x: (m(x), b.add_(1))[0] * 1)(torch.ones(2, 3)).sum().backward()
        return m.weight.grad

    assert_same(run(WAYS[way]), torch.full((3, 3), 8.0))


@pytest.mark.parametrize("way", WAYS)
def test_a_write_outside_before_the_backward(way):
    b, x = torch.ones(3), torch.ones(3, requires_grad=True)
    y = WAYS[way](hooked(lambda g: g * b))(x)
    b.add_(1)
    y.sum().backward()
    assert_same(x.grad, 2 * torch.ones(3).cos())


# ----- results that are written to before the backward -------------------------------------------


def double(x):
    return x.detach() * 2


class Kept(torch.autograd.Function):
    """Keeps its result where autograd does not look."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.kept = y.detach()
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.kept


def by_a_hook(x, b):
    return hooked(lambda g: g * b)(x)


def by_a_hook_that_computes(x, b):
    return hooked(lambda g: g * b.cos())(x)


def by_a_context(x, b):
    return Scaled.apply(x, b)


def by_a_checkpoint(x, b):
    return checkpoint(lambda t: t.sin() * b, x, use_reentrant=False)


def by_a_reentrant_checkpoint(x, b):
    return checkpoint(lambda t: t.sin() * b, x, use_reentrant=True)


def by_a_module(x, b):
    m = nn.Tanh()
    m.register_full_backward_hook(lambda m, gi, go: (gi[0] * b,))
    return m(x)


def by_a_nested_one(x, b):
    return jit(by_a_checkpoint)(x, b) + jit(by_a_hook)(x, b)


READERS = (by_a_hook, by_a_hook_that_computes, by_a_context, by_a_checkpoint)
READERS += (by_a_reentrant_checkpoint, by_a_module, by_a_nested_one)
RETURNED = {
    "it": lambda b: (b, b),
    "a view": lambda b: (b, b.view(3, 1)),
    "what it is a view of": lambda b: (b[:], b),
    "a part": lambda b: (b, b[1:]),
    "what was computed before": lambda b: (b, b.sin()),
}
MANY_WAYS = {
    **WAYS,
    "min cut": lambda f: aot_function(
        f, lambda gm, _: gm, partition_fn=min_cut_rematerialization_partition
    ),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("way", MANY_WAYS)
def test_a_result_is_written_to_before_the_backward(way, reader, returned, create_graph):
    def f(x):
        b, result = RETURNED[returned](double(x))
        return reader(x, b), result

    def gradient(f, write):
        x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        y, b = f(x)
        with torch.no_grad():
            write(b)
        y.sum().backward(create_graph=create_graph)
        return x.grad.detach()

    compiled = MANY_WAYS[way](f)
    assert_same(gradient(compiled, lambda b: None), gradient(f, lambda b: None))
    write = lambda b: b.add_(1)
    if returned == "what was computed before":
        assert_same(gradient(compiled, write), gradient(f, write))
        return
    with pytest.raises(AotfuncError, match="hook, a Function or a checkpoint, was modified"):
        gradient(compiled, write)


@pytest.mark.parametrize("way", MANY_WAYS)
@pytest.mark.parametrize("f", [Kept.apply, lambda x: hooked_itself(x.sin())])
def test_the_result_itself_is_written_to_before_the_backward(f, way):
    x = torch.ones(3, requires_grad=True)
    for write in (lambda y: y.add_(1)), (lambda y: y.detach().add_(1)):
        y = MANY_WAYS[way](f)(x)
        with torch.no_grad():
            write(y)
        with pytest.raises(AotfuncError, match="was modified by an inplace operation"):
            y.sum().backward()
        assert x.grad is None


def hooked_itself(v):
    v.register_hook(lambda g: g * v.detach())
    return v


@pytest.mark.parametrize("way", WAYS)
def test_a_result_may_be_written_to_after_the_backward(way):
    f = lambda x: (by_a_hook(x, b := double(x)), b)
    x = torch.ones(3, requires_grad=True)
    y, b = WAYS[way](f)(x)
    y.sum().backward(retain_graph=True)
    want, x.grad = x.grad, None
    y.sum().backward()
    b.add_(1)
    assert_same(x.grad, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_checkpoint_reads_is_written_to_inside(way, reentrant):
    def f(x, taken):
        b, h = torch.ones(3), x * 1
        y = checkpoint(lambda t: t.sin() * b * 1.5, h, use_reentrant=reentrant)
        g = torch.autograd.grad(y.sum(), h)[0] if taken else 0
        b.add_(1)
        return y.detach() * g if taken else y * 1

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(CaptureError, match=r"a checkpoint reads .*afterwards.*clone\(\)"):
        WAYS[way](lambda x: f(x, False))(x)
    assert_same(WAYS[way](lambda x: f(x, False))(x.detach()), x.sin() * 1.5)
    assert_same(WAYS[way](lambda x: f(x, True))(x), x.sin() * 1.5 * x.cos() * 1.5)


@pytest.mark.filterwarnings("ignore:a checkpoint writes")
@pytest.mark.parametrize("way", WAYS)
def test_statistics_of_a_module_that_is_checkpointed_twice(way):
    """What the second one writes, the first does not depend on."""

    def run(way):
        m, x = nn.BatchNorm1d(3), torch.arange(6.0).view(2, 3).requires_grad_()
        f = way(
            lambda x: checkpoint(m, checkpoint(m, x, use_reentrant=False), use_reentrant=False)
        )
        y = f(x) * 1 + f(x * x)
        y.sin().sum().backward()
        return x.grad, m.weight.grad, y

    assert_same(run(WAYS[way]), run(lambda f: f))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_statistics_of_a_module_that_is_checkpointed(way, reentrant):
    """They are written once, and that is said: eager writes again in the backward."""
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    counts = []
    for wrap in (WAYS[way], lambda f: f):
        m = nn.BatchNorm1d(3)
        f = wrap(lambda x, m=m: checkpoint(m, x, use_reentrant=reentrant))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            f(x).sum().backward()
        counts.append((int(m.num_batches_tracked), [w.category for w in caught]))
        m.eval()
        f(x)
    assert counts == [(1, [CheckpointWarning]), (2, [])]


def number_changes(x):
    k, v = 2, x.sin()
    v.register_hook(lambda g: g * k)
    k = 5
    return v * 1


def written_before(x):
    factor, v = torch.ones(3), x.sin()
    factor.add_(4)
    v.register_hook(lambda g: g * factor)
    return v * 1


def clone_is_read(x):
    factor, v = torch.full((3,), 5.0), x.sin()
    before = factor.clone()
    v.register_hook(lambda g: g * before)
    factor.add_(1)
    return v * 1


def other_rows_written(x):
    a, b, v = torch.full((3,), 5.0), torch.ones(3), x.sin()
    v.register_hook(lambda g: g * a)
    b.add_(1)
    return v * 1


def gradient_taken_before(x):
    factor, v = torch.full((3,), 5.0), x.sin()
    v.register_hook(lambda g: g * factor)
    (g,) = torch.autograd.grad(v.sum(), x, retain_graph=True)
    return v * 1 + g.detach() * 0


def of_its_own_value(x):
    v = x.sin()
    v.register_hook(lambda g: g * 5 + 0 * v.detach())
    return v * 1


def of_a_hooked_value(x):
    other, v = x * 2, x.sin()
    v.register_hook(lambda g: g * 5 + 0 * other.detach())
    other.register_hook(lambda g: g * 100)
    return v * 1


class Attribute:
    k = 2.0


def attribute_changes(x):
    Attribute.k = 2.0
    v = x.sin()
    v.register_hook(lambda g: g * Attribute.k)
    Attribute.k = 5.0
    return v * 1


#: the gradient is five times the sine's
RIGHT = {
    f.__name__: f
    for f in (
        *(number_changes, written_before, clone_is_read, other_rows_written),
        *(gradient_taken_before, of_its_own_value, of_a_hooked_value, attribute_changes),
    )
}


@pytest.mark.parametrize("way", [*WAYS, "grad", "vmap"])
@pytest.mark.parametrize("name", RIGHT)
def test_what_the_backward_reads(name, way):
    f, x = RIGHT[name], torch.tensor([1.0, 2.0, 3.0])
    if way in WAYS:
        x.requires_grad_()
        for _ in range(2):
            x.grad = None
            WAYS[way](f)(x).sum().backward()
            assert_same(x.grad, 5 * x.detach().cos())
    elif way == "grad":
        assert_same(grad(lambda x: f(x).sum())(x), 5 * x.cos())
    elif name != "gradient_taken_before":
        assert_same(vmap(grad(lambda x: f(x).sum()))(x.repeat(2, 1)), 5 * x.cos().repeat(2, 1))


@pytest.mark.parametrize("way", WAYS)
def test_what_autograd_guards_may_be_written_to_where_there_is_no_backward(way):
    def f(x):
        h = x * 1
        y = Square.apply(h)
        h.add_(1)
        return y.detach(), h

    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    assert_same(WAYS[way](f)(x)[0], f(x)[0])


# ----- errors ------------------------------------------------------------------------------------


class Mine(Exception):
    pass


def fails(*_):
    raise Mine("of the user's")


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return x * 2, y * 3

    @staticmethod
    def backward(ctx, g, h):
        raise Mine("of the user's")


def of_module(register):
    def make():
        m = nn.Linear(3, 3, bias=False)
        nn.init.eye_(m.weight)
        getattr(m, register)(fails)
        return m

    return make


FAILING = {
    "hook": lambda: hooked(fails),
    "complex": lambda: lambda x: torch.view_as_real(hooked(fails)(x + 0j)).sum(-1),
    "Function": lambda: lambda x: sum(Failing.apply(x, x)),
    "one result": lambda: lambda x: Failing.apply(x, x.double())[0] * 1,
    "module": of_module("register_full_backward_hook"),
    "module, before": of_module("register_full_backward_pre_hook"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAILING)
def test_a_backward_that_raises_does_so_when_it_runs(name, way):
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    f = FAILING[name]()
    for create_graph in (False, True):
        y = WAYS[way](f)(x)
        assert_same(y.detach(), f(x).detach())
        with pytest.raises(Mine, match="of the user's"):
            y.sum().backward(create_graph=create_graph)
        assert x.grad is None
    assert_same(WAYS[way](f)(x.detach()), f(x).detach()) if name == "Function" else None


def test_a_backward_that_raises_under_transforms():
    x = torch.ones(2, 3)
    for f in (grad, lambda f: jit(grad(f)), lambda f: jit(grad(lambda x: grad(f)(x).sum()))):
        with pytest.raises(Mine, match="of the user's"):
            f(lambda x: hooked(fails)(x).sum())(x)
    with pytest.raises(Mine, match="of the user's"):
        vmap(grad(lambda x: hooked(fails)(x).sum()))(x)


def test_what_we_refuse_in_a_backward_is_refused_at_the_call():
    f = jit(grad(lambda x: hooked(lambda g: g * g.item())(x).sum()))
    with pytest.raises(AotfuncError):
        f(torch.ones(1, requires_grad=True))


# ----- what is written to after ------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_an_argument_filled_after_a_view_of_it_got_a_history(way, count):
    """It requires grad, with a gradient of zeros."""

    def run(C):
        b, x = torch.ones(3, requires_grad=True), torch.ones(2, 3)
        views = [x[0] for _ in range(count)]

        def f(x, *views):
            views[0].sub_(b)
            x.fill_(0.5)

        C(f)(x, *views)
        x.sum().backward()
        return [t.requires_grad for t in (x, *views)], x.detach(), b.grad

    assert_same(run(WAYS[way]), run(lambda f: f))


@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives_after_an_input_was_written_to(way):
    w, x = torch.ones(3, requires_grad=True), torch.ones(3)

    def f(x):
        v = x + 1
        v.data[0] = 1.0
        return v / (1 + w.square())

    y = WAYS[way](f)(x)
    x.mul_(1.5)
    with pytest.raises(AotfuncError, match=r"modified by an inplace operation.*clone\(\)"):
        torch.autograd.grad(y.sum(), w, create_graph=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_view_that_is_older_than_the_history_of_its_memory(way):
    b, x = torch.ones(3, requires_grad=True), torch.ones(2, 3, requires_grad=True) * 1

    def f(x):
        v = x.view(-1)
        x[0] = b
        v *= 0.5
        return x * 1

    with pytest.raises(CaptureError, match=r"leaf Variable.*make the view after that write"):
        WAYS[way](f)(x)
    assert_same(x.detach(), torch.ones(2, 3))


#: backwards that depend on ``x``, and one that does not
DEPENDING = {
    "a product": lambda x: x * x,
    "a result": lambda x: x.exp(),
    "ops": lambda x: (x.sin().exp() * x).tanh(),
    "a context": Kept.apply,
    "a hook": lambda x: hooked(lambda g: g * x.detach().mean())(x),
    "a checkpoint": lambda x: checkpoint(lambda v: v.sin().exp(), x, use_reentrant=False),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("where", ["an argument", "outside"])
@pytest.mark.parametrize("body", DEPENDING)
@pytest.mark.parametrize("way", MANY_WAYS)
def test_other_memory_before_the_backward(way, body, where, create_graph):
    x = torch.tensor([0.3, 0.7], requires_grad=True)
    f, values = DEPENDING[body], x.detach().clone()
    compiled = MANY_WAYS[way](f if where == "an argument" else lambda y: f(x) * y)
    given = x if where == "an argument" else torch.ones(2)
    gradient = lambda y: torch.autograd.grad(y.sum(), x, create_graph=create_graph)[0].detach()

    y, want, memory = compiled(given), gradient(f(x)), x.data
    x.data = values * 2
    x.data = values * 3  # may lie where the first did
    with pytest.raises(AotfuncError, match=r"`.data = ` gave .*shape \[2\] other memory"):
        gradient(y)
    y, x.data = compiled(given), memory
    with pytest.raises(AotfuncError, match="other memory after the call"):
        gradient(y)
    y = compiled(given)
    x.data = values
    x.data = memory  # an average of weights, for a moment
    assert_same(gradient(y), want)


def test_other_memory_after_a_transform():
    f = lambda x: (x.exp() * x.detach()).sin()  # one node of autograd, for its cut
    x = torch.tensor([0.3, 0.7], requires_grad=True)
    for y in (jvp(f, (x,), (torch.ones(2),))[1], grad(lambda x: f(x).sum())(x)):
        memory, x.data = x.data, torch.ones(2)
        with pytest.raises(AotfuncError, match="other memory after the call of a transform"):
            y.sum().backward()
        x.data = memory
        y.sum().backward()
    _, vjp_fn = vjp(lambda x: x * x, x)
    x.data = torch.ones(2)
    with pytest.raises(AotfuncError, match="other memory after the call of vjp"):
        vjp_fn(torch.ones(2))


@pytest.mark.parametrize("way", MANY_WAYS)
def test_other_memory_that_no_backward_depends_on(way):
    x, b = torch.ones(2, requires_grad=True), torch.ones(2)
    y = MANY_WAYS[way](lambda x, b: x * 2 + b.sin())(x, b)
    x.data, b.data = torch.zeros(2), torch.zeros(2)
    y.sum().backward()
    assert_same(x.grad, torch.full((2,), 2.0))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_result_gets_other_memory(way, reader):
    def f(x):
        b = double(x)
        return reader(x, b), b

    x = torch.ones(3, requires_grad=True)
    y, b = WAYS[way](f)(x)
    b.data = torch.zeros(3)
    with pytest.raises(AotfuncError, match="other memory after the call"):
        y.sum().backward()


# ----- Python's variables ------------------------------------------------------------------------


class Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, state):
        ctx.state = state
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * ctx.state.late, None


class Read(nn.Module):
    """What a backward reads."""

    def __init__(self):
        super().__init__()
        self.late, self.lin = 2.0, nn.Linear(3, 3, bias=False)

    def forward(self, t):
        return self.lin(t) * self.late


def by_hook(s, x):
    v = x.sin()
    v.register_hook(lambda g: g * s.late)
    return v


def by_helper(s, x):
    v = x.sin()
    v.register_hook(lambda g: helper(g, s))
    return v


def helper(g, s):
    return g * s.late


def by_module(s, x):
    m = nn.Identity()
    m.register_full_backward_hook(lambda m, gi, go: (gi[0] * s.late,))
    return m(x.sin())


LATE = {
    "hook": by_hook,
    "helper": by_helper,
    "nested": lambda s, x: jit(lambda x: by_hook(s, x))(x) * 2,
    "module": by_module,
    "Function": lambda s, x: Late.apply(x, s),
    "checkpoint": lambda s, x: checkpoint(s, x, use_reentrant=False),
    "reentrant": lambda s, x: checkpoint(s, x, use_reentrant=True),
}


def gradients(C, name, change):
    """Of a function that reads two things, one of them when autograd calls; ``change`` comes
    between its calls and their backwards."""
    torch.manual_seed(0)
    read, other = Read(), SimpleNamespace(early=3.0, drop=nn.Dropout(0.0))
    old = read.lin.weight
    f = C(lambda x: other.drop(LATE[name](read, x).sin()) * other.early)
    x = torch.arange(1.0, 4.0).requires_grad_()
    for _ in range(2):
        y = f(x)
        change(read, other)
        y.sum().backward()
    return [t if t is None else t.clone() for t in (x.grad, old.grad, read.lin.weight.grad)]


def assert_same_or_none(xs, ys):
    for a, b in zip(xs, ys, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same(a, b)


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("way", WAYS)
def test_a_variable_that_changes_before_the_backward(way, name):
    """Eager's backward reads it as it is by then."""
    nothing, change = (lambda read, other: None), lambda read, other: setattr(read, "late", 5.0)
    want = gradients(lambda f: f, name, nothing)
    if name != "nested":  # which is compiled in any way
        assert not torch.equal(want[0], gradients(lambda f: f, name, change)[0])
    assert_same_or_none(gradients(WAYS[way], name, nothing), want)
    if name in ("hook", "helper", "nested"):
        want = gradients(lambda f: f, name, change)
        assert_same_or_none(gradients(WAYS[way], name, change), want)
        return
    with pytest.raises(AotfuncError, match=r"late is another .* hook, a Function or a checkpoint"):
        gradients(WAYS[way], name, change)


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("way", WAYS)
def test_what_the_backward_does_not_read_may_change(way, name):
    def change(read, other):
        other.early = other.early + 1
        other.drop.p = 0.2

    want = gradients(lambda f: f, name, change)
    assert_same_or_none(gradients(WAYS[way], name, change), want)


@pytest.mark.parametrize("name", ["checkpoint", "reentrant"])
@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_of_a_checkpoint_is_bound_anew(way, name):
    def change(read, other):
        read.lin.weight = nn.Parameter(torch.ones(3, 3))

    with pytest.raises(AotfuncError, match=r"lin\.weight is another"):
        gradients(WAYS[way], name, change)


@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_changes_what_its_hooks_read(way):
    """The backward is to find what there is at the end of the call."""

    def run(C):
        s, x = SimpleNamespace(late=1.0), torch.ones(3, requires_grad=True)

        def f(x):
            s.late = s.late + 1
            return by_hook(s, x) * 1

        f = C(f)
        for _ in range(3):
            f(x).sum().backward()
        return x.grad

    assert_same(run(WAYS[way]), run(lambda f: f))


def test_second_derivatives_read_late_too():
    def run(C, reads, s):
        x = torch.ones(3, requires_grad=True)
        f = C(lambda x: reads(s, x) ** 2)
        (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        s.late = 3.0
        g.sum().backward()
        return x.grad

    late = lambda: SimpleNamespace(late=2.0)
    assert_same(run(jit, by_hook, late()), run(lambda f: f, by_hook, late()))
    with pytest.raises(AotfuncError, match="late is another"):
        run(jit, lambda s, x: Late.apply(x, s), late())

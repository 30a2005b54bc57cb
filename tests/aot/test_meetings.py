"""Backwards of the user's that are not linear get the sum of all cotangents under a second
derivative, as in eager, though these come from a compiled call and from its gradient."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_function, cond, jit, make_fx, scan, vmap
from aotfunc.errors import AotfuncError
from tests.reference import assert_same

WAYS = {
    "aot": lambda f: aot_function(f, "eager"),
    "cpp": lambda f: aot_function(f, "cpp"),
    "jit in jit": lambda f: (lambda j: jit(lambda *xs: j(*xs)))(jit(f)),
}


def function(backward, forward=lambda ctx, x: x.view_as(x)):
    name, methods = "Bent", {"forward": forward, "backward": backward}
    each = {k: staticmethod(v) for k, v in methods.items()}
    return type(name, (torch.autograd.Function,), each).apply


def saving(ctx, x):
    ctx.save_for_backward(x)
    return x * 2


clipped = function(lambda ctx, g: g.clamp(-0.5, 0.5))
soft = function(lambda ctx, g: g.tanh(), saving)
scaled = function(lambda ctx, g: (g / (1 + g.abs().sum())) * ctx.saved_tensors[0], saving)
shifted = function(lambda ctx, g: g + 1)
own = function(
    lambda ctx, g: g.tanh() * ctx.saved_tensors[0],
    lambda ctx, x: (y := x.exp(), ctx.save_for_backward(y))[0],
)
linear = function(lambda ctx, g: torch.where(ctx.saved_tensors[0] > 0.5, -g * 3, 0.0), saving)
two = function(lambda ctx, g, h: g * h if h is not None else g, lambda ctx, x: (x.sin(), x.cos()))


def hooked(x):
    h = x.sin()
    h.register_hook(lambda g: g.clamp(-h.detach().abs(), h.detach().abs()))
    return h.exp()


def hooked_and_saved(x):
    h = x.exp()
    h.register_hook(lambda g: g * g * h.detach())
    return h.sin()


def beside_a_hook(x):
    h = x.exp()
    h.register_hook(lambda g: g * g * h.detach())
    k = h * x
    k.register_hook(lambda g: g * g)
    return k.sin()


def weighted(h):
    d = h.detach()
    h.register_hook(lambda g: g * d)
    return h


def an_equal_op_before(x):
    k, h = x.exp(), x.exp()
    return weighted(h).sin() * k


def an_equal_write(x):
    return weighted((x * 1).exp_()).sin() * (x * 1).exp()


def module_hook(x):
    m = nn.Tanh()
    m.register_full_backward_hook(lambda m, gi, go: ((gi[0] * x.detach()).clamp(-0.3, 0.3),))
    return m(x * 2).exp()


def linear_module_hook(module):
    def f(x):
        m = module()
        m.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))
        return m(x * 1.0)

    return f


def a_result_too(x):
    h = soft(x.sin())
    return h, h.exp() * x


PROGRAMS = {
    "clipped": lambda x: clipped(x.sin()).exp(),
    "soft": lambda x: soft(x.sin()).exp() * x,
    "reads what it saved": lambda x: scaled(x.sin()).exp(),
    "affine": lambda x: shifted(x.sin()).exp(),
    "linear": lambda x: linear(x.sin()).exp(),
    "the result": lambda x: soft(x.sin()),
    "the result, saved": lambda x: own(x.sin()),
    "of the argument": lambda x: clipped(x).exp(),
    "one after another": lambda x: soft(clipped(x.sin()).exp()).cos(),
    "two results of it": lambda x: (lambda a, b: (a * b).exp())(*two(x)),
    "two results": lambda x: (lambda h: (h.exp(), h.cos() * x))(soft(x.sin())),
    "a result too": a_result_too,
    "in a checkpoint": lambda x: checkpoint(
        lambda x: soft(x.sin()).exp(), x * 2, use_reentrant=False
    ),
    "a gradient inside": lambda x: torch.autograd.grad(
        soft(x.sin()).exp().sum(), x, create_graph=True
    )[0].sin(),
    "a hook": hooked,
    "a hook of a saved result": hooked_and_saved,
    "a hook beside one that autograd calls": beside_a_hook,
    "a hook of an op with an equal": lambda x: weighted(x.exp()).sin() * x.exp(),
    "a hook of an op with an equal before": an_equal_op_before,
    "a hook of a write with an equal": an_equal_write,
    "hooks of both": lambda x: weighted(x.tanh()).sin() * weighted(x.tanh()).cos(),
    "a hook, and results": lambda x: (weighted(x.tanh()).sin(), x.tanh()),
    "hooks of hooked values": lambda x: (lambda h: (own(weighted(h.exp())).tanh(), h.exp()))(
        weighted(x.tanh())
    ),
    "a hook of one of several": lambda x: (
        lambda a, b: weighted(a[0]).sin() * b[0] + a[1] * b[1] * x
    )(torch.std_mean(x), torch.std_mean(x)),
    "a hook of a module": module_hook,
    "a linear hook of a module": linear_module_hook(nn.Tanh),
    "a linear hook of another": linear_module_hook(nn.Softplus),
}


def leaf():
    return torch.linspace(0.3, 1.1, 3, dtype=torch.float64).requires_grad_()


def derivatives(f, third=False):
    x = leaf()
    outs = f(x * 1)
    outs = outs if isinstance(outs, tuple) else (outs,)
    (g,) = torch.autograd.grad(sum(y.sin().sum() for y in outs), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=third)
    first = torch.autograd.grad(f(x * 2)[0].sum(), x)
    return outs, g, h, first, third and torch.autograd.grad(h.sum(), x)


@pytest.mark.filterwarnings("ignore:.*ull backward hook is firing")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_backward_that_is_not_linear(name):
    assert_same(derivatives(jit(PROGRAMS[name])), derivatives(PROGRAMS[name]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["soft", "a result too"])
def test_compiled_otherwise_and_the_third_derivative(name, way):
    assert_same(derivatives(WAYS[way](PROGRAMS[name]), True), derivatives(PROGRAMS[name], True))


def between_hooks(x, y):
    h = (x * y).sin()
    h.register_hook(lambda g: g * 2)
    h = clipped(h)
    k = h * x
    k.register_hook(lambda g: g * 3)
    return k * h, h.exp()


class Leaky(nn.Module):
    def forward(self, x):
        self.x = x
        return x.tanh()


def module_of_two(x, y, leak=False):
    m = Leaky()
    m.register_full_backward_hook(lambda m, gi, go: ((gi[0] * x.detach()).clamp(-0.3, 0.3),))
    h = m(x * 2)
    return h.exp(), (m.x if leak else h) * y


def written(x, y):
    h = soft(x.sin())
    y.mul_(h)
    return h.exp(), y * h


#: their results are nodes of their own, as ``y`` has a graph, and have a Function in common
OF_TWO = {
    "a Function": lambda x, y: (lambda h: (h.exp(), h.cos() * y))(soft(x.sin())),
    "the result too": lambda x, y: (lambda h: (h, h.cos() * y))(own(x.sin())),
    "one after another": lambda x, y: (
        lambda h: (lambda k: (k * h, k.cos() * y))(clipped(h.exp()))
    )(soft(x.sin())),
    "two results of it": lambda x, y: (lambda a, b: (a * 1, b * y))(*two(x.sin())),
    "between hooks": between_hooks,
    "a module": module_of_two,
    "a written argument": written,
}


def derivatives_of_two(f):
    x, y = (torch.full((3,), k, dtype=torch.float64, requires_grad=True) for k in (0.5, 0.7))
    a, b = f(x * 1, y * 1)
    first = torch.autograd.grad((a * b).sum(), (x, y), retain_graph=True)
    one = torch.autograd.grad(a.sum(), x)
    a, b = f(x * 1, y * 1)
    (g,) = torch.autograd.grad((a * b).sin().sum(), x, create_graph=True)
    return (a, b), first, one, torch.autograd.grad(g.square().sum(), (x, y))


@pytest.mark.filterwarnings("ignore:.*ull backward hook is firing")
@pytest.mark.parametrize("name", OF_TWO)
def test_of_two_nodes(name):
    assert_same(derivatives_of_two(jit(OF_TWO[name])), derivatives_of_two(OF_TWO[name]))


@pytest.mark.parametrize("way", WAYS)
def test_of_two_nodes_compiled_otherwise(way):
    f = OF_TWO["a Function"]
    assert_same(derivatives_of_two(WAYS[way](f)), derivatives_of_two(f))


@pytest.mark.filterwarnings("ignore:.*ull backward hook is firing")
def test_of_two_nodes_that_cannot_be_cut():
    f = jit(lambda x, y: module_of_two(x, y, leak=True))
    x, y = (torch.full((3,), k, requires_grad=True) for k in (0.5, 0.7))
    a, b = f(x * 1, y * 1)
    torch.autograd.grad(a.sum(), x, retain_graph=True)
    with pytest.raises(AotfuncError, match=r"whose backward is not linear.*return one result"):
        torch.autograd.grad((a * b).sum(), x)


def hooked_result(op):
    def f(x):
        h = op(x)
        h.register_hook(lambda g: g * 0.5)
        return h.sin()

    return f


@pytest.mark.parametrize(
    "f",
    [
        hooked_result(torch.exp),
        hooked_result(torch.tanh),
        hooked_result(lambda x: x * x),
        hooked_result(own),
        PROGRAMS["a hook of an op with an equal"],
        PROGRAMS["a hook of an op with an equal before"],
        lambda x: own(x).sin(),
        lambda x: (lambda a, b: a.sin() * b.exp() * a)(*two(x)),
    ],
)
def test_of_two_gradients_inside(f):
    def second(x):
        (g,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    x = torch.linspace(0.3, 1.1, 3, dtype=torch.float64).requires_grad_()
    for compiled in (jit(second), make_fx(second)(x)):
        assert_same(compiled(x), second(x))


# ----- inside of bodies --------------------------------------------------------------------------

TAKEN = torch.tensor(True)
ROWS = torch.tensor([0.5, 0.6], dtype=torch.float64)


def looped(body):
    return lambda x: scan(lambda c, row: (body(c) * row, None), x, ROWS)[0]


def unrolled(body):
    return lambda x: body(body(x) * ROWS[0]) * ROWS[1]


FORMS = {
    "cond": (lambda body: lambda x: cond(TAKEN, body, lambda x: x * 1, x), lambda body: body),
    "scan": (looped, unrolled),
}
#: bodies, and whether only the loop is refused: the branch returns the Function's results
BODIES = {
    "read inside": (lambda x: soft(x.sin()).exp(), False),
    "saved": (lambda x: own(x.sin()), False),
    "hooked": (hooked, False),
    "only returned": (lambda x: soft(x.sin()), True),
    "linear": (lambda x: linear(x.sin()).exp(), None),
}


def mixed(f, second=True):
    """Return derivatives in which one backward goes through the call and through its gradient."""
    x = leaf()
    y = f(x * 1)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    alone = torch.autograd.grad(g.square().sum(), x, retain_graph=True)
    return g, alone, second and torch.autograd.grad(g.square().sum() + y.exp().sum(), x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BODIES)
def test_of_a_body(name, form):
    """Autograd has no node of its own for what is in a body: both parts of a sum of cotangents
    would arrive alone."""
    inside, outside = FORMS[form]
    body, only_loops = BODIES[name]
    f, want = inside(body), outside(body)
    for g in (f, jit(f), aot_function(f, "eager"), lambda x: vmap(f)(x[None])[0]):
        assert_same(mixed(g, False), mixed(want, False))
        as_eager = form == "cond" and (only_loops or g is f)  # which calls the branch
        if only_loops is None or as_eager:
            assert_same(mixed(g), mixed(want))
        else:
            with pytest.raises(AotfuncError, match=r"one backward goes through .* its gradient"):
                mixed(g)

    def penalty(f):
        def call(x):
            y = f(x)
            (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            return g.square().sum() + y.exp().sum()

        return call

    x = leaf()
    got, expected = (torch.autograd.grad(g(x), x) for g in (jit(penalty(f)), penalty(want)))
    assert_same(got, expected)  # as the error says


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BODIES)
def test_of_a_body_that_two_nodes_have_in_common(name, form):
    def of_two(f):
        return lambda x, y: (lambda h: (h.exp(), h.cos() * y))(f(x))

    def derivatives(f):
        x, y = leaf(), leaf()
        a, b = f(x * 1, y * 1)
        return torch.autograd.grad((a * b).sum(), (x, y)), a, b

    inside, outside = (make(BODIES[name][0]) for make in FORMS[form])
    assert_same(derivatives(jit(of_two(inside))), derivatives(of_two(outside)))


LINEAR = {
    "a part": lambda ctx, g: torch.zeros_like(g).index_copy(0, torch.tensor([1]), g[:1]),
    "written": lambda ctx, g: (z := torch.zeros_like(g), z.__setitem__(0, g[0]))[0],
    "masked": lambda ctx, g: g.masked_fill(ctx.saved_tensors[0] < 0.5, 0),
    "scattered": lambda ctx, g: torch.zeros_like(g).scatter_add(0, torch.tensor([0, 1, 1]), g),
    "solved": lambda ctx, g: torch.linalg.solve(2 * torch.eye(3, dtype=g.dtype), g),
    "convolved": lambda ctx, g: torch.conv1d(g[None], g.new_ones(1, 1, 3), padding=1)[0],
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_backward_is_not_refused(name):
    body = function(LINEAR[name], saving)
    f = lambda x: body(x.sin()).exp()
    assert_same(mixed(lambda x: vmap(f)(x[None])[0]), mixed(f))

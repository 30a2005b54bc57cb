"""Which results require grad, and which parameters get a gradient, as in eager, however a function
is called."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from aotfunc import aot_function, aot_module, functionalize, grad_and_value, jit, jvp, vjp, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same

W = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64, requires_grad=True)  # closed over
C = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)


class Scaled(torch.autograd.Function):
    """Reads a tensor from outside that requires grad: the outputs are those of its arguments all
    the same."""

    @staticmethod
    def forward(ctx, x):
        return x * W

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * 2


class Constant(torch.autograd.Function):
    """Says that it has no derivative; its argument makes its result require grad all the same."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return None


class Weighted(torch.autograd.Function):
    """The derivative, which is not the function's, depends on an argument of which the result has
    none."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y**3, None


class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        a, b = x * 2, x * 3
        ctx.mark_non_differentiable(b)
        return a, b

    @staticmethod
    def backward(ctx, g, _):
        return g * 2


def region(x, c):
    with torch.no_grad():
        y = x * W
    return x * W, y, y * x, y * c


def regions_nested(x, c):
    with torch.no_grad():
        a = x * 2
        with torch.enable_grad():
            b = x * 3
        d = b * a
    return a, b, d, d * c, d * x


def detached(x, c):
    y = x * 2
    return y.detach(), y.detach() * W, (y * c).detach() * c, y


def integers(x, c):
    return (
        x.argmax(),
        x > 0,
        (x > 0) * x,
        (x > c).double(),
        x.argsort() * 2.0,
        torch.max(x, 0),
        torch.topk(x, 2),
    )


def not_reached(x, c):
    return c * 2, x * 3, torch.ones(3, dtype=x.dtype), C + c, W * 2


def custom(x, c):
    return (
        Scaled.apply(x),
        Scaled.apply(c),
        Scaled.apply(x.detach()),
        *Two.apply(x),
        *Two.apply(c),
        Constant.apply(x),
    )


def written(x, c):
    a, b = torch.zeros_like(c), torch.zeros_like(c)
    a[0] = x[0]
    with torch.no_grad():
        b.copy_(x)
    e, f = c * 1, x * 2
    e.view(-1)[:2].mul_(x[:2])
    f.detach().mul_(3)
    return a, b, e, f


def lists(x, c):
    a, b, d, e = x * 1, c * 1, x * 2, c * 2
    torch._foreach_add_([a, b], 1.0)
    torch._foreach_mul_([d, e], [c, a])
    return a, b, d, e, *torch._foreach_mul([a, b], [2.0, 3.0])


def views(x, c):
    y, z = x * 2, c * 2
    return y.view(3, 1), y[0], z[:2], z.detach().view(-1), x.view(3, 1), c.view(3, 1)


def views_unseen(x, c):
    """Views made with gradients off: autograd says of them what it says of the tensor that they
    show."""
    y = x * 2
    with torch.no_grad():
        parts = y.unbind(0)
        flat = (
            x.view(3, 1),
            y.view(3, 1),
            c.view(3, 1),
            (x * 2).view(3, 1),
            y.detach().view(3, 1),
            W[1:],
        )
    return *flat, parts[0], parts[2], flat[1][:2], y


def asks_of_unseen_views(x, c):
    with torch.no_grad():
        seen = [
            x.view(3, 1),
            x.view(3, 1)[0],
            c.view(3, 1),
            W[1:],
            (x * 2)[1:],
            x.detach()[1:],
            x * 2,
        ]
    return tuple(torch.full((), float(t.requires_grad), dtype=c.dtype) for t in seen)


def asks(x, c):
    """Takes the branches that eager takes."""
    y = torch.zeros(3, dtype=x.dtype)
    z = y.view(-1)
    y[0] = x[0]
    flags = [
        t.requires_grad
        for t in (x, c, y, z, (x > 0) * 1.0, Scaled.apply(x), Scaled.apply(c), x.detach(), W * c)
    ]
    return tuple(torch.full((), float(yes), dtype=x.dtype) for yes in flags)


def inner_gradient(x, c):
    (g,) = torch.autograd.grad((x.sin() * W).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad((x.sin() * W).sum(), x)
    return g, h, g * c, h * c


def zero_derivatives(x, c):
    """Steps, and draws by their parameters: the gradient is zero, not None."""
    drawn = (
        torch.bernoulli(x * 0 + 1),
        torch.normal(x, 0.0),
        torch.normal(c, x * 0),
        torch.poisson(x * 0),
        x.floor(),
    )
    return *drawn, torch.sign(x), x.round() * c, (c * 1).zero_(), (x * 2).floor_(), x.sgn()


def asks_of_likes(x, c):
    likes = (
        torch.zeros_like(x),
        torch.rand_like(x),
        x.new_ones(2),
        torch.histc(x),
        x.sign(),
        torch.bernoulli(x * 0),
    )
    return tuple(torch.full((), float(t.requires_grad), dtype=c.dtype) for t in likes)


def made_inside(x, c):
    """Leaves that the function makes itself, and what it computes from them."""
    leaf, late = torch.ones(3, dtype=x.dtype, requires_grad=True), (c * 2).requires_grad_()
    with torch.no_grad():
        cut = leaf * 2
    h = nn.Parameter(c * 2) * c
    return (
        leaf * c,
        h,
        h[0],
        late.sin(),
        cut,
        leaf.detach(),
        leaf * x,
        torch.tensor([2.0], requires_grad=True) * c,
    )


def returned_leaf(x, c):
    return (
        nn.Parameter(torch.ones(3)),
        torch.zeros(2, requires_grad=True),
        c.detach().requires_grad_(),
        x * 2,
    )


FUNCTIONS = [
    zero_derivatives,
    asks_of_likes,
    made_inside,
    returned_leaf,
    region,
    regions_nested,
    detached,
    integers,
    not_reached,
    custom,
    written,
    lists,
    views,
    views_unseen,
    asks_of_unseen_views,
    asks,
    inner_gradient,
]
WAYS = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager"),
    "jit in jit": lambda f: (lambda j: jit(lambda x, c: j(x, c)))(jit(f)),
    "aot_function in jit": lambda f: (lambda j: jit(lambda x, c: j(x, c)))(
        aot_function(f, "eager")
    ),
    "functionalize": functionalize,
    "functionalize of jit": lambda f: functionalize(jit(f)),
}
functions = pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
ways = pytest.mark.parametrize("way", WAYS)


def leaves(x, c):
    return torch.utils._pytree.tree_leaves((x, c))


def outcome(f, active, frozen):
    """What is asked of each result: requires_grad, is_leaf, and its own gradients of everything
    there is."""
    found = []
    x, c = C.clone() + 0.5, C.clone()
    x.requires_grad_(active)
    W.requires_grad_(not frozen)
    try:
        for i, _ in enumerate(torch.utils._pytree.tree_leaves(f(x, c))):
            out = torch.utils._pytree.tree_leaves(f(x, c))[i]
            given = [t for t in (x, W) if t.requires_grad]
            grads = (
                torch.autograd.grad(out.sum(), given, allow_unused=True)
                if out.requires_grad
                else None
            )
            found.append((out.requires_grad, out.is_leaf, out.detach(), grads))
        return found
    finally:
        W.requires_grad_(True)


@functions
@ways
@pytest.mark.parametrize("active, frozen", [(True, False), (True, True), (False, False)])
def test_as_in_eager(f, way, active, frozen):
    if f is inner_gradient and not active:
        pytest.skip("eager cannot differentiate")
    if f in (made_inside, returned_leaf) and way.startswith("functionalize"):
        pytest.skip("leaves that a function makes are known to compiled functions")
    want = outcome(f, active, frozen)
    assert_same(outcome(WAYS[way](f), active, frozen), want)


@functions
@ways
def test_gradients_off(f, way):
    if f is inner_gradient:
        pytest.skip("eager cannot differentiate")
    if f is returned_leaf and way.startswith("functionalize"):
        pytest.skip("leaves that a function makes are known to compiled functions")
    x = C.clone().requires_grad_()
    with torch.no_grad():
        want, got = f(x, C.clone()), WAYS[way](f)(x, C.clone())
    want, got = (torch.utils._pytree.tree_leaves(t) for t in (want, got))
    assert_same([t.detach() for t in got], [t.detach() for t in want])
    if f is regions_nested and way.startswith(
        "functionalize"
    ):  # runs its graph as a whole, with gradients off
        return
    assert [t.requires_grad for t in got] == [t.requires_grad for t in want]


@pytest.mark.parametrize("way", ["jit", "aot_function", "jit in jit", "aot_function in jit"])
def test_an_argument_says_whether_it_is_a_leaf(way):
    def f(x, y):
        return x * (2 if y.is_leaf else 3), x * (2 if y.grad_fn is None else 3)

    g, x = WAYS[way](f), torch.ones(3, requires_grad=True)
    for y in (x, x * 1, x.detach(), x * 2, x):
        for first in (x, y):
            assert_same([t.detach() for t in g(first, y)], [t.detach() for t in f(first, y)])


def test_a_result_without_any_gradient():
    """It requires grad; hooks of what it does not depend on do not run."""
    x, seen = C.clone().requires_grad_(), []
    x.register_hook(seen.append)
    y = jit(lambda x: Constant.apply(x))(x)
    assert y.requires_grad and not y.is_leaf
    y.sum().backward()
    assert x.grad is None and not seen


@pytest.mark.parametrize("way", ["jit", "aot_function"])
def test_a_gradient_that_depends_on_what_the_result_does_not(way):
    x, y = C.clone().requires_grad_(), (C + 1).requires_grad_()
    (g,) = torch.autograd.grad(
        WAYS[way](lambda x, y: Weighted.apply(x, y))(x, y).sum(), x, create_graph=True
    )
    assert_same(g.detach(), (C + 1) ** 3)
    assert_same(torch.autograd.grad(g.sum(), y)[0], 3 * (C + 1) ** 2)


def enabled(x, c):
    """Forces, guidance: gradients inside a function that is run without."""
    a = x * 2
    with torch.enable_grad():
        b = x * 3
        energy = (b.sin() * W).sum()
        with torch.no_grad():
            d = b * a
    (force,) = torch.autograd.grad(energy, b, retain_graph=True)
    return a, b, energy, d, force, b * c


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", ["jit", "aot_function", "jit in jit", "aot_function in jit"])
def test_gradients_on_inside(way, around):
    x, f = C.clone().requires_grad_(), WAYS[way](enabled)
    if around is torch.inference_mode:
        with around():
            assert not any(t.requires_grad for t in f(x, C))
        return
    for _ in range(2):
        with around():
            want, got = enabled(x, C), f(x, C)
        assert (
            [t.requires_grad for t in got]
            == [t.requires_grad for t in want]
            == [False, True, True, *[False] * 3]
        )
        assert_same([t.detach() for t in got], [t.detach() for t in want])
        for i in (1, 2):
            assert_same(
                *(torch.autograd.grad(t[i].sum(), x, retain_graph=True) for t in (got, want))
            )


def test_gradients_on_inside_and_a_write():
    def f(x, buffer):
        with torch.enable_grad():
            y = x * 2
        buffer.add_(y)
        return y

    x = C.clone().requires_grad_()
    for g in (jit(f), jit(lambda x, b: jit(f)(x, b))):
        buffer = torch.zeros_like(C)
        with torch.no_grad():
            y = g(x, buffer)
        assert y.requires_grad and not buffer.requires_grad
        assert_same(buffer, 2 * C)


def test_where_eager_has_no_formula_the_gradient_is_zero():
    for f in (
        lambda x: x // 1,
        lambda x: torch.floor_divide(x, x + 1),
        lambda x: torch.heaviside(x, x),
    ):
        x = C.clone().requires_grad_()
        y = jit(f)(x)
        assert y.requires_grad and f(x).requires_grad
        assert_same(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(C))


ANSWERS = {
    "comparison": lambda x, y: x.gt_(0.5),
    "comparison with a tensor": lambda x, y: x.le_(y),
    "comparison of what requires no grad": lambda x, y: x.detach().clone().eq_(y),
    "comparison of a part": lambda x, y: (x[1:].ne_(y[1:]), x)[1],
    "comparison without gradients": lambda x, y: (torch.no_grad()(x.lt_)(y), x)[1],
    "logical op": lambda x, y: x.logical_and_(y),
    "logical op of a part": lambda x, y: (x[:2].logical_not_(), x)[1],
    "logical op with what requires grad": lambda x, y: x.detach().clone().logical_xor_(y),
}


@pytest.mark.parametrize("way", ["jit", "aot_function", "functionalize"])
@pytest.mark.parametrize("name", ANSWERS)
def test_truth_values_in_a_tensor_of_numbers(name, way):
    """Autograd gives comparisons in place the derivative zero, and does not see logical ops."""

    def run(f):
        x, y = C.clone().requires_grad_(), (C - 1).requires_grad_()
        out = f(x, y)
        grads = (
            torch.autograd.grad(out.sum(), [x, y], allow_unused=True)
            if out.requires_grad
            else None
        )
        return out.detach(), out.requires_grad, grads

    def f(x, y):
        return ANSWERS[name](x * 1.5, y)

    assert_same(run(WAYS[way](f)), run(f))


def test_a_module_made_inside():
    def f(x):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        return net(x)

    x = torch.randn(5, 3)
    torch.manual_seed(0)
    want = f(x)
    torch.manual_seed(0)
    got = jit(f)(x)
    assert_same(got.detach(), want.detach())
    assert got.requires_grad and not got.is_leaf and got.grad_fn is not None
    got.sum().backward()


def test_a_written_argument_requires_grad():
    def f(x):
        x.mul_(nn.Parameter(torch.full((3,), 2.0)))

    for g in (f, jit(f)):
        x = torch.ones(3)
        g(x)
        assert x.requires_grad and not x.is_leaf
        assert_same(x.detach(), torch.full((3,), 2.0))


def test_a_parameter_stays_one():
    for trainable in (True, False):
        f = jit(lambda x, t=trainable: nn.Parameter(x * 2, requires_grad=t))
        p = f(torch.ones(3))
        assert type(p) is nn.Parameter and p.is_leaf and p.requires_grad is trainable


def test_a_leaf_beside_what_was_computed_from_it_is_refused():
    with pytest.raises(CaptureError, match="made inside"):
        jit(lambda x: (lambda p: (p, p * x))(nn.Parameter(torch.ones(3))))(torch.ones(3))


def test_a_second_derivative_that_is_zero():
    for f in (torch.abs, lambda x: x * x.sign(), lambda x: x.sgn() * x, lambda x: x * x.floor()):
        gs = []
        for way in (lambda f: f, jit):
            x = torch.tensor([0.5, -1.5], requires_grad=True)
            (g,) = torch.autograd.grad(way(f)(x).sum(), x, create_graph=True)
            assert g.requires_grad
            gs.append((g.detach(), torch.autograd.grad(g.sum(), x)))
        assert_same(gs[1], gs[0])


def no_grad(f):
    return torch.no_grad()(f)


UNJITTED = {
    "vmap": (
        lambda x: vmap(lambda r: (r * W, (r * W).detach(), no_grad(lambda: r * W)(), r + 1))(x),
        [1, 0, 0, 0],
    ),
    "vmap of no_grad": (lambda x: vmap(no_grad(lambda r: r * W))(x), [0]),
    "vmap of integers": (
        lambda x: vmap(lambda r: ((r * W).argmax(), r * W > 0, (r * W).sort()))(x),
        [0, 0, 1, 0],
    ),
    "jvp of no_grad": (lambda x: jvp(no_grad(lambda r: r * W), (x,), (x,)), [0, 0]),
    "jvp": (
        lambda x: jvp(lambda r: (r * W, (r * W).detach(), r * 2), (x,), (x,)),
        [1, 0, 0, 1, 0, 0],
    ),
    "no_grad around jvp": (no_grad(lambda x: jvp(lambda w: (w * x).sin(), (W,), (W,))), [0, 0]),
    "vjp of no_grad": (lambda x: vjp(no_grad(lambda r: r * W), x)[0], [0]),
    "grad_and_value": (
        lambda x: grad_and_value(lambda r: (r.sin() * W.detach()).sum())(x),
        [0, 0],
    ),
    "grad_and_value at parameters": (
        lambda x: grad_and_value(lambda w: (w.sin() * x).sum())(W),
        [1, 1],
    ),
}


@pytest.mark.parametrize("name", UNJITTED)
def test_results_of_transforms(name):
    run, want = UNJITTED[name]
    got = torch.utils._pytree.tree_leaves(run(torch.randn(2, 3, dtype=torch.float64)))
    assert [t.requires_grad for t in got] == [bool(i) for i in want]
    for t in got:
        if not t.requires_grad:
            t.reshape(-1).split(1)[0].zero_()  # nor a view that may not be written to
            t.numpy()


@pytest.mark.parametrize("wrapped", [False, True], ids=["un-jitted", "jit"])
def test_a_parameter_that_a_result_does_not_depend_on_keeps_no_gradient(wrapped):
    torch.manual_seed(0)
    x, t = torch.randn(2, 5, 3, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 4)).double()
    f = jit(net) if wrapped else net
    jvp(f, (x,), (t,))[1].pow(2).sum().backward()
    assert [p.grad is None for p in net.parameters()] == [
        False,
        False,
        False,
        True,
    ]  # the last bias is added


# ----- buffers of nested compiled modules --------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        object.__setattr__(self, "inner", inner)  # perhaps no module any more
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.inner(x)).square().sum()


def trained(wrap_inner, wrap_outer):
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model = Outer(wrap_inner(part.double())).double()
    step = wrap_outer(model)
    optimizer = torch.optim.SGD([*part.parameters(), *model.parameters()], 0.01)
    losses = []
    for x in torch.randn(4, 5, 3, dtype=torch.float64):
        optimizer.zero_grad()
        loss = step(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert not any(b.requires_grad for b in part.buffers())
    return losses, [p.detach() for p in part.parameters()], list(part.buffers())


NESTED = {
    "aot_module in jit": (lambda m: aot_module(m, "eager"), jit),
    "jit in jit": (jit, jit),
    "jit in aot_function": (jit, lambda f: aot_function(f, "eager")),
    "jit in jit in jit": (lambda m: jit(jit(m)), jit),
    "aot_module": (lambda m: aot_module(m, "eager"), lambda f: f),
}


@pytest.mark.parametrize("name", NESTED)
def test_steps_with_batch_norm(name):
    assert_same(trained(*NESTED[name]), trained(lambda m: m, lambda m: m))


@pytest.mark.parametrize("name", NESTED)
def test_a_leaf_clamped_without_gradients(name):
    inner, outer = NESTED[name]
    w = torch.full((2,), 3.0, requires_grad=True)

    class Clamped(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                w.clamp_(-1, 1)
            return (w * x).sum()

    call = inner(Clamped())
    step = outer(lambda x: call(x) * 2)
    for k in (1, 2):
        step(torch.ones(2)).backward()
        assert w.is_leaf and w.tolist() == [1.0, 1.0] and w.grad.tolist() == [2.0 * k] * 2


@pytest.mark.parametrize("transform", [vjp, jvp])
def test_a_buffer_written_under_a_transform_of_a_compiled_function(transform):
    total = torch.zeros(2, dtype=torch.float64)

    def f(x):
        with torch.no_grad():
            total.add_(x)
        return (x * total).sum()

    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    j = jit(f)
    for k in (1, 2):
        transform(j, x) if transform is vjp else jvp(j, (x,), (x,))
        assert not total.requires_grad and total.tolist() == [k, k]

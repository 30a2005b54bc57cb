"""A second derivative passes through the hooks of a result again where autograd saves the result,
whoever registers them: the caller on what a compiled call returned, or the function inside."""

import itertools

import pytest
import torch

from aotfunc import aot_function, backends, cond, export, jit, vmap
from aotfunc.errors import AotfuncError
from tests.reference import assert_same
from tests.sweeps import every

WAYS = {
    "jit": jit,
    "aot": lambda f: aot_function(f, "eager"),
    "jit in jit": lambda f: (lambda j: jit(lambda *xs: j(*xs)))(jit(f)),
    "exported": lambda f: lambda x: export(f, x)(x),
}


def spd(x):
    return x @ x.mT + 2 * torch.eye(3, dtype=x.dtype)


def regular(x):
    return x + 3 * torch.eye(3, dtype=x.dtype)


OPS = {
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid in place": lambda x: (x * 1).sigmoid_(),
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "expm1": torch.expm1,
    "erfinv": lambda x: (x * 0.5).erfinv(),
    "div": lambda x: x / x.exp(),
    "pow": lambda x: x**x,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(0),
    "norm": lambda x: x.norm(),
    "std_mean": lambda x: torch.std_mean(x, 0),
    "prod": lambda x: x.prod(0),
    "cumprod": lambda x: x.cumprod(0),
    "scatter_reduce": lambda x: x.scatter_reduce(
        0, torch.tensor([[0, 1, 1]] * 3), x.cos(), "prod"
    ),
    "qr": lambda x: torch.linalg.qr(regular(x)),
    "eigh": lambda x: torch.linalg.eigh(spd(x)),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(spd(x)),
    "svd": lambda x: torch.linalg.svd(regular(x)),
    "lu": lambda x: torch.linalg.lu(regular(x))[1:],
    "cholesky": lambda x: torch.linalg.cholesky(spd(x)),
    "inv": lambda x: torch.linalg.inv(regular(x)),
    "solve": lambda x: torch.linalg.solve(regular(x), x),
    "det": lambda x: torch.linalg.det(regular(x)),
    "pinv": lambda x: torch.linalg.pinv(regular(x)),
    "two ops": lambda x: (x.exp(), x.tanh()),
    "one op twice": lambda x: (x.exp(), x.exp()),
    "a copy of an equal one": lambda x: (x.exp() * 1, x.exp().sin()),
}


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Batched(Saving):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)


class Bent(Saving):
    @staticmethod
    def backward(ctx, g):
        return g.tanh() * ctx.saved_tensors[0]


def hooked(y, hook):
    ys = y if isinstance(y, tuple) else (y,)
    for t in ys:
        t.register_hook(hook)
    return sum(t.sin().sum() for t in ys)


def bent(g):
    return g * g * 0.3 + g


def outside(op):
    return op, lambda y: hooked(y, bent)


def inside(op):
    return lambda x: hooked(op(x), bent), lambda y: y


def recorded(op):
    def f(x):
        k = x.detach().mean()
        return hooked(op(x), lambda g: bent(g) * k)

    return f, lambda y: y


def derivatives(f, after, order):
    x = torch.tensor([[0.3, 0.5, 0.2], [0.7, 0.25, 0.4], [0.6, 0.9, 0.35]], dtype=torch.float64)
    g = after(f((x := x.requires_grad_()) * 1))
    found = [g]
    for k in range(order):
        g = g if k == 0 else (g * (1 + x.detach())).sum()
        (g,) = torch.autograd.grad(g, x, create_graph=k + 1 < order)
        found.append(g)
    return found


@pytest.mark.parametrize("kind", [outside, inside, recorded])
@pytest.mark.parametrize("name", every(2, OPS))
def test_of_an_op(name, kind):
    f, after = kind(OPS[name])
    for way in ("jit", "aot") if kind is outside else ("jit",):
        got, want = (derivatives(g, after, 3) for g in (WAYS[way](f), f))
        assert_same(got, want, rtol=1e-7, atol=1e-9)


def first_hooked(y):
    a, b = y
    a.register_hook(bent)
    return (a.sin() * b).sum()


def let_go(y):
    """The caller holds no result when the gradient is taken."""
    a, b = y
    a.register_hook(bent)
    return (a * 2).sum() * b.sum()


def of_a_view(y):
    y[1].register_hook(bent)
    return y[0].sin().sum() + y[1].cos().sum()


CALLERS = {
    "a result of another": (lambda x: (y := x.exp(), y.sin()), first_hooked),
    "results of two nodes": (lambda x: (x.exp(), x[0].cos()), first_hooked),
    "let go": (lambda x: (x.exp(), x.tanh()), let_go),
    "let go, of another": (lambda x: (y := x.exp(), y.tanh()), let_go),
    "let go, of one op": (lambda x: torch.linalg.qr(x), let_go),
    "a copy": (lambda x: (y := x.exp(), y.clone())[::-1], first_hooked),
    "a copy that is not a clone": (lambda x: (y := x.exp(), y * 1)[::-1], first_hooked),
    "a Function that saves it": (lambda x: (Saving.apply(x), x.sin()), first_hooked),
    "a Function that is not linear": (lambda x: (Bent.apply(x), x.sin()), first_hooked),
    "the same, and of it": (lambda x: (y := Bent.apply(x), y.sin()), first_hooked),
    "a view": (lambda x: (y := x.exp(), y.view(9)), of_a_view),
    "a checkpoint": (
        lambda x: torch.utils.checkpoint.checkpoint(
            lambda x: (x.exp(), x.sin()), x, use_reentrant=False
        ),
        first_hooked,
    ),
    "complex": (
        lambda x: (torch.complex(x, x).exp(), x),
        lambda y: first_hooked((torch.view_as_real(y[0].exp()).sum(-1), y[1])),
    ),
}


@pytest.mark.parametrize("name, way", [*itertools.product(CALLERS, WAYS)])
def test_of_a_caller(name, way):
    f, after = CALLERS[name]
    got, want = (derivatives(g, after, 3) for g in (WAYS[way](f), f))
    assert_same(got, want, rtol=1e-7, atol=1e-9)


#: transforms of compiled functions, and transforms compiled: their results are those of the batch
BATCHED = {
    "vmap of jit": lambda f: vmap(jit(f)),
    "jit of vmap": lambda f: jit(vmap(f)),
    "jit of vmap of jit": lambda f: jit(lambda x: vmap(jit(f))(x)),
    "vmap": vmap,
    "vmap of an exported one": lambda f: lambda x: vmap(export(f, x[0]))(x),
    "cond": lambda f: lambda x: cond(torch.tensor(True), f, f, x),
}
BY_ROWS = {
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "prod": lambda x: x.prod(-1),
    "std": lambda x: x.std(-1),
    "two ops": lambda x: (x.exp(), x.tanh()),
    "a result of another": lambda x: (y := x.exp(), y.sin()),
    "a copy": lambda x: (y := x.exp(), y.clone()),
    "a copy that is not a clone": lambda x: (y := x.exp(), y * 1)[::-1],
    "a custom op": lambda x: saving_op(x),
    "a Function": Saving.apply,
    "not saved": lambda x: x.sin(),
}


@torch.library.custom_op("hooked_results::exp", mutates_args=())
def saving_op(x: torch.Tensor) -> torch.Tensor:
    return x.exp()


saving_op.register_fake(torch.empty_like)
saving_op.register_vmap(lambda info, dims, x: (saving_op(x), dims[0]))
saving_op.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


@pytest.mark.parametrize("name, way", every(2, [*itertools.product(BY_ROWS, BATCHED)]))
def test_of_a_batch(name, way):
    f, after = BY_ROWS[name], lambda y: hooked(y, bent)
    if name == "a Function" and way.startswith(("vmap", "jit of vmap")):
        f = Batched.apply
    got, want = (derivatives(g, after, 3) for g in (BATCHED[way](f), BY_ROWS[name]))
    assert_same(got, want, rtol=1e-7, atol=1e-9)


def test_of_a_compiled_branch():
    """Autograd sees a branch as one op."""
    branch = lambda f: jit(lambda x: cond(torch.tensor(True), f, f, x))
    for f in (torch.exp, Saving.apply):
        y = branch(f)(x := torch.rand(3, requires_grad=True))
        y.register_hook(bent)
        torch.autograd.grad(y.sum(), x, retain_graph=True)
        with pytest.raises(AotfuncError, match=r"a hook was registered on a result of a branch"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
    first, second = branch(lambda x: (y := x.exp(), y.sin()))(x)
    torch.autograd.grad(second.sum(), x, retain_graph=True)
    first.register_hook(bent)
    with pytest.raises(AotfuncError, match="from which another result is computed there"):
        second.sum().backward()
    for f in (torch.sin, lambda x: (x.sin(), x.cos())):
        got, want = (derivatives(g, lambda y: hooked(y, bent), 3) for g in (branch(f), f))
        assert_same(got, want)


def scaled(h, k):
    """Register a hook that is recorded: it reads what is computed inside."""
    k = k.detach().mean()
    h.register_hook(lambda g: bent(g) * k)
    return h


def twice(x):
    h = scaled(scaled(x.exp(), x), x * 2)
    return h, h.sin()


#: functions that record hooks of their results
RECORDED = {
    "saved": lambda x: (scaled(x.exp(), x), x.cos()),
    "not saved": lambda x: (scaled(x.sin(), x), x.cos()),
    "read inside": lambda x: (h := scaled(x.exp(), x), h.sin()),
    "two hooks": twice,
    "of both": lambda x: (h := scaled(x.exp(), x), scaled(h.tanh(), h)),
    "of the second": lambda x: (x.exp(), scaled(x.tanh(), x)),
    "reads a result": lambda x: (scaled(x.exp(), y := x.cos()), y),
}


def kept(y):
    y[0].retain_grad()
    y[1].retain_grad()
    (y[0].sin() * y[1]).sum().backward(retain_graph=True, create_graph=True)
    return y[0].grad.sum() + y[1].grad.sin().sum()


def taken(y):
    g, h = torch.autograd.grad((y[0].sin() * y[1]).sum(), y, create_graph=True)
    return g.sum() + h.sin().sum()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("after", [lambda y: hooked(y, bent), kept, taken])
@pytest.mark.parametrize("name, way", every(3, [*itertools.product(RECORDED, WAYS)]))
def test_recorded_hooks_act_before_those_of_the_caller(name, way, after):
    f = RECORDED[name]
    got, want = (derivatives(g, after, 2) for g in (WAYS[way](f), f))
    assert_same(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_result_that_is_written_to_before_the_backward(dtype):
    x = torch.linspace(0.2, 0.8, 3, dtype=dtype).requires_grad_()
    for f in (lambda x: (x.exp(), x.sin()), lambda x: x.exp()):
        for call in (f, jit(f)):
            y = call(x)
            y = y[0] if isinstance(y, tuple) else y
            with torch.no_grad():
                y.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().abs().backward()


#: ops whose result is written to before the backward: eager saves some of these results
WRITTEN = {
    "div": lambda x: x / x.exp(),
    "div by a number": lambda x: x / 3,
    "of a number": lambda x: 1 / x,
    "two of a number": lambda x: 2 / x,
    "power": lambda x: x**-1,
    "powers": lambda x: x**x,
    "number to a power": lambda x: 2**x,
    "product": lambda x: x * x.exp(),
    "copy": lambda x: x.exp() * 1,
    "sum with one": lambda x: x.tanh() + 1,
    "atan2": lambda x: torch.atan2(x, x.exp()),
    "logsigmoid": torch.nn.functional.logsigmoid,
    "softplus": torch.nn.functional.softplus,
    "silu": torch.nn.functional.silu,
    "log": torch.log,
    "logaddexp": lambda x: torch.logaddexp(x, x.exp()),
    "lerp": lambda x: x.lerp(x.exp(), x),
    "amax": lambda x: x.amax(0),
    "cummax": lambda x: x.cummax(0)[0],
    "std": lambda x: x.std(0),
    "clamp": lambda x: x.clamp(0.3, 0.6),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (3,)),
    **{
        k: OPS[k] for k in ("exp", "tanh", "reciprocal", "softmax", "norm", "prod", "inv", "solve")
    },
}


def hidden_write(y):
    with torch.no_grad():
        y.mul_(2)


WRITES = {"seen": lambda y: y.mul_(2), "no_grad": hidden_write, "data": lambda y: y.data.mul_(2)}
WRITTEN |= {
    "a view": lambda x: (x / x.exp()).t(),
    "a part": lambda x: (x / x.exp())[0],
    "read by a sum": lambda x: (y := x / x.exp(), y + 1)[0],
    "without a graph": lambda x: (y := x / x.exp(), y.detach())[0],
    "read": lambda x: (y := x / x.exp(), y.sin())[0],
}


@pytest.mark.parametrize("name", every(2, WRITTEN))
def test_a_result_is_written_to_as_eager_lets_it(name):
    def outcome(f, write, second):
        x = torch.linspace(0.2, 0.8, 9, dtype=torch.float64).reshape(3, 3).requires_grad_()
        y = f(x * 1)
        write(y)
        try:
            (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=second)
            return g, torch.autograd.grad(g.sum(), x) if second else None
        except RuntimeError as e:
            assert "modified by an inplace operation" in str(e)
            return None

    f, j = WRITTEN[name], jit(WRITTEN[name])
    for write, second in itertools.product(WRITES, (False, True)):
        if write != "data" or outcome(f, hidden_write, second):  # eager reads what was written
            assert_same(outcome(j, WRITES[write], second), outcome(f, WRITES[write], second))


def test_saved_tensors_hooks_do_not_hold_a_result_that_eager_does_not_save():
    def gradient(f):
        x = torch.linspace(0.2, 0.8, 3).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            y = f(x * 1)
        hidden_write(y)
        return torch.autograd.grad(y.sum(), x)

    f = lambda x: x / x.exp()
    assert_same(gradient(jit(f)), gradient(f))


def test_what_a_result_was_computed_from_is_written_to():
    """Eager saves the result of 1 / x, and a value that it does not return; where kernels are
    fused, the backward computes that again of the argument, which autograd guards."""

    def gradient(f):
        x = (torch.linspace(0.2, 0.8, 3) * 1).requires_grad_()
        y = f(x)
        hidden_write(y)
        hidden_write(x)
        return torch.autograd.grad(y.sum(), x)

    f = lambda x: 1 / x
    if backends.REGISTRY["eager"] == backends.EAGER:
        assert_same(gradient(jit(f)), gradient(f))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(jit(f))

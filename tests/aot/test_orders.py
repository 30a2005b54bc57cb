"""Backward to any order through compiled functions (``create_graph=True``)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_function, functionalize, jit, jvp, vmap
from aotfunc.errors import CaptureError
from tests.aot.test_training import COMPILED
from tests.inputs import f64
from tests.reference import assert_same


def in_place(x):
    y = x * 2
    y[0].mul_(x[1])
    y.sin_()
    y += x
    return y * y


def written_view(x):
    x = x * 1
    v = x.view(-1)
    v[1:].mul_(x.sum())
    return x


def two_results(x):
    return x.sin() * x, (x.exp() * x).sum(0)


def attention(x):
    return F.scaled_dot_product_attention(x, x.sin(), x * x)


PROGRAMS = {
    "pointwise": lambda x: x.sin() * x * x,
    "product": lambda x: (x @ x.t()).tanh() @ x,
    "softmax": lambda x: x.softmax(-1) * x.logsumexp(-1, keepdim=True),
    "in place": in_place,
    "through a view": written_view,
    "gather": lambda x: x[[1, 0, 1]] * x.cumsum(0)[:1],
    "two results": two_results,
    "gradient inside": lambda x: torch.autograd.grad((x**4).sum(), x, create_graph=True)[0],
    "sorted": lambda x: x.sort(-1)[0].prod(-1),
}


def derivatives(f, x, order=3):
    found = []
    y = f(x)
    for _ in range(order):
        ys = y if isinstance(y, tuple) else (y,)
        (y,) = torch.autograd.grad(sum(v.sin().sum() for v in ys), x, create_graph=True)
        found.append(y)
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_third_order(name):
    f, x = PROGRAMS[name], f64(3, 3).requires_grad_()
    expected = derivatives(f, x)
    for compiled in COMPILED.values():
        assert_same(derivatives(compiled(f), x), expected)


def test_layer_norm():
    """PyTorch's own third derivative of layer_norm is wrong (2.13): compared with its
    definition."""

    def definition(x):
        c = x - x.mean(-1, keepdim=True)
        return c * (c.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    x = f64(3, 3).requires_grad_()
    assert_same(derivatives(jit(lambda x: F.layer_norm(x, (3,))), x), derivatives(definition, x))


def test_gradgradcheck():
    f = jit(lambda x, w: torch.sigmoid(x @ w) * x.sum())
    args = (f64(2, 3).requires_grad_(), f64(3, 2).requires_grad_())
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_twice(training):
    m = nn.BatchNorm1d(4).double().train(training)
    x, w = f64(5, 4).requires_grad_(), f64(5, 4)

    def penalty(f):
        m.reset_running_stats()
        (g,) = torch.autograd.grad((f(x).sin() * w).sum(), x, create_graph=True)
        return torch.autograd.grad(g.sin().sum(), [x, *m.parameters()], allow_unused=True)

    assert_same(penalty(jit(m)), penalty(m))


@pytest.mark.parametrize("compiled", COMPILED)
def test_gradient_penalty(compiled):
    net = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 1)).double()
    x = f64(4, 3)

    def penalized(f):
        inputs = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(inputs).sum(), inputs, create_graph=True)
        net.zero_grad()
        (g.norm(dim=1) - 1).square().mean().backward()
        return [None if p.grad is None else p.grad.clone() for p in net.parameters()]

    got, want = penalized(COMPILED[compiled](net)), penalized(net)
    assert [g is None for g in got] == [g is None for g in want]
    assert_same([g for g in got if g is not None], [g for g in want if g is not None])


def test_in_and_outside_of_compiled_code():
    f, x = jit(lambda x: x.sin() * x), f64(3).requires_grad_()
    assert_same(
        derivatives(lambda x: f(f(x) * x).exp(), x, 2),
        derivatives(lambda x: _twice(x).exp(), x, 2),
    )


def _twice(x):
    y = x.sin() * x * x
    return y.sin() * y


def test_the_backward_of_the_backward_is_compiled_too():
    from tests.aot.compilers import Watched

    with Watched() as w:
        x = f64(3).requires_grad_()
        y = aot_function(lambda x: (x.sin() * x).sum(), w.compiler)(x)
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        torch.autograd.grad(g, x, torch.ones_like(g))
    assert {"sin", "mul", "cos"} <= w.inside
    assert not {"sin", "mul", "cos"} & w.outside


def test_complex():
    z = torch.randn(3, dtype=torch.complex128).requires_grad_()
    f = lambda z: (z * z.conj()).real.sum() + z.abs().sin().sum()
    assert_same(derivatives(jit(f), z, 1), derivatives(f, z, 1))
    assert_same(jit(lambda z: z * 2j)(z.conj()), z.conj() * 2j)
    assert_same(jit(lambda z: z.conj())(z), z.conj())


class Saved(torch.autograd.Function):
    """A derivative that is not the values' own, and that reads the output."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * x * y * 3


def hidden(x):
    y = x * x
    with torch.no_grad():
        y.mul_(3)
    return y * x


MARKED = {
    "detach": lambda x: x.sin() * x.detach() * (x * x).detach().sin(),
    "hidden write": hidden,
    "custom derivative": lambda x: Saved.apply(x * x) * x,
    "checkpoint": lambda x: (
        checkpoint(lambda x: (x.sin() * x.detach()).exp(), x, use_reentrant=False) * x
    ),
}
AROUND = {
    "jit": jit,
    "jit in jit": lambda f: (lambda j: jit(lambda x: j(x) * 1))(jit(f)),
    "aot_function in jit": lambda f: jit(aot_function(f, "eager")),
    "three": lambda f: jit(jit(jit(f))),
    "functionalize of jit": lambda f: functionalize(jit(f)),
    "vmap of jit": lambda f: vmap(jit(f)),
    "jvp of jit": lambda f: lambda x: jvp(jit(f), (x,), (x.detach() * 0 + 1,))[0],
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", MARKED)
def test_marks_outlive_every_order(name, around):
    """What the user cut, hid or wrote himself stays so in second and third derivatives of calls
    inside of calls."""

    def orders(f):
        x = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
        found = [f(x)]
        for _ in range(3):
            (g,) = torch.autograd.grad(found[-1].sum(), x, create_graph=True)
            found.append(g)
        return found

    assert_same(orders(AROUND[around](MARKED[name])), orders(MARKED[name]))


@pytest.mark.parametrize("way", [jit, lambda f: aot_function(f, "eager")])
def test_parts_of_a_conjugated_argument(way):
    """Its memory holds other numbers: they are computed; what would share the memory is
    refused."""
    z = torch.randn(4, dtype=torch.complex64)
    for f in (
        lambda z: z.imag * 2,
        lambda z: z.real.sin() + z[1:].imag.sum(),
        lambda z: torch.view_as_real(z.resolve_conj()),
        lambda z: torch.view_as_real(z[::2].clone()) + 1,
        lambda z: z.conj().imag * 3,
    ):
        compiled = way(f)
        for given in (z, z.conj(), z.conj()[1:]):
            assert_same(compiled(given), f(given))
    x = torch.randn(4, requires_grad=True)
    loss = lambda z, x: (z.imag * x).sum()
    given = ((x * (1 + 2j)).conj(), x)
    assert_same(
        torch.autograd.grad(way(loss)(*given), x, retain_graph=True),
        torch.autograd.grad(loss(*given), x),
    )
    for f in (lambda z: z.imag, lambda z: z.real.add_(1).sum()):
        with pytest.raises(CaptureError, match=r"conjugated argument .*z\.resolve_conj\(\)"):
            way(f)(z.conj())

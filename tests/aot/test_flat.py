"""Where a second derivative is zero because an op's backward is piecewise constant, autograd has
zeros and not None: with gradients of gradients that pass it, around the call, in it, and
nested."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotfunc import aot_function, aot_module, jit
from aotfunc.transforms.rules.table import RULES

LABELS = torch.tensor([0, 3, 1])


def pooled(pool, rank):
    """``pool`` of ``rank`` dimensions on a ``(3, 4)`` tensor, as ``(3, 4)`` again."""
    shape = (3,) + {1: (4,), 2: (2, 2), 3: (1, 2, 2)}[rank]
    return lambda h: pool(h.reshape(shape)).flatten(1).repeat(1, 4)[:, :4]


def unpooled(h):
    return F.max_unpool1d(*F.max_pool1d(h[None], 2, return_indices=True), 2)[0]


FLAT = {
    "relu": F.relu,
    "relu6": F.relu6,
    "threshold": lambda h: F.threshold(h, 0.1, 20.0),
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "prelu": nn.PReLU(),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "nll_loss": lambda h: F.nll_loss(h, LABELS) * torch.ones(3, 4),
    "nll_loss2d": lambda h: F.nll_loss(h[..., None], LABELS[:, None]) * torch.ones(3, 4),
    "max_pool1d": pooled(lambda h: F.max_pool1d(h, 2), 1),
    "max_pool2d": pooled(lambda h: F.max_pool2d(h, (1, 2)), 2),
    "max_pool3d": pooled(lambda h: F.max_pool3d(h, (1, 1, 2)), 3),
    "avg_pool1d": pooled(lambda h: F.avg_pool1d(h, 2), 1),
    "avg_pool2d": pooled(lambda h: F.avg_pool2d(h, (1, 2)), 2),
    "avg_pool3d": pooled(lambda h: F.avg_pool3d(h, (1, 1, 2)), 3),
    "adaptive_max_pool1d": pooled(lambda h: F.adaptive_max_pool1d(h, 2), 1),
    "adaptive_max_pool2d": pooled(lambda h: F.adaptive_max_pool2d(h, (1, 2)), 2),
    "adaptive_max_pool3d": pooled(lambda h: F.adaptive_max_pool3d(h, (1, 1, 2)), 3),
    "adaptive_avg_pool1d": pooled(lambda h: F.adaptive_avg_pool1d(h, 2), 1),
    "adaptive_avg_pool2d": pooled(lambda h: F.adaptive_avg_pool2d(h, (1, 2)), 2),
    "adaptive_avg_pool3d": pooled(lambda h: F.adaptive_avg_pool3d(h, (1, 1, 2)), 3),
    "fractional_max_pool2d": pooled(lambda h: F.fractional_max_pool2d(h, 1, (1, 2)), 2),
    "max_unpool1d": unpooled,
    **{
        f"{kind} pad {rank}d": pooled(lambda h, p=pad, k=kind: F.pad(h[None], p, mode=k)[0], rank)
        for kind in ("reflect", "replicate")
        for rank, pad in ((1, (1, 1)), (2, (1, 1, 1, 1)), (3, (1, 1, 1, 1, 0, 0)))
    },
}
#: those whose derivative is of the second order, or ends
OTHER = {
    "tanh": torch.tanh,
    "elu": F.elu,
    "where": lambda h: torch.where(h > 0, h, 0 * h),
    "maximum": lambda h: torch.maximum(h, h.flip(-1)),
    "clamp": lambda h: h.clamp(-0.5, 0.5),
    "no_grad": lambda h: h * torch.no_grad()(F.relu)(h),
    "sort": lambda h: h.sort(-1).values,
}
WAYS = {"jit": jit, "aot_function": lambda f: aot_function(f, "eager")}


def outcome(act, way, order, nested=False):
    """``.grad`` of all leaves after a backward through a derivative of a net."""
    torch.manual_seed(0)
    x = torch.randn(3, 3, requires_grad=True)
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    c = torch.randn(2, 4, requires_grad=True)
    inner = way(act) if nested else act
    y = way(lambda x, a, b, c: inner(x @ a.t() + b) @ c.t())(x, a, b, c).sum()
    for _ in range(order - 1):
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        assert g.requires_grad
        y = (g * x).sum() + g.norm() if order > 2 else g.norm()
    y.backward()
    return [t.grad for t in (x, a, b, c)]


def assert_equal(got, want):
    assert [g is None for g in got] == [w is None for w in want]
    for g, w in zip(got, want, strict=True):
        assert w is None or torch.allclose(g, w, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("act", [*FLAT, *OTHER])
def test_zeros_of_second_derivatives(act, order, way):
    f = {**FLAT, **OTHER}[act]
    want = outcome(f, lambda f: f, order)
    assert_equal(outcome(f, WAYS[way], order), want)
    if not isinstance(f, nn.Module):
        assert_equal(outcome(f, WAYS[way], order, nested=True), want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", [torch.nextafter, torch.copysign])
def test_zeros_of_first_derivatives(op, way):
    """The result does not change with the second argument, but for jumps."""

    def of(way):
        x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        y = torch.tensor([2.0, -2.0, -1.0], requires_grad=True)
        (way(op)(x * 1, y * 1) * x).sum().backward()
        return [x.grad, y.grad]

    assert_equal(of(WAYS[way]), of(lambda f: f))


@pytest.mark.parametrize("act", FLAT)
def test_a_module(act):
    def of(way):
        torch.manual_seed(0)
        last = nn.Linear(4, 2)
        m = nn.Sequential(nn.Linear(3, 4), last)
        m.forward = lambda x: last(FLAT[act](m[0](x)))
        x = torch.randn(3, 3, requires_grad=True)
        (g,) = torch.autograd.grad(way(m)(x).sum(), x, create_graph=True)
        g.norm().backward()
        return [t.grad for t in (x, *m.parameters())]

    want = of(lambda m: m)
    assert_equal(of(lambda m: aot_module(m, "eager")), want)


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_taken_inside(way):
    def f(x, b):
        (g,) = torch.autograd.grad(F.relu(x + b).sum(), x, create_graph=True)
        return g * 2

    def of(way):
        x, b = torch.arange(-1.0, 2, requires_grad=True), torch.ones(3, requires_grad=True)
        y = way(f)(x, b)
        y.sum().backward()
        return [x.grad, b.grad]

    assert_equal(of(WAYS[way]), of(lambda f: f))


def test_only_results_that_a_gradient_reaches_have_zeros():
    def of(way):
        x = torch.arange(-1.0, 2, requires_grad=True)
        b, c = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        ys = way(lambda x, b, c: (F.relu(x + b), F.relu(x + c)))(x, b, c)
        gs = [torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in ys]
        gs[0].sum().backward()
        return [x.grad, b.grad, c.grad]

    assert_equal(of(jit), of(lambda f: f))
    assert of(jit)[2] is None


def test_each_flat_op_is_a_backward():
    """What is declared reads a value after the gradient, and PyTorch differentiates it to
    zeros."""
    ops = [op for op, line in RULES.items() if line.flat]
    assert len(ops) == 25
    for op in ops:
        names = [a.name for a in op._schema.arguments]
        assert op._schema.name.endswith("_backward") and names[0] in ("grad_output", "grad_out")
        assert names[1] == "self"

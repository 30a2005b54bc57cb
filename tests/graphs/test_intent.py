"""Golden texts: what detach, no_grad, custom functions and checkpoints leave in a graph."""

import itertools

import pytest
import torch
from expecttest import assert_expected_inline
from torch.utils.checkpoint import checkpoint

from aotfunc import functionalize, grad, jit, make_fx, vjp
from tests.graphs.shown import by_autograd, shown
from tests.inputs import same

T = torch.func


def test_detach_stays_visible():
    f = lambda x: x.detach() * x
    assert_expected_inline(
        shown(f, same(3)),
        """\
def forward(self, x):
    detach = aten.detach.default(x)
    mul = aten.mul.Tensor(detach, x)
    return mul
""",
    )


def test_gradient_stops_at_detach():
    f = lambda x: (x.detach() * x.sin()).sum()
    assert_expected_inline(
        shown(grad(f), same(3), like=T.grad(f)),
        """\
def forward(self, x):
    detach = aten.detach.default(x)
    cos = aten.cos.default(x)
    mul = aten.mul.Tensor(detach, cos)
    return mul
""",
    )


def test_gradient_stops_at_no_grad():
    def f(x):
        with torch.no_grad():
            scale = x.norm()
        return (x.sin() / scale).sum()

    assert_expected_inline(
        shown(grad(f), same(3), like=T.grad(f)),
        """\
def forward(self, x):
    linalg_vector_norm = aten.linalg_vector_norm.default(x)
    detach = aten.detach.default(linalg_vector_norm)
    full = aten.full.default([3], 1, dtype = torch.float32, device = device(type='cpu'))
    div = aten.div.Tensor(full, detach)
    cos = aten.cos.default(x)
    mul = aten.mul.Tensor(div, cos)
    return mul
""",
    )


def test_hidden_write_keeps_the_old_derivative():
    def f(x):
        y = x.sin()
        with torch.no_grad():
            y.mul_(3)
        return (y * y).sum()

    x = same(3)

    def by_autograd(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    assert_expected_inline(
        shown(grad(f), x, like=by_autograd),
        """\
def forward(self, x):
    sin = aten.sin.default(x)
    mul = aten.mul.Tensor(sin, 3)
    hidden_write = aotfunc.hidden_write.default(sin, mul)
    add = aten.add.Tensor(hidden_write, hidden_write)
    cos = aten.cos.default(x)
    mul_1 = aten.mul.Tensor(add, cos)
    return mul_1
""",
    )


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (g * x.exp()).clamp(-1, 1)


def test_custom_function_is_its_forward():
    assert_expected_inline(
        shown(lambda x: Clipped.apply(x), same(3)),
        """\
def forward(self, x):
    exp = aten.exp.default(x)
    return exp
""",
    )


def test_custom_function_has_its_own_backward():
    f = lambda x: Clipped.apply(x).sum()
    assert_expected_inline(
        shown(grad(f), same(3), like=by_autograd(f)),
        """\
def forward(self, x):
    exp = aten.exp.default(x)
    clamp = aten.clamp.default(exp, -1, 1)
    return clamp
""",
    )


def test_checkpoint_computes_again():
    f = lambda x: checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False).square().sum()
    assert_expected_inline(
        shown(grad(f), same(3), like=by_autograd(f)),
        """\
def forward(self, x):
    sin = aten.sin.default(x)
    exp = aten.exp.default(sin)
    mul = aten.mul.Tensor(exp, 2)
    sin_1 = aten.sin.default(x)
    exp_1 = aten.exp.default(sin_1)
    mul_1 = aten.mul.Tensor(mul, exp_1)
    cos = aten.cos.default(x)
    mul_2 = aten.mul.Tensor(mul_1, cos)
    return mul_2
""",
    )


def test_autograd_grad_inside():
    def f(x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(x.sin().sum(), x, create_graph=True)
        return g * x

    assert_expected_inline(
        shown(f, same(3), like=lambda x: f(x).detach()),
        """\
def forward(self, x):
    cos = aten.cos.default(x)
    mul = aten.mul.Tensor(cos, x)
    return mul
""",
    )


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_gradients_of_values_that_are_computed_from_one_another(order):
    def f(x):
        y = x.sin()
        v = y.exp()[:2]
        w = v * y[1:]
        z = (w * w * v).sum() + y.prod()
        found = torch.autograd.grad(z, [(y, v, w)[i] for i in order], create_graph=True)
        return [found[order.index(i)] for i in range(3)]

    x = torch.tensor([0.3, 0.9, 1.2], dtype=torch.float64, requires_grad=True)
    want = f(x)
    for way in (functionalize(f), jit(f), make_fx(f)(x.detach()), lambda x: vjp(f, x)[0]):
        torch.testing.assert_close(way(x.detach()), want, check_layout=False)
    total = lambda x: sum(g.sin().sum() for g in f(x))
    (want,) = torch.autograd.grad(total(x), x)
    torch.testing.assert_close(grad(total)(x.detach()), want)

"""Zeros that ops with a derivative of zero give are gradients: multiplied as others on their way,
infinities included; they require grad where what they were multiplied by does, and come of the
results that a gradient reaches alone."""

import pytest
import torch

from aotfunc import aot_function, grad, jit
from tests.reference import assert_same

W, D = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)


def written(write):
    def f(v):
        v = v * 1
        write(v)
        return v

    return f


ZERO = {
    "round": torch.round,
    "sign": torch.sign,
    "angle": torch.angle,
    "copysign": lambda v: torch.copysign(torch.ones(3), v),
    "bernoulli": lambda v: torch.bernoulli(v.sigmoid().nan_to_num()),
    "fill_": written(lambda v: v.fill_(0.5)),
    "zero_": written(lambda v: v.zero_()),
    "normal_": written(lambda v: v.normal_()),
    "copy_": written(lambda v: v.copy_(W[0])),
    "a row": written(lambda v: v[0].fill_(0.5)),
    "masked_fill": lambda v: v.masked_fill(v > -99, 0.5),
    "clamp": lambda v: v.clamp(5, 6),
    "floor of a sum": lambda v: (v + v.sum(0)).floor(),
}
BEFORE = {
    "by what requires grad": lambda x: x @ W,
    "by what does not": lambda x: x @ D,
    "by itself": lambda x: x * x,
    "by nothing": lambda x: x + x,
    "by infinity": lambda x: x * float("inf"),
    "by its root": lambda x: (x * 0).sqrt(),
    "in a compiled function": lambda x: jit(lambda t: t @ D)(x),
}
HOWS = [jit, lambda f: aot_function(f, "eager")]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("zero", ZERO)
def test_zeros_are_gradients(zero, before, create_graph):
    def f(x):
        v = ZERO[zero](BEFORE[before](x))
        return v.sin(), v * 3 + x, x * 2

    def gradients(f, which):
        torch.manual_seed(0)
        x = torch.randn(2, 3, requires_grad=True)
        loss = sum(o.nan_to_num().sum() for o, yes in zip(f(x), which, strict=True) if yes)
        grads = torch.autograd.grad(loss, [x, W], create_graph=create_graph, allow_unused=True)
        return grads, [g is not None and g.requires_grad for g in grads]

    for how, which in zip(HOWS * 2, [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], strict=True):
        assert_same(gradients(how(f), which), gradients(f, which))


@pytest.mark.parametrize("before", BEFORE)
def test_transforms_multiply_zeros_as_torch_func_does(before):
    def f(x):
        return BEFORE[before](x).round().sin().nan_to_num().sum()

    x = torch.randn(2, 3)
    assert_same(grad(f)(x), torch.func.grad(f)(x))

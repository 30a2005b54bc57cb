"""Cumulative sums, products, maxima and minima along any axis, fused with what is around them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from aotfunc import grad, jit
from tests.backends.test_cpp import SPECIAL, against_the_interpreter, agree, floats, kernels_of

pytestmark = pytest.mark.usefixtures("cache")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.bool]
OPS = {
    "cumsum": lambda x, dim: x.cumsum(dim),
    "cumprod": lambda x, dim: x.cumprod(dim),
    "logcumsumexp": lambda x, dim: x.logcumsumexp(dim),
    "cummax": lambda x, dim: x.cummax(dim),
    "cummin": lambda x, dim: x.cummin(dim),
    "from the end": lambda x, dim: x.flip(dim).cumsum(dim).flip(dim) * 2,
}


EACH = [
    (op, dtype)
    for op in OPS
    for dtype in DTYPES
    if dtype.is_floating_point or op != "logcumsumexp"
]


@pytest.mark.parametrize(("op", "dtype"), EACH, ids=str)
def test_each_axis(op, dtype):
    """In each dtype and several layouts, of few and many elements, and of one."""
    f = OPS[op]
    unit = max(1e-6, torch.finfo(dtype).eps) if dtype.is_floating_point else 0
    xs = [(floats(*shape) * 2).to(dtype) for shape in ((37, 19), (1, 5), (2, 11, 3), (70,))]
    xs += [xs[0].t(), xs[2].mT, xs[3][::2]]
    agree(partial(along_each, f), *xs, kernels=None, rtol=4 * unit, atol=unit)


def along_each(f, *xs):
    """The results of f for each axis of each tensor."""
    found = [f(x, dim) for x in xs for dim in range(x.dim())]
    return [y for r in found for y in ([r] if isinstance(r, torch.Tensor) else r)]


FUSED = {
    "both sides": lambda x: (x * 2).cumsum(1).exp() - 1,
    "of a softmax": lambda x: x.softmax(-1).cumsum(-1),
    "normalised": lambda x: x.cumsum(0).softmax(0),
    "several": lambda x: (x.cumsum(1), x.cumprod(1) + 1, x.sum(1)),
    "counted": lambda x: (x > 0).cumsum(1) - 1,
    "transmittance": lambda x: (1 - x.sigmoid()).cumprod(-1) * x.sigmoid(),
    "from the end": lambda x: (x.exp().flip(0).cumsum(0) * 2).flip(0) * x,
    "transposed": lambda x: x.t().cumsum(1) * 2,
    "summed by blocks": lambda x: x.cumsum(1).sum(1) * 2,
}


@pytest.mark.parametrize("case", FUSED)
def test_one_kernel(case):
    for x in (floats(37, 19), floats(9, 1), floats(5, 40, dtype=torch.float64)):
        agree(FUSED[case], x, rtol=1e-5, atol=1e-5)


def test_several_kernels():
    """What no set of loops computes at once is computed one after the other."""
    x = floats(37, 19)
    agree(lambda x: (x.cumsum(1) * 2, x.cumsum(0) * 2), x, kernels=2)
    agree(lambda x: x.cumsum(1) * 2 + x.flip(1).cumsum(1).flip(1), x, kernels=2)
    agree(lambda x: x.cumsum(1)[:, 1:] - x.cumsum(1)[:, :-1], x, kernels=2, atol=1e-5, rtol=1e-4)
    agree(lambda x: torch.nn.functional.pad(x.cumsum(1), (2, 0)) * 2, x, kernels=2)
    agree(lambda x: x.flatten().cumsum(0).view(37, 19) * 2, x, kernels=None)
    agree(lambda x: (x.view(37, 19) * 2).cumsum(1), x.flatten())
    agree(lambda x: (x.expand(5, 9) * 2).cumsum(0), floats(1, 9), kernels=None)
    agree(lambda x: (x * 2).cumsum(0), floats(), kernels=None)
    agree(lambda x: (x * 2).cumsum(0), floats(0, 3), kernels=0)


def test_read_elsewhere():
    """A scan whose other indices vary along its axis is another kernel's."""
    x, i = floats(19, 19), torch.arange(37 * 19).view(37, 19) * 7 % 19
    for f in OPS.values():
        agree(lambda x, f=f: value_of(f(x.sin(), 1)).diagonal() * 2, x, kernels=None)
        agree(lambda x, i, f=f: value_of(f(x, 1)).gather(0, i) * 2, x, i, kernels=None)
        agree(lambda x, i, f=f: value_of(f(x, 1)).gather(0, i).sum(1), x, i, kernels=None)


def test_added_elsewhere():
    """Where a scan from the end is added to places, no memory beyond the result is written."""
    x, i = floats(64, 33), torch.arange(64 * 33).view(64, 33) * 7 % 64
    from_end = OPS["from the end"]
    zeros = lambda: torch.zeros(64, 33)
    agree(lambda x, i: zeros().scatter_add(0, i, from_end(x, 1)), x, i, kernels=None, **LOOSE)
    agree(lambda x, i: zeros().index_add(0, i[:, 0], from_end(x, 1)), x, i, kernels=None, **LOOSE)
    put = lambda x, i: zeros().index_put((i[:, 0],), from_end(x, 1), accumulate=True)
    agree(put, x, i, kernels=None, **LOOSE)


LOOSE = {"rtol": 1e-4, "atol": 1e-4}


def value_of(y):
    return y if isinstance(y, torch.Tensor) else y.values


def test_special_values():
    x = torch.tensor([SPECIAL, SPECIAL[::-1], SPECIAL[4:] + SPECIAL[:4]])
    same = torch.tensor([[2.0, 2.0, math.nan, 3.0, math.nan, 1.0]]).t()
    for f in OPS.values():
        agree(partial(along_each, f), x, x.double(), same, kernels=None)


def test_logarithms_far_apart():
    """Neighbours of which one does not count, and rows that begin or end with nothing."""
    x = floats(8, 50)
    x[1], x[2], x[3] = x[1] * 1000, torch.arange(50) * 30.0, torch.arange(50) * -30.0
    x[4, ::7], x[5, :20], x[6] = -math.inf, -math.inf, -math.inf
    for y in (x, x.double(), -x):
        agree(partial(along_each, OPS["logcumsumexp"]), y, kernels=None)


@pytest.mark.parametrize("op", ["cumsum", "cumprod", "cummax"])
def test_gradients(op):
    """Of the first and second order."""
    x = floats(7, 9, dtype=torch.float64)

    def loss(x, dim):
        found = OPS[op](x.tanh(), dim)
        return (found if isinstance(found, torch.Tensor) else found[0]).square().sum()

    def twice(x, dim):
        return grad(lambda x: grad(loss)(x, dim).square().sum())(x)

    for dim in (0, 1):
        for f in (grad(loss), twice):
            assert_close(jit(partial(f, dim=dim), backend="cpp")(x), f(x, dim))


@pytest.mark.parametrize("case", [*FUSED, "cumsum", "cumprod", "logcumsumexp"])
def test_kernels_against_the_interpreter(case):
    f = FUSED.get(case) or partial(OPS[case], dim=1)
    for x in (floats(5, 37), floats(37, 5), floats(9, 33).t()):
        for kernel in kernels_of(lambda x: f(x * 1), x):
            against_the_interpreter(kernel)


def test_it_prints():
    (kernel,) = kernels_of(lambda x: x.cumsum(1) * 2, floats(4, 5))
    assert "  v1: float32 = sum[..i1](v0)\n" in str(kernel)

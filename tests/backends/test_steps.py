"""Reductions of many elements to one number: as without steps, the same for any number of
threads, and on several of them."""

import math

import pytest
import torch
from torch.testing import assert_close

from aotfunc import grad, jit
from aotfunc.backends.loops.arguments import count_rows
from tests.backends.test_cpp import agree, floats, kernels_of
from tests.kernels import with_threads

pytestmark = pytest.mark.usefixtures("cache")

SHAPES = {
    "rows": floats(300, 1000),
    "a long row": floats(1 << 18),
    "one row": floats(1, 1 << 18),
    "few rows": floats(2, 3, 50000),
    "columns": floats(100_000, 3),
    "odd": floats(300_001),
    "transposed": floats(1000, 300).t(),
    "strided": floats(1200, 600)[::2, ::2],
    "expanded": floats(1, 700).expand(400, 700),
    "doubles": floats(30, 10, 1000, dtype=torch.float64),
    "halves": floats(300, 1000).bfloat16(),
}
REDUCTIONS = {
    "sum": lambda x: (x * x).sum(),
    "sum over all": lambda x: (x * x).sum(tuple(range(x.dim()))),
    "mean": lambda x: (x * 2 + 1).mean(),
    "largest": lambda x: (x * 2).amax(),
    "max": lambda x: (x * 2).max(),
    "least": lambda x: (x * 2).min(),
    "kept": lambda x: (x * 2).sum(tuple(range(x.dim())), keepdim=True),
    "in float64": lambda x: (x * 2).sum(dtype=torch.float64),
    "a share": lambda x: x.exp() / x.exp().sum(),
    "a view": lambda x: (x * 2).transpose(0, -1).sum(),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    x = SHAPES[shape]
    tolerance = {} if x.dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-3}
    agree(lambda x: ((x * x).sum(), (x * 2).mean(), (x + 1).amax()), x, kernels=None, **tolerance)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_ops(op):
    f = REDUCTIONS[op]
    for x in (floats(300, 1000), floats(1 << 18)):
        agree(f, x, kernels=None, rtol=1e-4, atol=2e-3)
        assert_close(f(x.double()).float(), jit(f, backend="cpp")(x).float(), rtol=1e-5, atol=1e-3)
        one, *more = with_threads(jit(f, backend="cpp"), x)
        assert all(torch.equal(one, other) for other in more)


def test_special_values():
    for special in (math.nan, math.inf, -math.inf):
        x = floats(300, 1000)
        x[7, 11] = special
        agree(lambda x: ((x * 2).sum(), (x * 2).amax(), (x * 2).amin()), x, kernels=None)
    x[299, 0] = math.inf
    agree(lambda x: ((x * 2).sum(), (x * 2).mean()), x, kernels=None)
    agree(lambda x: ((x * -1).sum(), (x * 2).amin()), torch.zeros(300, 1000), kernels=None)


def test_the_first_step_has_rows():
    first, second = kernels_of(
        lambda x, y: ((x - y) ** 2).mean(), floats(300, 1000), floats(300, 1000)
    )
    assert count_rows(first) == 300 and count_rows(second) == 1


def test_gradients():
    f = lambda x, y: ((x.tanh() - y) ** 2).mean() + (x * y).sum()
    x, y = floats(300, 1000), floats(300, 1000)
    got = jit(grad(f, (0, 1)), backend="cpp")(x, y)
    assert_close(got, grad(f, (0, 1))(x, y), rtol=1e-5, atol=1e-6)

"""Remainders, quotients and shifts in kernels: eager's numbers, at the ends of each dtype, too."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from aotfunc import jit
from tests.backends.test_cpp import SPECIAL, agree
from tests.kernels import every_kernel

pytestmark = pytest.mark.usefixtures("cache")

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
COUNTS = (0, 1, 7, 8, 15, 31, 32, 63, 64, 100)


def ends(dtype: torch.dtype) -> torch.Tensor:
    """Integers from both ends of the dtype, and around 0, in a transposed matrix."""
    info = torch.iinfo(dtype)
    found = [0, 1, 2, 7, 8, info.max, info.max - 1, info.max // 2]
    found += [-1, -2, -7, -8, info.min, info.min + 1] if info.min else []
    return torch.tensor(found * 3, dtype=dtype).reshape(3, -1).t()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_by_numbers(dtype):
    info = torch.iinfo(dtype)
    divisors = (1, 2, 7, info.max, *((-1, -2, -7, info.min) if info.min else ()))

    def f(x):
        found = []
        for d in divisors:
            found += [x % d, x // d, x.fmod(d), x % torch.full((), d, dtype=dtype)]
            if d != -1:  # eager ends the process
                found.append(torch.div(x, d, rounding_mode="trunc"))
        return found

    agree(f, ends(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_shifts(dtype):
    counts = (*COUNTS, *((-1, -9) if torch.iinfo(dtype).min else ()))
    x = ends(dtype)
    n = torch.tensor(counts).to(dtype).repeat(x.numel())[: x.numel()].reshape(x.shape)

    def f(x, n):
        found = [x << n, x >> n, 5 << n, torch.bitwise_right_shift(100, n)]
        for count in counts:
            found += [x << count, torch.bitwise_right_shift(x, count)]
        return found

    agree(f, x, n, rtol=0, atol=0)


@pytest.mark.parametrize("divide", [torch.remainder, torch.floor_divide, torch.fmod])
@pytest.mark.parametrize("by", ["a number", "a tensor"])
def test_zero_is_refused_as_in_eager(divide, by):
    zero = 0 if by == "a number" else torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        jit(lambda x: divide(x + 1, zero) * 2, backend=every_kernel)(torch.arange(3))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_floating_ones(dtype):
    """Numbers divide tensors of low precision in one step, tensors do not: see STEPWISE."""
    low = dtype in (torch.bfloat16, torch.float16)
    near = [x for x in SPECIAL if not (0 < abs(x) < 1e-30 or abs(x) == 3e38)]
    found = torch.tensor([*near, 0.1, -7.7, 1e4])
    x, y = [t.reshape(-1).to(dtype) for t in torch.meshgrid(found, found.flip(0), indexing="ij")]

    def f(x, y):
        found = [x % y, x.fmod(y), 2.5 % x]
        found += [] if low else [x // y, torch.div(x, y, rounding_mode="trunc")]
        for d in (0.3, -3.0, 0.0, math.inf):
            found += [x % d, x.fmod(d), x // d, torch.div(x, d, rounding_mode="trunc")]
        return found

    agree(f, x, y, rtol=0, atol=0)
    agree(lambda x, y: [r.nan_to_num(0).signbit() for r in f(x, y)], x, y, kernels=None)


def test_a_quotient_that_overflows():
    """The remainder is exact, as in the C library and eager's kernel for single elements."""
    x, y = torch.tensor([3e38, -1.0, 5.5] * 9), torch.tensor([1e-38, 1e-45, 2.0] * 9)
    want = [math.fmod(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    got = jit(lambda x, y: torch.fmod(x, y) * 1, backend=every_kernel)(x, y)
    assert_close(got, torch.tensor(want), rtol=0, atol=0)

"""bfloat16 and float16: computed with as float32, every op's result rounded, as in eager mode."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aotfunc import grad, jit
from tests.backends.test_cpp import SPECIAL
from tests.kernels import every_kernel

pytestmark = pytest.mark.usefixtures("cache")

#: of two matrices and a row; the same numbers as eager's
CASES = {
    "a chain": lambda x, y, b: ((x * y + b).tanh() * 1.1).exp() - y / 3.3,
    "numbers": lambda x, y, b: ((x + 1.1) * 1.1, x / 1.1 - 0.3, 1.1 - x, x.abs() ** 1.1),
    "compared": lambda x, y, b: (x > 1.1, (x * 0 + 1.1) == 1.1, torch.where(x > y, x, 1.1)),
    "bounds": lambda x, y, b: (x.clamp(-0.3, 1.1) * 2, F.threshold(x, 1.1, 0.3) * 2),
    "at a bound": lambda x, y, b: [
        shrunk
        for t in (0.1, 0.7)
        for at in [torch.where(y > 0, t, y)]
        for shrunk in (
            F.hardshrink(at, t),
            torch.ops.aten.hardshrink_backward(y, at, t),
            torch.ops.aten.softshrink_backward(y, at, t),
        )
    ],
    "sums": lambda x, y, b: (x.sum(1), (x * y).sum(0), (x * y).mean(1), x.amax(1)),
    "a sum in float64": lambda x, y, b: (x * 1.1).sum(1, dtype=torch.float64).float(),
    "casts": lambda x, y, b: (
        x.float() * 2.2,
        (x.float() * 1.1).to(x.dtype) * 2,
        x.double() * 1.1,
    ),
    "another dtype": lambda x, y, b: (x * torch.arange(40), x + y.float() * 1.1),
    "shown": lambda x, y, b: (x[:, 3:] * 1.1, x.t() * 1.1, x.reshape(-1) * 1.1),
    "padded": lambda x, y, b: (F.pad(x, (1, 2), value=1.1) * 1.1, torch.cat([x, y], 1) * 1.1),
    "looked up": lambda x, y, b: (x[torch.tensor([3, 1])] * 1.1, x.tril() * 1.1),
    "constants": lambda x, y, b: x * torch.full((40,), 1.1, dtype=x.dtype) + torch.eye(37, 40) * 2,
    "activations": lambda x, y, b: (F.elu(x, 1.1), F.leaky_relu(x, 0.11), F.hardswish(x)),
    "counted": lambda x, y, b: x + torch.arange(40, dtype=x.dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(case, dtype):
    args = [(torch.randn(n) * 2).to(dtype) for n in ((37, 40), (37, 40), (40,))]
    f = CASES[case]
    for x in (args[0], args[0].t().contiguous().t()):
        got, want = jit(f, backend=every_kernel)(x, *args[1:]), f(x, *args[1:])
        assert_close(got, want, rtol=0, atol=0)


#: what is computed with a matrix
OTHERS = {
    "a number": 0.7123456,
    "a whole number": 1003,
    **{f"one {d}": torch.tensor(0.7123456, dtype=d) for d in (torch.float64, torch.float32)},
    "one integer": torch.tensor(1003),
    "integers": torch.arange(1, 1481).view(37, 40),
    "one of another rank": torch.tensor([0.7123456]),
}
OPS = {
    **{f.__name__: f for f in (torch.add, torch.sub, torch.mul, torch.div, torch.fmod, torch.gt)},
    **{f.__name__: f for f in (torch.pow, torch.atan2, torch.remainder, torch.maximum)},
    "subtracted from": lambda x, y: y - x,
    "divided by": lambda x, y: y / x,
    "power of": lambda x, y: y**x,
    "times": lambda x, y: y * x,
    "addcmul": lambda x, y: torch.addcmul(x, x, y),
    "where": lambda x, y: torch.where(x > 0, x, y),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_numbers_of_other_dtypes(op, dtype):
    """Most ops round what they compute with to the dtype of the result."""
    x = ((torch.rand(37, 40) + 0.5) * 2).to(dtype)
    tensors = op in ("maximum", "atan2", "addcmul")
    ys = {name: y for name, y in OTHERS.items() if isinstance(y, torch.Tensor) or not tensors}
    f = lambda x, ys: {name: OPS[op](x, y) for name, y in ys.items()}
    assert_close(jit(f, backend=every_kernel)(x, ys), f(x, ys), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_special_values(dtype):
    x = torch.tensor([*SPECIAL, 65504, 65520, 6e-8, 3e-8, 1e-7] * 2).to(dtype)
    f = lambda x: (x * 1, x + x, -x, x.relu() * 2, x.float() * 1, x.float().to(dtype) * 1)
    got, want = jit(f, backend=every_kernel)(x), f(x)
    assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[~a.isnan()].signbit(), b[~b.isnan()].signbit())
    assert math.isnan(got[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_powers_of_special_values(dtype):
    """A power of 0.5 is a root in all dtypes but float16."""
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 4.0, -1.0] * 3).to(dtype)
    f = lambda x: [x**e for e in (0.5, -0.5, -1, -2, -3, -4, 1.5, 2, 3, 4)]
    for a, b in zip(jit(f, backend=every_kernel)(x), f(x), strict=True):
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(a[~a.isnan()].signbit(), b[~b.isnan()].signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients(dtype):
    x, b = torch.randn(37, 40).to(dtype), torch.randn(40).to(dtype)
    f = grad(lambda x, b: (F.gelu(x + b, approximate="tanh") * x).float().sum(), argnums=(0, 1))
    unit = 2 * torch.finfo(dtype).eps
    assert_close(jit(f, backend=every_kernel)(x, b), f(x, b), rtol=unit, atol=unit)


def test_choices_between_numbers_that_are_read_and_zero():
    """One number of each row, which a vector is filled with, or 0 outside of the tensor."""
    dtypes = (torch.bfloat16, torch.float16, torch.int64, torch.bool)
    columns = [(torch.randn(5, 1) * 3).to(dtype) for dtype in dtypes]
    f = lambda *rows: [(x.roll(1, 0) * 1, F.pad(x, (0, 0, 2, 1)) * 1) for x in rows]
    rows = [x.expand(5, 19) for x in columns]
    assert_close(jit(f, backend=every_kernel)(*rows), f(*rows), rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_signs_of_zeros(dtype, zero, n):
    """Of one number as of many; a bound that is the other zero leaves them."""

    def f(x):
        bounds = [x.clamp(0, 6), x.clamp(min=-0.0), x.clamp(max=0.0), F.hardtanh(x, -6.0, 0.0)]
        return [*bounds, F.relu6(x), x.amax(0, keepdim=True), F.leaky_relu(x), -x, x.expand(2, n)]

    x = torch.full((n,), zero, dtype=dtype)
    got, want = jit(f, backend=every_kernel)(x), f(x)
    assert [y.signbit().tolist() for y in got] == [y.signbit().tolist() for y in want]

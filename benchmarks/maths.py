"""How accurate and how fast the C++ backend's maths functions are.

``python -m benchmarks.maths [--write]``. An error is in units in the last place of the right
result, which is float64's for float32 and mpmath's for float64. Samples are spread evenly over the
bits of all finite numbers, the usual range beside them; special values are NaN, infinities, zeros,
denormals and the edges of overflow, where the result must be the right one of NaN, infinity and
signed zero."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import mpmath
import numpy as np
import torch
from torch import Tensor

from aotfunc.backends.loops.native import PRELUDE, LoadedKernel, load_kernels
from benchmarks.measure import DOCS, arguments

UNARY = [
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sigmoid", "sin", "cos", "tan"),
    *("asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
    *("erf", "erfc", "lgamma", "sqrt", "rsqrt"),
]
BINARY = ("pow", "atan2", "hypot", "fmod")
TYPES = {torch.float32: ("floats", "float"), torch.float64: ("doubles", "double")}

SPECIAL = [
    float("nan"), float("inf"), 0.0, 1.0, 0.5, 2.0, 3.0, 1e-45, 1e-40, 1.2e-38, 5e-324, 1e-310,
    88.7, 88.73, 89.5, 103.9, 104.1, 127.9, 128.0, 150.0, 709.7, 709.8, 745.1, 745.2, 1e10, 3.4e38,
    1.7e308,
]  # fmt: skip


def kernel(name: str, dtype: torch.dtype) -> LoadedKernel:
    """``aot_name`` of every element."""
    v, t = TYPES[dtype]
    second = f", aot_get<{v}>(y + i, n)" if name in BINARY else ""
    source = f"""
extern "C" void kernel(int64_t begin, int64_t end, const int64_t *, void *const *buffers) {{
  {t} *out = ({t} *)buffers[0], *x = ({t} *)buffers[1], *y = ({t} *)buffers[2];
  for (int64_t i = begin; i < end; i += aot_lanes<{v}>) {{
    const int64_t n = end - i;
    aot_put(out + i, aot_{name}(aot_get<{v}>(x + i, n){second}), n);
  }}
}}"""
    return load_kernels(PRELUDE + source)["kernel"]


def ours(name: str, x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    kernel(name, x.dtype)(x.numel(), (), (out, x, y))
    return out


def samples(dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    """Arguments: special values with each other, all magnitudes, and the usual ones."""
    special = torch.tensor(SPECIAL + [-v for v in SPECIAL], dtype=dtype)
    pairs = torch.cartesian_prod(special, special)
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    g = torch.Generator().manual_seed(0)
    ends = torch.iinfo(whole)
    bits = torch.randint(ends.min, ends.max, (2, n), generator=g, dtype=whole).view(dtype)
    usual = torch.randn(2, n, generator=g, dtype=dtype) * 10
    unit = torch.rand(2, n, generator=g, dtype=dtype) * 2.2 - 1.1
    x, y = torch.cat([pairs.T, bits, usual, unit], 1).contiguous()
    return x, y


def right(name: str, x: Tensor, y: Tensor) -> Tensor:
    """The result in float64, by PyTorch; by the C library for ``fmod``, where it is exact."""
    if name == "fmod":
        with np.errstate(invalid="ignore"):
            return torch.from_numpy(np.fmod(x.double().numpy(), y.double().numpy()))
    f = getattr(torch, name)
    return f(x.double(), y.double()) if name in BINARY else f(x.double())


EXACT = {
    "expm1": mpmath.expm1,
    "log1p": mpmath.log1p,
    "exp2": lambda x: mpmath.mpf(2) ** x,
    "log2": lambda x: mpmath.log(x, 2),
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "lgamma": mpmath.loggamma,
    "pow": lambda x, y: x**y,
    "fmod": lambda x, y: mpmath.mpf(math.fmod(x, y)),
}


def error(out: Tensor, expected: Tensor) -> Tensor:
    """In units in the last place; infinite where one is NaN, or where infinities or the signs of
    zeros differ. Beyond the largest number, infinity counts as the next power of two."""
    info = torch.finfo(out.dtype)
    top = 2.0**128 if out.dtype == torch.float32 else 1.7976931348623157e308
    _, exponent = torch.frexp(expected.clamp(-info.max, info.max))
    exponent = exponent.masked_fill(expected == 0, -2000)
    digits = 24 if out.dtype == torch.float32 else 53
    least = 149 if out.dtype == torch.float32 else 1074
    ulp = torch.ldexp(torch.ones_like(expected), (exponent - digits).clamp(min=-least))
    found = out.double().clamp(-top, top)
    err = (found - expected.clamp(-top, top)).abs() / ulp
    wrong = out.isnan() != expected.isnan()
    wrong |= (expected == 0) & (out.signbit() != expected.signbit()) & (out == 0)
    return torch.where(expected.isnan() & out.isnan(), 0.0, err).masked_fill(wrong, torch.inf)


def largest(name: str, n: int) -> float:
    """The largest error in float32."""
    x, y = samples(torch.float32, n)
    e = error(ours(name, x, y), right(name, x, y))
    return float((e[(x > 0) & (x < 4e36)] if name == "lgamma" else e).max())


def largest_double(name: str, n: int) -> float:
    """The largest error in float64, where the result is a finite real number."""
    f = EXACT.get(name) or getattr(mpmath, name)
    x, y = samples(torch.float64, n)
    keep = x.isfinite() & y.isfinite() & right(name, x, y).isfinite()
    keep &= (x > 0) if name == "lgamma" else (x != 0)
    keep &= x.abs() < (30 if name == "erfc" else torch.inf)
    x, y = x[keep], y[keep]
    worst = 0.0
    with mpmath.workprec(1200 if name in ("sin", "cos", "tan", "acosh", "atanh") else 200):
        for v, w, out in zip(x.tolist(), y.tolist(), ours(name, x, y).tolist()):
            a, b = mpmath.mpf(v), mpmath.mpf(w)
            expected = f(a, b) if name in BINARY else f(a)
            exponent = max(int(mpmath.frexp(expected)[1]) - 53, -1074)
            worst = max(worst, float(abs(out - expected) / mpmath.mpf(2) ** exponent))
    return worst


def nanoseconds(call: Callable, n: int) -> float:
    """The time for each of ``n`` elements; the best of 20 calls."""
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best / n * 1e9


def row(name: str) -> str:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(10_000, generator=g) * 4 + 0.01
    x = x / 4.1 if name in ("asin", "acos", "atanh") else x + 1 if name == "acosh" else x
    y, out = torch.rand(10_000, generator=g) + 0.5, torch.empty(10_000)
    one, eager = kernel(name, torch.float32), getattr(torch, name)
    args = (x, y) if name in BINARY else (x,)
    times = (
        nanoseconds(lambda: one(10_000, (), (out, x, y)), 10_000),
        nanoseconds(lambda: eager(*args, out=out), 10_000),
    )
    errors = largest(name, 4_000_000), largest_double(name, 300)
    return f"| {name} | {errors[0]:.2f} | {errors[1]:.2f} | {times[0]:.2f} | {times[1]:.2f} |"


FIRST = """\
# Maths functions of the C++ backend

`python -m benchmarks.maths --write` makes this table: the largest error in units in the last place
(ULP), for float32 over twelve million arguments beside all pairs of special values, for float64
over a few thousand; and the time for each element in float32, 10,000 elements, one thread.
`exp`, `sigmoid`, `log`, `sin`, `cos`, `tanh` and `erf` in float32 are our own
(`benchmarks/fit_polynomials.py` fits them), the others are Sleef's, as mostly in eager PyTorch.
`lgamma` is measured for positive arguments below its overflow: near its zeros at negative ones all
digits can be lost, as in eager. A CPU without AVX2 and FMA uses the C library in Sleef's place,
which this command does not measure.

| function | float32 ULP | float64 ULP | ns | eager ns |
| --- | --- | --- | --- | --- |
"""

if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    table = FIRST + "\n".join(map(row, (*UNARY, *BINARY))) + "\n"
    print(table)
    if options.write:
        DOCS.joinpath("maths.md").write_text(table)

"""Fit the polynomials of the C++ backend's float32 maths: prints ``polynomials.h``.

``python -m benchmarks.fit_polynomials > aotfunc/backends/loops/polynomials.h``. Each is the
polynomial of its degree whose largest weighted error on an interval is least (Lawson's iteration:
least squares, weighted again by the errors), computed from mpmath's values and rounded to float32
from the lowest coefficient on, each time fitting those that are left again."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
from mpmath import mp, mpf

mp.prec = 120

POINTS = 400


def tail(f: Callable, *terms: float) -> Callable:
    """``f`` without its first Taylor terms, divided by the next power."""

    def rest(x: mpf) -> mpf:
        if abs(x) < mpf(2) ** -30:
            return mpmath.taylor(f, 0, len(terms))[-1]
        return (f(x) - sum(t * x**i for i, t in enumerate(terms))) / x ** len(terms)

    return rest


def odd(f: Callable) -> Callable:
    """For an odd ``f`` with slope ``s`` at 0: what is left of ``f(x) / x``, as a function of
    ``x ** 2``."""

    def rest(z: mpf) -> mpf:
        x = mpmath.sqrt(max(z, mpf(2) ** -40))
        return f(x) / x

    return rest


def minimax(f: Callable, low: float, high: float, degree: int, weight: Callable) -> list[float]:
    """The float32 coefficients, from the constant on."""
    nodes = np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    x = (low + high) / 2 + (high - low) / 2 * nodes
    y = np.array([float(f(mpf(v))) for v in x])
    w = np.array([float(weight(mpf(v))) for v in x])
    fixed: list[float] = []
    for first in range(degree + 1):
        rest = y - np.polynomial.polynomial.polyval(x, fixed) if fixed else y
        powers = x[:, None] ** np.arange(first, degree + 1)
        scale = np.abs(powers).max(0)
        lawson = np.ones_like(x)
        best, least = None, np.inf
        for _ in range(60):
            row = np.sqrt(lawson) * w
            c = np.linalg.lstsq(row[:, None] * powers / scale, row * rest, rcond=None)[0] / scale
            error = np.abs(powers @ c - rest) * w
            if error.max() < least:
                best, least = c, error.max()
            lawson *= error / error.mean()
            lawson /= lawson.sum()
        fixed.append(float(np.float32(best[0])))
    return fixed


#: name -> (what it is, function, interval, degree, weight of an error)
FITS: dict[str, tuple] = {
    "exp": (
        "(exp(x) - 1 - x) / x^2 for |x| <= log(2) / 2",
        tail(mpmath.exp, 1, 1), -0.3467, 0.3467, 4,
        lambda x: x * x,
    ),
    "log": (
        "(log(1 + x) - x + x^2 / 2) / x^3 for sqrt(1/2) <= 1 + x <= sqrt(2)",
        tail(lambda x: mpmath.log(1 + x), 0, 1, mpf(-1) / 2), -0.2930, 0.4143, 8,
        lambda x: abs(x**3 / mpmath.log(1 + x)) if x else 0,
    ),
    "tanh": (
        "(tanh(x) / x - 1) / z of z = x^2 for |x| <= 0.625",
        lambda z: (odd(mpmath.tanh)(z) - 1) / max(z, mpf(2) ** -40), 0.0, 0.390625, 5,
        lambda z: z,
    ),
    "erf": (
        "erf(x) / x - 1 of z = x^2 for |x| <= 1",
        lambda z: odd(mpmath.erf)(z) - 1, 0.0, 1.0, 7,
        lambda z: 1,
    ),
    "erfc": (
        "log(erfc(x)) for 1 <= x <= 4",
        lambda x: mpmath.log(mpmath.erfc(x)), 1.0, 4.0, 7,
        lambda x: mpmath.erfc(x) / mpmath.erf(x),
    ),
}  # fmt: skip


def printed(name: str) -> str:
    what, f, low, high, degree, weight = FITS[name]
    *rest, last = [f"{c.hex()}f" for c in minimax(f, low, high, degree, weight)]
    lines = "\n".join(f"  p = aot_fma(p, x, aot_floats({c}));" for c in reversed(rest))
    return f"""
// {what}
AOT floats aot_{name}_polynomial(floats x) {{
  floats p = aot_floats({last});
{lines}
  return p;
}}"""


def header() -> str:
    first = "// Written by benchmarks/fit_polynomials.py: nearly minimax, in float32."
    return "\n".join([first, *map(printed, FITS)]) + "\n"


if __name__ == "__main__":
    print(header(), end="")

"""Fit the polynomials of the C++ backend's float32 maths: prints ``polynomials.h``.

``python -m benchmarks.fit_polynomials > aotfunc/backends/loops/polynomials.h``. Each is the
polynomial of its degree whose largest weighted error on an interval is least (Lawson's iteration:
least squares, weighted again by the errors), computed from mpmath's values and rounded to float32
from the lowest coefficient on, each time fitting those that are left again."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import mpmath
import numpy as np
from mpmath import mp, mpf

mp.prec = 120

POINTS = 400
INDENT = " " * 4

#: of a piece of a table: its polynomial has this degree, and is fitted at so many points
DEGREE, PIECE = 5, 40


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


def minimax(
    f: Callable, low: float, high: float, degree: int, weight: Callable, points: int = POINTS
) -> list[float]:
    """The float32 coefficients, from the constant on."""
    nodes = np.cos(np.pi * (np.arange(points) + 0.5) / points)
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
    "sin": (
        "(sin(x) / x - 1) / z of z = x^2 for |x| <= pi / 2",
        lambda z: (odd(mpmath.sin)(z) - 1) / max(z, mpf(2) ** -40), 0.0, 2.4725, 3,
        lambda z: z / odd(mpmath.sin)(z),
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
    coefficients = [f"{c.hex()}f" for c in minimax(f, low, high, degree, weight)]
    body = textwrap.fill(
        f"return aot_polynomial(x, {', '.join(reversed(coefficients))});",
        99,
        initial_indent="  ",
        subsequent_indent="      ",
    )
    return f"""
// {what}
AOT floats aot_{name}_polynomial(floats x) {{
{body}
}}"""


def exact_near(f: Callable, x: float) -> tuple[float, float]:
    """Of the float32 numbers near ``x`` the one at which ``f`` is nearest to a float32 number,
    and that."""
    step = float(np.spacing(np.float32(x)))
    near = [float(np.float32(x + i * step)) for i in range(-60, 61)]
    values = {v: f(mpf(v)) for v in near}
    best = min(near, key=lambda v: abs(values[v] - float(np.float32(values[v]))) / abs(values[v]))
    return best, float(np.float32(values[best]))


def pieces(f: Callable, first: int) -> list[list[float]]:
    """For each interval between floats of which only the uppermost 11 bits count, from 2^first on:
    a number in it, ``f`` there, and the coefficients of the rest as a polynomial of the distance.
    The first one begins at 0 and is that of ``f(x) - x``."""
    found = []
    for i in range(32):
        low, high = (2.0 ** (first + j // 4) * (1 + j % 4 / 4) for j in (i, i + 1))
        middle, value = exact_near(f, (low + high) / 2)
        rest = lambda d, m=middle, v=value: (f(m + d) - v) / d
        weight = lambda d, m=middle: abs(d) / f(m + d)
        if i == 0:
            low = middle = value = 0.0
            rest, weight = lambda d: f(d) / d - 1, lambda d: 1
        ends = low - middle, high - middle
        found.append([middle, value, *minimax(rest, *ends, DEGREE - 1, weight, PIECE)])
    return found


#: name -> (what it is, function, exponent of the first interval)
TABLES: dict[str, tuple] = {
    "tanh": ("tanh(x) for 0 <= x < 16", mpmath.tanh, -4),
    "erf": ("erf(x) for 0 <= x < 4", mpmath.erf, -6),
}


def row(numbers: list[str]) -> str:
    return textwrap.fill(
        "{" + ", ".join(numbers) + "},", 99, initial_indent=INDENT, subsequent_indent=INDENT
    )


def table(name: str) -> str:
    what, f, first = TABLES[name]
    found = pieces(f, first)
    at = 4 * (127 + first) % 32  # the last five of the first one's bits
    columns = zip(*found[-at:], *found[:-at], strict=True)
    body = "\n".join([row([f"{c.hex()}f" for c in column]) for column in columns])
    return f"""
// {what}, in pieces
static const float aot_{name}_pieces[{DEGREE + 2}][32] = {{
{body}
}};"""


HORNER = """// Written by benchmarks/fit_polynomials.py: nearly minimax, in float32.

// A polynomial in x by Horner's rule, its highest coefficient first.
template <class... F> AOT floats aot_polynomial(floats x, float first, F... rest) {
  floats p = aot_floats(first);
  ((p = aot_fma(p, x, aot_floats(rest))), ...);
  return p;
}"""


def header() -> str:
    return "\n".join([HORNER, *map(printed, FITS), *map(table, TABLES)]) + "\n"


if __name__ == "__main__":
    print(header(), end="")

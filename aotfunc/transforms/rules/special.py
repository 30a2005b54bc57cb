"""Rules of the special functions: error functions, gamma, zeta, Bessel functions and their
inverses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batching import elementwise
from .choices import keep
from .pointwise import functional
from .schema import aten
from .table import pointwise, vmap_of

ROOT_PI = math.sqrt(math.pi)


NEAR = 0.1
TERMS = 8  # terms of a series: enough for its sixth derivative in float64, for |x| < NEAR


def near_zero(
    x: Tensor, term: Callable[[int], float], away: Callable[[Tensor], Tensor], times: Any = 1
) -> Tensor:
    """Return ``away(x)``, which divides by its argument. Near zero, where digits cancel, more with
    each derivative, return the power series ``times * sum(term(k) * x**(2 * k))``."""
    near = x.abs() < NEAR
    y = x.masked_fill(~near, 0)
    square, series = y * y, term(TERMS - 1)
    for k in reversed(range(TERMS - 1)):
        series = series * square + term(k)  # type: ignore[assignment]
    return torch.where(near, series * (y if times is x else times), away(x.masked_fill(near, 1)))


# ----- the normal distribution -------------------------------------------------------------------

pointwise(aten.erf, lambda g, out, x: g * (aten.exp(-(x * x)) * (2 / ROOT_PI)))
pointwise(aten.erfc, lambda g, out, x: g * (aten.exp(-(x * x)) * (-2 / ROOT_PI)))
pointwise(aten.erfinv, lambda g, out, x: g * (aten.exp(out * out) * (ROOT_PI / 2)))
pointwise(aten.special_erfcx, lambda g, out, x: g * (2 * x * out - 2 / ROOT_PI))
pointwise(
    aten.special_ndtri, lambda g, out, x: g * (aten.exp(out * out / 2) * math.sqrt(2 * math.pi))
)
pointwise(
    aten.special_log_ndtr,
    lambda g, out, x: g * (aten.exp(-(out + x * x / 2)) / math.sqrt(2 * math.pi)),
)


# ----- logit, entropy, sinc ----------------------------------------------------------------------


def in_logit_range(x: Tensor, eps: float | None) -> Tensor:
    low = 0.0 if eps is None else eps
    return (x >= low) & (x <= 1 - low)


def logit_second(h: Tensor, out: Tensor, g: Tensor, x: Tensor, eps: float | None) -> Tensor:
    product = x * (1 - x)
    return keep(in_logit_range(x, eps), h * g * (2 * x - 1) / (product * product))


def sinc_first(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    term = lambda k: (
        (-1) ** (k + 1) * math.pi ** (2 * k + 2) * (2 * k + 2) / math.factorial(2 * k + 3)
    )
    return g * near_zero(x, term, lambda y: (aten.cos(math.pi * x) - out) / y, times=x)


pointwise(aten.logit, lambda g, out, x, eps: aten.logit_backward(g, x, eps))
pointwise(
    aten.logit_backward, lambda h, out, g, x, eps: aten.logit_backward(h, x, eps), logit_second
)
pointwise(aten.special_entr, lambda g, out, x: -(g * (1 + aten.log(x))))
pointwise(aten.sinc, sinc_first)


# ----- gamma and zeta ----------------------------------------------------------------------------


def igamma_in_x(g: Tensor, out: Tensor, a: Tensor, x: Tensor) -> Tensor:
    return g * aten.exp((a - 1) * aten.log(x) - x - aten.lgamma(a))


def mvlgamma_first(g: Tensor, out: Tensor, x: Tensor, p: int) -> Tensor:
    return g * sum((aten.digamma(x - j / 2) for j in range(1, p)), aten.digamma(x))


pointwise(aten.lgamma, lambda g, out, x: g * aten.digamma(x))
pointwise(aten.mvlgamma, mvlgamma_first)
pointwise(aten.digamma, lambda g, out, x: g * aten.polygamma(1, x))
pointwise(aten.polygamma, lambda g, out, n, x: g * aten.polygamma(n + 1, x))


def no_formula(name: str) -> Any:
    def formula(*args: Any) -> Tensor:
        raise NotImplementedError(f"{name} has no known derivative in its first argument")

    return formula


def zeta_in_y(g: Tensor, out: Tensor, x: Any, y: Tensor) -> Tensor:
    return -(g * x * aten.special_zeta(x + 1, y))


pointwise(aten.igamma, no_formula("igamma"), igamma_in_x)
pointwise(aten.igammac, no_formula("igammac"), lambda g, out, a, x: -igamma_in_x(g, out, a, x))
pointwise(aten.special_zeta, no_formula("zeta"), zeta_in_y)
pointwise(aten.special_zeta.other_scalar, no_formula("zeta"))
pointwise(aten.special_zeta.self_scalar, zeta_in_y)


# ----- Bessel functions --------------------------------------------------------------------------


def i1_slope(k: int) -> float:
    """Return the coefficient of ``x**(2k)`` in the Bessel function I1', see DLMF 10.25.2."""
    return (2 * k + 1) / (2 ** (2 * k + 1) * math.factorial(k) * math.factorial(k + 1))


def j1_slope(k: int) -> float:
    """Return the coefficient of ``x**(2k)`` in the Bessel function J1', see DLMF 10.2.2."""
    return (-1) ** k * i1_slope(k)


def sphere_slope(k: int) -> float:
    """Return the coefficient of ``x**(2k + 1)`` in the derivative of sin(x) / x."""
    return (-1) ** (k + 1) * (2 * k + 2) / math.factorial(2 * k + 3)


def i1e_first(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    scaled = near_zero(
        x, i1_slope, lambda y: aten.special_i0e(x) - out / y, times=aten.exp(-x.abs())
    )
    return g * (scaled - out * aten.sgn(x))


pointwise(aten.i0, lambda g, out, x: g * aten.special_i1(x))
pointwise(aten.special_i0e, lambda g, out, x: g * (aten.special_i1e(x) - aten.sgn(x) * out))
pointwise(
    aten.special_i1, lambda g, out, x: g * near_zero(x, i1_slope, lambda y: aten.i0(x) - out / y)
)
pointwise(aten.special_i1e, i1e_first)
# PyTorch has no derivative for those below
pointwise(aten.special_bessel_j0, lambda g, out, x: -(g * aten.special_bessel_j1(x)))
pointwise(
    aten.special_bessel_j1,
    lambda g, out, x: g * near_zero(x, j1_slope, lambda y: aten.special_bessel_j0(x) - out / y),
)
pointwise(aten.special_bessel_y0, lambda g, out, x: -(g * aten.special_bessel_y1(x)))
pointwise(aten.special_bessel_y1, lambda g, out, x: g * (aten.special_bessel_y0(x) - out / x))
pointwise(
    aten.special_modified_bessel_i0, lambda g, out, x: g * aten.special_modified_bessel_i1(x)
)
pointwise(
    aten.special_modified_bessel_i1,
    lambda g, out, x: (
        g * near_zero(x, i1_slope, lambda y: aten.special_modified_bessel_i0(x) - out / y)
    ),
)
pointwise(
    aten.special_modified_bessel_k0, lambda g, out, x: -(g * aten.special_modified_bessel_k1(x))
)
pointwise(
    aten.special_modified_bessel_k1,
    lambda g, out, x: -(g * (aten.special_modified_bessel_k0(x) + out / x)),
)
pointwise(
    aten.special_scaled_modified_bessel_k0,
    lambda g, out, x: g * (out - aten.special_scaled_modified_bessel_k1(x)),
)
pointwise(
    aten.special_scaled_modified_bessel_k1,
    lambda g, out, x: g * (out - aten.special_scaled_modified_bessel_k0(x) - out / x),
)
pointwise(
    aten.special_spherical_bessel_j0,
    lambda g, out, x: g * near_zero(x, sphere_slope, lambda y: (aten.cos(x) - out) / y, times=x),
)

# ----- no derivative known: only batched ---------------------------------------------------------

for op in functional(aten.special_airy_ai, aten._standard_gamma_grad):
    vmap_of(op)(elementwise(op))

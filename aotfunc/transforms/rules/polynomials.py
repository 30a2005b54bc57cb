"""Rules of the orthogonal polynomials: derivatives by those of lower degree, without a division.

Degrees are whole numbers (fractions are cut off), and have no derivative. If a derivative is a sum
over all lower degrees, the degree must be a number: a tensor of them would make the sum as long as
the largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

from .schema import aten
from .table import pointwise, total

Slope = Callable[[Tensor, Any], Tensor]

T, U, V, W = (getattr(aten, f"special_chebyshev_polynomial_{kind}") for kind in "tuvw")
P, L = aten.special_legendre_polynomial_p, aten.special_laguerre_polynomial_l
H, HE = aten.special_hermite_polynomial_h, aten.special_hermite_polynomial_he


def sum_below(x: Tensor, n: Any, step: int, term: Callable[[int], Tensor]) -> Tensor:
    """Return the sum of the terms of the degrees ``n - 1``, ``n - 1 - step``, … down to 0."""
    if isinstance(n, Tensor):
        raise NotImplementedError(
            "its derivative is a sum over all lower degrees: give the degree as a number"
        )
    found = total(*(term(k) for k in range(int(n) - 1, -1, -step)))
    return torch.zeros_like(x) if found is None else found


def second_kind(x: Tensor, n: Any) -> Tensor:
    return sum_below(x, n, 2, lambda k: 2 * (k + 1) * U(x, k))


def previous(n: Any) -> Any:
    """Return the next lower degree."""
    if isinstance(n, Tensor):
        return (n.trunc() if n.is_floating_point() else n) - 1
    return int(n) - 1


SLOPES: list[tuple[OpOverloadPacket, Slope]] = [
    (T, lambda x, n: (previous(n) + 1) * U(x, previous(n))),
    (U, second_kind),
    (V, lambda x, n: second_kind(x, n) - second_kind(x, previous(n))),
    (W, lambda x, n: second_kind(x, n) + second_kind(x, previous(n))),
    (H, lambda x, n: 2 * (previous(n) + 1) * H(x, previous(n))),
    (HE, lambda x, n: (previous(n) + 1) * HE(x, previous(n))),
    (L, lambda x, n: -sum_below(x, n, 1, lambda k: L(x, k))),
    (P, lambda x, n: sum_below(x, n, 2, lambda k: (2 * k + 1) * P(x, k))),
]


def shifted_polynomial(slope: Slope) -> Slope:
    """Differentiate the same polynomial in ``2 x - 1``."""
    return lambda x, n: 2 * slope(2 * x - 1, n)


for kind, (_, slope) in zip("tuvw", SLOPES[:4], strict=True):
    SLOPES.append(
        (getattr(aten, f"special_shifted_chebyshev_polynomial_{kind}"), shifted_polynomial(slope))
    )


def slope_of_degree(*args: Any) -> Tensor:
    raise NotImplementedError(
        "the degree of a polynomial is a whole number and has no derivative; detach it"
    )


def rule_by(slope: Slope) -> Callable[..., Tensor]:
    return lambda g, out, x, n: g * slope(x, n)


for packet, slope in SLOPES:
    pointwise(packet.n_scalar, rule_by(slope))
    pointwise(packet.default, rule_by(slope), slope_of_degree)
    pointwise(packet.x_scalar, slope_of_degree)

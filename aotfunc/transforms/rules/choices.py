"""Rules of elementwise choices: extrema, bounds, masks and signs.

Ties, bounds and other points without a derivative follow ``torch.autograd``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batching import elementwise
from .pointwise import functional
from .schema import aten, tensor_args
from .table import pointwise, vmap_of, zeros


def keep(mask: Tensor, g: Tensor) -> Tensor:
    """Return ``g`` where ``mask`` holds, zero elsewhere (even if ``g`` is not finite there)."""
    return torch.where(mask, g, 0)


def split_on_ties(g: Tensor, x: Tensor, y: Tensor, lost: Tensor) -> Tensor:
    """Return ``g`` to the winner, half of it to each of two equals."""
    return torch.where(x == y, g / 2, g).masked_fill(lost, 0)


pointwise(
    aten.maximum,
    lambda g, out, x, y: split_on_ties(g, x, y, x < y),
    lambda g, out, x, y: split_on_ties(g, x, y, x > y),
)
pointwise(
    aten.minimum,
    lambda g, out, x, y: split_on_ties(g, x, y, x > y),
    lambda g, out, x, y: split_on_ties(g, x, y, x < y),
)
pointwise(
    aten.fmax,
    lambda g, out, x, y: keep((x >= y) | y.isnan(), g),
    lambda g, out, x, y: g.masked_fill((x >= y) | y.isnan(), 0),
)
pointwise(
    aten.fmin,
    lambda g, out, x, y: keep((x <= y) | y.isnan(), g),
    lambda g, out, x, y: g.masked_fill((x <= y) | y.isnan(), 0),
)


def clamped(g: Tensor, out: Tensor, x: Tensor, low: Any, high: Any) -> Tensor:
    if low is None:
        return keep(x <= high, g)
    if high is None:
        return keep(x >= low, g)
    return keep((x >= low) & (x <= high), g)


def clamped_in_low(g: Tensor, out: Tensor, x: Tensor, low: Tensor, high: Tensor | None) -> Tensor:
    return keep(x < low if high is None else (x < low) & (low < high), g)


def clamped_in_high(g: Tensor, out: Tensor, x: Tensor, low: Tensor | None, high: Tensor) -> Tensor:
    return keep(x > high if low is None else (x > high) | (high < low), g)


pointwise(aten.clamp, clamped)
pointwise(aten.clamp.Tensor, clamped, clamped_in_low, clamped_in_high)
for op in (aten.clamp_min.default, aten.clamp_min.Tensor):
    pointwise(
        op, lambda g, out, x, low: keep(x >= low, g), lambda g, out, x, low: keep(x < low, g)
    )
for op in (aten.clamp_max.default, aten.clamp_max.Tensor):
    pointwise(
        op, lambda g, out, x, high: keep(x <= high, g), lambda g, out, x, high: keep(x > high, g)
    )
for op in functional(aten.copysign):
    signs = (zeros,) if len(tensor_args(op)) > 1 else ()
    pointwise(op, lambda g, out, x, y: g * (out / x).masked_fill(x == 0, 0), *signs)
pointwise(aten.nextafter, lambda g, out, x, y: keep(x != y, g), zeros)
pointwise(aten.nan_to_num, lambda g, out, x: g * (x - x == 0))
pointwise(
    aten.where.self,
    None,
    lambda g, out, c, x, y: keep(c, g),
    lambda g, out, c, x, y: g.masked_fill(c.bool(), 0),  # uint8 is a condition, too
)
pointwise(aten.masked_fill.Scalar, lambda g, out, x, mask: g.masked_fill(mask, 0))
pointwise(
    aten.masked_fill.Tensor,
    lambda g, out, x, mask, value: g.masked_fill(mask, 0),
    None,
    lambda g, out, x, mask, value: keep(mask, g),
)


@vmap_of(aten.masked_fill.Tensor)
def _(x: Tensor, mask: Tensor, value: Tensor, *, batched: tuple[bool, ...]) -> Tensor:
    # the op wants a 0-dim value, which a batched one no longer is
    return elementwise(aten.where.self)(
        mask, value.to(x.dtype), x, batched=(batched[1], batched[2], batched[0])
    )

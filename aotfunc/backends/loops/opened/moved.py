"""Open up ops that move elements: repeat, roll, shuffle, join."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def repeat(x: Tensor, repeats: Sequence[int]) -> Any:
    new = (1,) * (len(repeats) - x.dim())
    shape = [*new, *x.shape]
    if 0 in (*shape, *repeats):
        return NotImplemented
    apart = x.reshape([n for size in shape for n in (1, size)])
    copies = apart.expand([n for pair in zip(repeats, shape, strict=True) for n in pair])
    return copies.clone(memory_format=torch.contiguous_format).view(
        [n * size for n, size in zip(repeats, shape, strict=True)]
    )


def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if not (x.numel() and dims):
        return NotImplemented
    for shift, d in zip(shifts, dims, strict=True):
        size = x.shape[d]
        if first := -shift % size:
            x = torch.cat([x.narrow(d, first, size - first), x.narrow(d, 0, first)], d)
    return x.clone()


def pixel_shuffle(x: Tensor, factor: int) -> Any:
    *rest, c, h, w = x.shape
    x = x.reshape(*rest, c // factor**2, factor, factor, h, w)
    n = len(rest)
    x = x.permute(*range(n + 1), n + 3, n + 1, n + 4, n + 2)
    return x.clone(memory_format=torch.contiguous_format).view(
        *rest, c // factor**2, h * factor, w * factor
    )


def pixel_unshuffle(x: Tensor, factor: int) -> Any:
    *rest, c, h, w = x.shape
    x = x.reshape(*rest, c, h // factor, factor, w // factor, factor)
    n = len(rest)
    x = x.permute(*range(n + 1), n + 2, n + 4, n + 1, n + 3)
    return x.clone(memory_format=torch.contiguous_format).view(
        *rest, c * factor**2, h // factor, w // factor
    )


def channel_shuffle(x: Tensor, groups: int) -> Any:
    n, c, *rest = x.shape
    x = x.reshape(n, groups, c // groups, *rest).transpose(1, 2)
    return x.clone(memory_format=torch.contiguous_format).view(n, c, *rest)


def upsample_nearest(x: Tensor, size: Sequence[int], *scales: float | None) -> Any:
    """Repeat each element a whole number of times."""
    factors = whole_factors(x.shape[2:], size, scales)
    if factors is None or not x.is_contiguous() or not x.numel():
        return NotImplemented
    apart = x.view(*x.shape[:2], *[n for m in x.shape[2:] for n in (m, 1)])
    copies = apart.expand(
        *x.shape[:2], *[n for pair in zip(x.shape[2:], factors, strict=True) for n in pair]
    )
    return copies.clone(memory_format=torch.contiguous_format).view(*x.shape[:2], *size)


def upsample_nearest_backward(
    g: Tensor, size: Sequence[int], shape: Sequence[int], *scales: float | None
) -> Any:
    factors = whole_factors(shape[2:], size, scales)
    if factors is None or not g.is_contiguous() or not g.numel():
        return NotImplemented
    apart = g.view(*shape[:2], *[n for pair in zip(shape[2:], factors, strict=True) for n in pair])
    return apart.sum([3 + 2 * d for d in range(len(factors))])


def whole_factors(
    before: Sequence[int], after: Sequence[int], scales: Sequence[float | None]
) -> list[int] | None:
    """Return how often each element is repeated; None if that is no whole number."""
    pairs = list(zip(before, after, strict=True))
    if any([not n or m % n for n, m in pairs]):
        return None
    factors = [m // n for n, m in pairs]
    same = all([s in (None, f) for s, f in zip(scales, factors, strict=False)])
    return factors if same and math.prod(factors) > 1 else None


def cat(parts: Sequence[Tensor], dim: int = 0) -> Any:
    """Join the parts that are not empty."""
    full = [x for x in parts if x.numel()]
    if len(full) in (0, len(parts)) or len({x.dtype for x in parts}) > 1:
        return NotImplemented
    return torch.cat(full, dim) if len(full) > 1 else full[0].clone()


def cross(x: Tensor, y: Tensor, *, dim: int = -1) -> Any:
    """Multiply vectors of three elements."""
    x, y = torch.broadcast_tensors(x, y)
    (a, b, c), (d, e, f) = x.unbind(dim), y.unbind(dim)
    return torch.stack([b * f - c * e, c * d - a * f, a * e - b * d], dim)

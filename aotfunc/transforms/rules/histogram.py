"""Batch histograms: each sample counts into bins of its own, which follow one another.

The bin of an element is computed as the kernels do it, to the last bit: by a division for
``histc`` and by a search among the edges for the others. The last bin includes its right edge;
elements outside, and NaN, are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batching import all_batched, with_batch
from .reduce import as_vectors
from .schema import aten
from .table import nondiff, vmap_of

nondiff(aten.bincount, aten.histc, aten.histogram.bins_tensor, aten.histogram.bin_ct)
nondiff(
    aten._histogramdd_bin_edges, aten._histogramdd_from_bin_cts, aten._histogramdd_from_bin_tensors
)


def tally(
    at: Tensor, valid: Tensor | None, weight: Tensor | None, bins: Any, like: Tensor
) -> Tensor:
    """Return weights (or ones) ``[B, n]`` summed by bin numbers ``at``: ``[B, bins]``."""
    each = torch.ones_like(at, dtype=like.dtype) if weight is None else weight.to(like.dtype)
    if valid is not None:
        at, each = at.masked_fill(~valid, 0), each.masked_fill(~valid, 0)
    return like.new_zeros(at.shape[0], bins).scatter_add(1, at, each)


@vmap_of(aten.bincount)
def _(
    x: Tensor, weights: Tensor | None, least: Any, *, batched: Any, size: Any, shape: Any
) -> Tensor:
    x = with_batch(x, batched[0], size).long()
    dtype = (
        torch.int64
        if weights is None
        else torch.float32
        if weights.dtype is torch.float32
        else torch.float64
    )
    if weights is not None:
        weights = with_batch(weights, batched[1], size)
    return tally(x, None, weights, shape[0], torch.empty((), dtype=dtype, device=x.device))


# ----- histograms of numbers ---------------------------------------------------------------------


def span(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return both ends ``[B]`` of the bins over a batch of elements: as given; those of the data
    if these are equal; one apart from constant data."""
    if low != high:
        return x.new_full(x.shape[:1], low), x.new_full(x.shape[:1], high)
    least, most = (
        x.aminmax(dim=1)
        if x.shape[1]
        else (x.new_full(x.shape[:1], low), x.new_full(x.shape[:1], high))
    )
    constant = (least == most).to(x.dtype)
    return least - constant, most + constant


def defined(counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Put NaN for a sample whose data has no finite range, where the unbatched op raises."""
    finite = (low.isfinite() & high.isfinite()).reshape(-1, *[1] * (counts.dim() - 1))
    return torch.where(finite, counts, math.nan)


@vmap_of(aten.histc)
def _(x: Tensor, bins: int, low: Any, high: Any) -> Tensor:
    x = as_vectors(x)
    left, right = (end.unsqueeze(1) for end in span(x, low, high))
    at = ((x - left) * bins / (right - left)).long()
    counts = tally(at.clamp(0, bins - 1), (x >= left) & (x <= right), None, bins, x)
    return counts if low != high else defined(counts, left, right)


def spaced(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Return edges ``[B, bins + 1]`` of equal bins, from both ends as ``linspace`` does."""
    low, high = low.unsqueeze(1), high.unsqueeze(1)
    step = (high - low) / bins
    i = torch.arange(bins + 1, device=low.device, dtype=low.dtype)
    return torch.where(i < (bins + 1) // 2, low + step * i, high - step * (bins - i))


def histogram(
    points: Sequence[Tensor], edges: Sequence[Tensor], weight: Tensor | None, density: bool
) -> Tensor:
    """Return a batch of histograms: of coordinates ``[B, n]`` by sorted edges ``[B, k + 1]`` of
    each dimension, weighted; ``[B, *k]``, or with ``density`` integrating to one."""
    at, valid, total = 0, None, 1
    for x, e in zip(points, edges, strict=True):
        bins = e.shape[1] - 1
        inside = (x >= e[:, :1]) & (x <= e[:, -1:])
        number = torch.searchsorted(e.contiguous(), x.contiguous(), right=True) - 1
        at, total = at * bins + number.clamp(0, bins - 1), total * bins
        valid = inside if valid is None else valid & inside
    counts = tally(at, valid, weight, total, points[0])
    counts = counts.reshape(counts.shape[0], *(e.shape[1] - 1 for e in edges))
    if density:
        counts = counts / counts.sum(list(range(1, counts.dim())), keepdim=True)
        for d, e in enumerate(edges):
            width = e.diff(dim=1)
            counts = counts / width.reshape(
                width.shape[0], *[1] * d, -1, *[1] * (len(edges) - d - 1)
            )
    return counts


def ends(points: Sequence[Tensor], given: Sequence[float] | None) -> list[tuple[Tensor, Tensor]]:
    """Return both ends of the bins in each dimension: as given, or those of the data, moved by a
    half if they are equal (by one for ``histc``, see :func:`span`)."""
    found = []
    for d, x in enumerate(points):
        if given is None:
            low, high = (
                x.aminmax(dim=1)
                if x.shape[1]
                else (x.new_zeros(x.shape[:1]), x.new_ones(x.shape[:1]))
            )
        else:
            low, high = (x.new_full(x.shape[:1], end) for end in given[2 * d : 2 * d + 2])
        half = (low == high).to(x.dtype) / 2
        found.append((low - half, high + half))
    return found


def batched_bins(
    points: Sequence[Tensor],
    bins: Sequence[int],
    given: Sequence[float] | None,
    weight: Tensor | None,
    density: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return a batch of histograms with this many equal bins, and their edges."""
    limits = ends(points, given)
    edges = [spaced(*pair, k) for pair, k in zip(limits, bins, strict=True)]
    counts = histogram(points, edges, weight, density)
    for pair in limits if given is None else ():
        counts = defined(counts, *pair)
    return counts, edges


def weight_vectors(weight: Tensor | None, carries: bool, size: Any) -> Tensor | None:
    return None if weight is None else as_vectors(with_batch(weight, carries, size))


@vmap_of(aten.histogram.bin_ct)
def _(x, bins, given, weight, density, *, batched, size) -> Any:
    x = as_vectors(with_batch(x, batched[0], size))
    counts, edges = batched_bins(
        [x], [bins], given, weight_vectors(weight, batched[1], size), density
    )
    return counts, edges[0]


@vmap_of(aten.histogram.bins_tensor)
def _(
    x: Tensor, edges: Tensor, weight: Tensor | None, density: bool, *, batched: Any, size: Any
) -> Any:
    x, edges = as_vectors(with_batch(x, batched[0], size)), with_batch(edges, batched[1], size)
    return histogram([x], [edges], weight_vectors(weight, batched[2], size), density), edges


def coordinates(x: Tensor, carries: bool, size: Any) -> list[Tensor]:
    """Return points ``[*, D]`` as their coordinates, ``[B, n]`` each."""
    x = with_batch(x, carries, size)
    return list(x.reshape(size, -1, x.shape[-1]).unbind(2))


@vmap_of(aten._histogramdd_from_bin_tensors)
def _(
    x: Tensor, edges: Any, weight: Tensor | None, density: bool, *, batched: Any, size: Any
) -> Tensor:
    edges = all_batched(edges, batched[1], size)
    return histogram(
        coordinates(x, batched[0], size), edges, weight_vectors(weight, batched[2], size), density
    )


@vmap_of(aten._histogramdd_from_bin_cts)
def _(x, bins, given, weight, density, *, batched, size) -> Tensor:
    points = coordinates(x, batched[0], size)
    return batched_bins(points, bins, given, weight_vectors(weight, batched[1], size), density)[0]


@vmap_of(aten._histogramdd_bin_edges)
def _(
    x: Tensor, bins: Any, given: Any, weight: Tensor | None, *, batched: Any, size: Any
) -> list[Tensor]:
    points = coordinates(x, batched[0], size)
    return [spaced(*pair, k) for pair, k in zip(ends(points, given), bins, strict=True)]

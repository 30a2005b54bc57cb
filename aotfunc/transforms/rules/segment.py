"""Reductions of segments: their batch, one more leading dimension of the lengths, and their
gradient, by ops that have a derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batching import with_batch
from .scatter import scatter_reduce_back
from .schema import aten
from .table import decompose_as, vmap_of


def contiguous_batch(x: Tensor | None, carries: bool, size: Any) -> Tensor | None:
    """Make a batch contiguous to the last stride: kernels step by those of size 1 too."""
    if x is None:
        return None
    x = with_batch(x, carries, size)
    return x.flatten().view(x.shape)


@vmap_of(aten.segment_reduce)
def _(data, reduce, lengths, indices, offsets, axis, unsafe, initial, *, batched, size) -> Tensor:
    data, lengths, _, offsets = (
        contiguous_batch(t, b, size)
        for t, b in zip((data, lengths, indices, offsets), batched, strict=True)
    )
    how = {"lengths": lengths, "offsets": offsets, "unsafe": unsafe, "initial": initial}
    return aten.segment_reduce(data, reduce, axis=axis + 1, **how)


@vmap_of(aten._segment_reduce_backward)
def _(g, out, data, reduce, lengths, offsets, axis, initial, *, batched, size) -> Tensor:
    g, out, data, lengths, offsets = (
        contiguous_batch(t, b, size)
        for t, b in zip((g, out, data, lengths, offsets), batched, strict=True)
    )
    how = {"lengths": lengths, "offsets": offsets, "initial": initial}
    return aten._segment_reduce_backward(g, out, data, reduce, axis=axis + 1, **how)


#: the name of each reduction for ``scatter_reduce``, and its neutral value
AS_SCATTER = {
    "sum": ("sum", 0),
    "prod": ("prod", 1),
    "max": ("amax", -torch.inf),
    "min": ("amin", torch.inf),
}


def segment_gradient(g, out, data, reduce, lengths=None, offsets=None, axis=0, initial=None):
    """Return the gradient of ``segment_reduce``, which writes each element to the position of its
    segment; elements after the last segment are in none."""
    count = offsets.diff(dim=axis) if lengths is None else lengths
    ends = count.cumsum(axis)
    positions = torch.arange(data.shape[axis], device=data.device).expand(*ends.shape[:-1], -1)
    segment = torch.searchsorted(ends, positions.contiguous(), right=True)
    segment = segment.reshape(*segment.shape, *[1] * (data.dim() - axis - 1)).expand(data.shape)
    inside = segment < ends.shape[-1]
    segment = segment.clamp_max(ends.shape[-1] - 1)
    if reduce == "mean":
        count = count.reshape(*count.shape, *[1] * (data.dim() - axis - 1)).clamp_min(1)
        return (g / count).gather(axis, segment).where(inside, 0)
    name, neutral = AS_SCATTER[reduce]
    start = torch.full_like(out, neutral if initial is None else initial)
    data = data.where(inside, neutral)
    return scatter_reduce_back(g, out, start, axis, segment, data, name)[2].where(inside, 0)


decompose_as(aten._segment_reduce_backward, segment_gradient)

"""Batching of reductions of segments: the samples' lengths become one more leading dimension of the lengths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .batching import with_batch
from .table import aten, vmap_of


@vmap_of(aten.segment_reduce)
def _(
    data: Tensor,
    reduce: str,
    lengths: Tensor | None,
    indices: Tensor | None,
    offsets: Tensor | None,
    axis: int,
    unsafe: bool,
    initial: Any,
    *,
    batched: Any,
    size: Any,
) -> Tensor:
    data, lengths, _, offsets = (
        None if t is None else with_batch(t, b, size)
        for t, b in zip((data, lengths, indices, offsets), batched, strict=True)
    )
    how = {"lengths": lengths, "offsets": offsets, "unsafe": unsafe, "initial": initial}
    return aten.segment_reduce(data, reduce, axis=axis + 1, **how)


@vmap_of(aten._segment_reduce_backward)
def _(
    g: Tensor,
    out: Tensor,
    data: Tensor,
    reduce: str,
    lengths: Tensor | None,
    offsets: Tensor | None,
    axis: int,
    initial: Any,
    *,
    batched: Any,
    size: Any,
) -> Tensor:
    g, out, data, lengths, offsets = (
        None if t is None else with_batch(t, b, size)
        for t, b in zip((g, out, data, lengths, offsets), batched, strict=True)
    )
    how = {"lengths": lengths, "offsets": offsets, "initial": initial}
    return aten._segment_reduce_backward(g, out, data, reduce, axis=axis + 1, **how)

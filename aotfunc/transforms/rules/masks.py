"""Rules of positions in a flattened tensor and of masks: take, put, masked_select and the like."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .batching import align, expand_lead
from .index import batch_index, batch_index_put, index_read
from .schema import aten
from .table import broadcast_shapes, jvp_of, linear

# ----- take and put: positions in the flattened tensor -------------------------------------------


def flatten_samples(x: Tensor, batched: bool) -> Tensor:
    return (
        x.flatten(1)
        if batched and x.dim() > 1
        else x.reshape(x.shape[0], 1)
        if batched
        else x.flatten()
    )


def batch_take(x: Tensor, index: Tensor, *, batched: tuple[bool, bool], size: Any) -> Tensor:
    if not batched[0]:
        return x.take(index)
    return batch_index(flatten_samples(x, True), [index], batched=(True, [batched[1]]), size=size)


def batch_put(
    x: Tensor, index: Tensor, source: Tensor, accumulate: bool, *, batched: Any, size: Any
) -> Tensor:
    shape = x.shape[1:] if batched[0] else x.shape
    x = expand_lead(flatten_samples(x, batched[0]), batched[0], size)
    out = batch_index_put(
        x,
        [flatten_samples(index, batched[1])],
        flatten_samples(source, batched[2]),
        accumulate,
        batched=(True, [batched[1]], batched[2]),
        size=size,
    )
    return out.reshape(size, *shape)


linear(
    aten.take, lambda g, x, index: g.new_zeros(x.shape).put(index, g, True), None, batch=batch_take
)
linear(
    aten.put,
    lambda g, x, index, source, accumulate: (
        g if accumulate else g.put(index, torch.zeros_like(source), False)
    ),
    None,
    lambda g, x, index, source: g.take(index).reshape(source.shape),
    batch=batch_put,
    jointly=True,
)

# ----- masks -------------------------------------------------------------------------------------


def batch_masked_select(
    x: Tensor, mask: Tensor, *, batched: tuple[bool, bool], size: Any, shape: Any
) -> Tensor:
    full = broadcast_shapes(x.shape[batched[0] :], mask.shape[batched[1] :]) or (1,)
    x, mask = (
        align(t, len(full)).expand(size, *full) if b else t.expand(full)
        for t, b in zip((x, mask), batched, strict=True)
    )
    return batch_index(x, [mask], batched=(batched[0], [batched[1]]), size=size, shape=shape)


linear(
    aten.masked_select,
    lambda g, x, mask: g.new_zeros(broadcast_shapes(x.shape, mask.shape)).masked_scatter(mask, g),
    None,
    batch=batch_masked_select,
)


@jvp_of(aten.masked_select)
def _(tangents: Any, out: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    full = broadcast_shapes(x.shape, mask.shape) or (1,)
    return index_read(tangents[0].expand(full), [mask.expand(full)], out.shape)


def count_before(mask: Tensor) -> Tensor:
    """Return, for each true element of each row of ``mask [B, n]``, how many precede it."""
    return mask.cumsum(1) - 1


def batch_masked_scatter(
    x: Tensor, mask: Tensor, source: Tensor, *, batched: Any, size: Any
) -> Tensor:
    x, mask, source = (
        expand_lead(t, b, size) for t, b in zip((x, mask, source), batched, strict=True)
    )
    rank = max(x.dim(), mask.dim()) - 1
    x, mask = torch.broadcast_tensors(align(x, rank), align(mask, rank))
    if source.numel() == 0:
        aten._assert_async.msg(
            mask.logical_not().all(), "masked_scatter: the source has too few elements"
        )
        return x.clone()
    nth = count_before(flatten_samples(mask, True)).clamp_min(0)
    return torch.where(mask, flatten_samples(source, True).gather(1, nth).reshape(x.shape), x)


def batch_masked_scatter_backward(
    g: Tensor, mask: Tensor, sizes: Sequence[Any], *, batched: Any, size: Any
) -> Tensor:
    g, mask = (expand_lead(t, b, size) for t, b in zip((g, mask), batched, strict=True))
    rank = max(g.dim(), mask.dim()) - 1
    g, mask = torch.broadcast_tensors(align(g, rank), align(mask, rank))
    g, mask = flatten_samples(g, True), flatten_samples(mask, True)
    length = prod(sizes)
    # unselected elements go to one extra position, which is dropped
    nth = torch.where(mask, count_before(mask), length)
    return g.new_zeros(size, length + 1).scatter(1, nth, g)[:, :length].reshape(size, *sizes)


linear(
    aten.masked_scatter,
    lambda g, x, mask: g.masked_fill(mask, 0),
    None,
    lambda g, x, mask, source: aten.masked_scatter_backward(g, mask, source.shape),
    batch=batch_masked_scatter,
    jointly=True,
)
linear(
    aten.masked_scatter_backward,
    lambda g, y, mask: g.new_zeros(y.shape).masked_scatter(mask, g),
    None,
    batch=batch_masked_scatter_backward,
)

"""Rules of advanced indexing: index, index_put, and their forms whose positions a mask guards.

Reading transposes to an accumulating write and the other way round. An index that differs between
examples becomes one index more, the number of the example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batching import align, expand_lead
from .places import (
    IndexLayout,
    Indices,
    at_most,
    count_read,
    count_written,
    is_mask,
    masks_numbered,
    numbered_each,
    one_sample,
)
from .schema import aten
from .table import jvp_of, linear, vmap_of


def count_up(size: Any, like: Tensor, rank: int) -> Tensor:
    """Return ``0 .. size - 1`` along dimension 0, followed by ``rank`` dimensions of one."""
    return torch.arange(size, device=like.device).reshape(size, *[1] * rank)


def index_read(x: Tensor, indices: Indices, shape: Sequence[Any]) -> Tensor:
    """Return ``x[indices]``, whose shape is known."""
    count = count_read(indices, shape)
    return aten.index.Tensor(x, indices if count is None else masks_numbered(indices, count))


# ----- index and index_put: NumPy's advanced indexing, see :mod:`.places` ------------------------


def with_example(
    indices: Indices, batched: Sequence[bool], size: Any, places: IndexLayout
) -> list[Any]:
    """Return the indices after one for the number of the example, with which all broadcast."""
    rank = places.rank
    aligned = [
        align(index, rank) if index is not None and b else index
        for index, b in zip(indices, batched, strict=True)
    ]
    like = next(index for index in indices if index is not None)
    return [count_up(size, like, rank), *aligned]


def batch_index(
    x: Tensor, indices: Indices, *, batched: Any, size: Any, shape: Sequence[Any] = ()
) -> Tensor:
    x_batched, index_batched = batched
    if (count := count_read(one_sample(indices, index_batched), shape)) is not None:
        indices, index_batched = numbered_each(indices, index_batched, count)
    places = IndexLayout(indices, index_batched)
    if not any(index_batched) and places.together:
        return aten.index.Tensor(x, [None, *indices])
    if not x_batched:
        aligned = [
            align(i, places.rank) if b else i for i, b in zip(indices, index_batched, strict=True)
        ]
        return aten.index.Tensor(x, aligned).movedim(places.front, 0)
    return places.to_front(
        aten.index.Tensor(x, with_example(indices, index_batched, size, places))
    )


def only_mask(indices: Indices) -> tuple[int, Tensor | None]:
    """Return the position and the boolean mask, if that is the only index."""
    used = [(i, index) for i, index in enumerate(indices) if index is not None]
    return used[0] if len(used) == 1 and is_mask(used[0][1]) else (0, None)


def across_mask(values: Sequence[Any], rest: int, rank: int) -> list[Any] | None:
    """Return a shape in which values written through a mask of ``rank`` dimensions broadcast
    against the whole tensor; None unless all selected elements get the same values. ``rest``
    dimensions follow those of the mask."""
    inner = len(values) - rest
    if inner <= 0:
        return list(values)
    return [*values[: inner - 1], *[1] * rank, *values[inner:]] if values[inner - 1] == 1 else None


def batch_index_put(
    x: Tensor,
    indices: Indices,
    values: Tensor,
    accumulate: bool = False,
    *,
    batched: Any,
    size: Any,
) -> Tensor:
    x_batched, index_batched, values_batched = batched
    front, mask = only_mask(indices)
    if mask is not None and any(index_batched):
        x, values = expand_lead(x, x_batched, size), expand_lead(values, values_batched, size)
        rest = x.dim() - front - mask.dim()
        shape = across_mask(values.shape[1:], rest, mask.dim() - 1)
        if shape is not None:
            mask = mask.reshape(size, *[1] * front, *mask.shape[1:], *[1] * rest).bool()
            values = align(values.reshape(size, *shape), x.dim() - 1)
            return torch.where(mask, x + values if accumulate else values, x)
        x_batched = values_batched = True
    if any(map(is_mask, indices)) and any(index_batched):
        alone = one_sample(indices, index_batched)
        count = count_written(alone, values.shape[values_batched:], x.dim() - x_batched)
        if count is None:
            return put_one_for_all(x, indices, values, accumulate, batched, size)
        for mask, b in zip(indices, index_batched, strict=True):
            if b and mask is not None and is_mask(mask):
                selected = mask.flatten(1).count_nonzero(1)
                fits = selected == count.number
                fits = fits | (selected == 1) if count.repeated else fits
                text = f"{count.number} elements are written where a mask selects others"
                aten._assert_async.msg(fits.all(), text)
        indices, index_batched = numbered_each(indices, index_batched, count)
    places = IndexLayout(indices, index_batched)
    x = expand_lead(x, x_batched, size)
    rank = places.result_rank(x.dim() - 1)
    if values_batched:
        values = align(values, rank)
    if not any(index_batched) and places.together:
        return aten.index_put(x, [None, *indices], values, accumulate)
    if places.front:
        values = places.from_front(values if values_batched else align(values.unsqueeze(0), rank))
    return aten.index_put(
        x, with_example(indices, index_batched, size, places), values, accumulate
    )


def put_one_for_all(
    x: Tensor, indices: Indices, values: Tensor, accumulate: bool, batched: Any, size: Any
) -> Tensor:
    """Write one value to all elements that masks, beside other indices, select: to as many
    positions as they may select, the surplus of which repeat the first."""
    x_batched, index_batched, values_batched = batched
    count, there = at_most(indices, index_batched)
    each = there.dim() == 2
    indices, index_batched = numbered_each(indices, index_batched, count)
    places = IndexLayout(indices, index_batched)
    rank = places.result_rank(x.dim() - x_batched)
    if values_batched:
        values = align(values, rank)
    written = along_positions(there if accumulate else there[..., :1], places, rank)
    now = (
        0 if accumulate else batch_index(x, indices, batched=(x_batched, index_batched), size=size)
    )
    values = torch.where(align(written, rank) if each else written, values, now)
    batched = x_batched, index_batched, values_batched or each or not accumulate
    return batch_index_put(x, indices, values, accumulate, batched=batched, size=size)


def along_positions(there: Tensor, places: IndexLayout, rank: int) -> Tensor:
    """Shape ``there [(B,) n]`` along the last index dimension of a result of ``rank``."""
    return there.reshape(*there.shape, *[1] * (rank - places.front - places.rank))


def put_back(g: Tensor, x: Tensor, indices: Any, values: Tensor, accumulate: bool) -> Tensor:
    if accumulate:
        return g
    if only_mask(indices)[1] is None:
        indices = where_written(x, indices, values)
    # masks of bytes are deprecated, and one number is not written through them
    indices = [i.bool() if is_mask(i) else i for i in indices]
    return aten.index_put(g, indices, g.new_zeros(()), False)


def where_written(x: Tensor, indices: Indices, values: Tensor) -> Indices:
    """Return the indices, masks as positions if the written values tell how many they select."""
    if (
        not any(map(is_mask, indices))
        or (count := count_written(indices, values.shape, x.dim())) is None
    ):
        return indices
    return masks_numbered(indices, count)


def put_values_back(g: Tensor, x: Tensor, indices: Any, values: Tensor) -> Tensor:
    front, mask = only_mask(indices)
    if mask is not None:
        rest = x.dim() - front - mask.dim()
        shape = across_mask(values.shape, rest, mask.dim())
        if shape is not None:  # this needs no number of selected elements
            selected = mask.reshape(*mask.shape, *[1] * rest).bool()
            return torch.where(selected, g, 0).sum_to_size(shape).reshape(values.shape)
    numbers = where_written(x, indices, values)
    if not any(map(is_mask, numbers)):
        return aten.index.Tensor(g, numbers)
    unbatched = [False] * len(indices)
    count, there = at_most(indices, unbatched)
    numbers = masks_numbered(indices, count)
    found = aten.index.Tensor(g, numbers)
    return torch.where(
        along_positions(there, IndexLayout(numbers, unbatched), found.dim()), found, 0
    ).sum_to_size(values.shape)


for op in (aten.index.Tensor, aten._unsafe_index.Tensor):
    linear(
        op,
        lambda g, x, indices: aten.index_put(g.new_zeros(x.shape), indices, g, True),
        None,
        batch=batch_index,
    )


@jvp_of(aten.index.Tensor, aten._unsafe_index.Tensor)
def _(tangents: Any, out: Tensor, x: Tensor, indices: Any) -> Tensor:
    return index_read(tangents[0], indices, out.shape)


for op in (aten.index_put, aten._unsafe_index_put, aten._index_put_impl):
    linear(op, put_back, None, put_values_back, batch=batch_index_put, jointly=True)

# ----- masked indexing: positions may be out of range where the mask is false --------------------


def in_range(x: Tensor, indices: Indices, batched: bool) -> list[Tensor | None]:
    return [
        i if i is None else i.clamp(-s, s - 1)
        for s, i in zip(x.shape[batched:], indices, strict=False)
    ]


linear(
    aten._unsafe_masked_index,
    lambda g, x, mask, indices: aten._unsafe_masked_index_put_accumulate(
        g.new_zeros(x.shape), mask, indices, g
    ),
    None,
    None,
)
linear(
    aten._unsafe_masked_index_put_accumulate,
    lambda g, *_: g,
    None,
    None,
    lambda g, x, mask, indices: aten._unsafe_masked_index(g, mask, indices, 0),
    jointly=True,
)


@jvp_of(aten._unsafe_masked_index)
def _(tangents: Any, out: Tensor, x: Tensor, mask: Tensor, indices: Any) -> Tensor:
    return aten._unsafe_masked_index(tangents[0], mask, indices, 0)


@vmap_of(aten._unsafe_masked_index)
def _(x: Tensor, mask: Tensor, indices: Any, fill: Any, *, batched: Any, size: Any) -> Tensor:
    if batched[0] or any(batched[2]):
        x = batch_index(
            x, in_range(x, indices, batched[0]), batched=(batched[0], batched[2]), size=size
        )
    else:
        x = aten.index.Tensor(x, in_range(x, indices, False)).expand(
            size, *[-1] * (mask.dim() - 1)
        )
    return torch.where(align(mask, x.dim() - 1) if batched[1] else mask, x, fill)


@vmap_of(aten._unsafe_masked_index_put_accumulate)
def _(x: Tensor, mask: Tensor, indices: Any, values: Tensor, *, batched: Any, size: Any) -> Tensor:
    both = batched[1], batched[3]
    rank = max(t.dim() - b for t, b in zip((mask, values), both, strict=True))
    mask, values = (align(t, rank) if b else t for t, b in zip((mask, values), both, strict=True))
    return batch_index_put(
        x,
        in_range(x, indices, batched[0]),
        torch.where(mask, values, values.new_zeros(())),
        True,
        batched=(batched[0], batched[2], any(both)),
        size=size,
    )

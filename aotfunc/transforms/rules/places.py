"""The layout of advanced indices' results, and boolean indices as vectors of positions.

How many elements a mask selects is known here from the shape of a result, or of written values; an
op that asks for it would have to look at the values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schema import aten

Indices = Sequence[Tensor | None]


def is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class IndexLayout:
    """The layout of advanced indices in the unbatched op: NumPy's.

    The indexed dimensions are replaced, at the place of the first, by the broadcast shape of the
    indices; if other dimensions lie between the indexed ones, that shape comes first of all."""

    def __init__(self, indices: Indices, batched: Sequence[bool]):
        used = {i: index for i, index in enumerate(indices) if index is not None}
        mask = {i for i, index in used.items() if is_mask(index)}
        at = list(used)
        #: rank of the broadcast indices (a mask is as many vectors of positions as it has
        #: dimensions)
        self.rank = max(
            (1 if i in mask else index.dim() - batched[i] for i, index in used.items()), default=0
        )
        #: number of indexed dimensions of the tensor
        self.taken = sum(index.dim() if i in mask else 1 for i, index in used.items())
        self.together = not at or at[-1] - at[0] + 1 == len(at)
        #: number of dimensions before the indices in the result
        self.front = at[0] if at and self.together else 0

    def result_rank(self, rank: int) -> int:
        """Return the rank of the result of indexing a tensor of ``rank``."""
        return rank - self.taken + self.rank

    def to_front(self, x: Tensor) -> Tensor:
        """Return ``[B, indices, front, rest] -> [B, front, indices, rest]``."""
        return x.movedim(
            list(range(1, self.rank + 1)), list(range(self.front + 1, self.front + self.rank + 1))
        )

    def from_front(self, x: Tensor) -> Tensor:
        """Return ``[B, front, indices, rest] -> [B, indices, front, rest]``."""
        return x.movedim(
            list(range(self.front + 1, self.front + self.rank + 1)), list(range(1, self.rank + 1))
        )


# ----- masks as positions ------------------------------------------------------------------------


class Count(NamedTuple):
    """How many elements an index's masks select; ``repeated``: one may stand for all."""

    number: Any
    repeated: bool


def one_sample(indices: Indices, batched: Sequence[bool]) -> list[Tensor | None]:
    """Return the indices of one example, for their shapes."""
    return [
        i.new_empty(i.shape[1:]) if b and i is not None else i
        for i, b in zip(indices, batched, strict=True)
    ]


def widths(indices: Indices) -> list[Any]:
    """Return the lengths but one at which the other indices meet a mask's positions."""
    return [
        i.shape[-1]
        for i in indices
        if i is not None and not is_mask(i) and i.dim() and i.shape[-1] != 1
    ]


def count_read(indices: Indices, shape: Sequence[Any]) -> Count | None:
    """Count the elements that the masks among the (unbatched) indices select if the result has
    this shape; ``None`` without a mask."""
    masks = sum(map(is_mask, indices))
    if not masks:
        return None
    places = IndexLayout(indices, [False] * len(indices))
    return Count(shape[places.front + places.rank - 1], masks > 1 or bool(widths(indices)))


def count_written(indices: Indices, values: Sequence[Any], rank: int) -> Count | None:
    """Count the elements that the masks among the (unbatched) indices of a tensor of ``rank``
    select if values of this shape are written there; ``None`` if one value is written to all."""
    if found := widths(indices):
        return Count(found[0], True)
    places = IndexLayout(indices, [False] * len(indices))
    at = len(values) - (places.result_rank(rank) - (places.front + places.rank - 1))
    return (
        Count(values[at], sum(map(is_mask, indices)) > 1) if at >= 0 and values[at] != 1 else None
    )


def at_most(indices: Indices, batched: Sequence[bool]) -> tuple[Count, Tensor]:
    """Return, for masks that select an unknown number of elements, the most that these may be, and
    which of these positions exist, ``[count]`` or ``[B, count]``."""
    masks = [(i, b) for i, b in zip(indices, batched, strict=True) if i is not None and is_mask(i)]
    count = max(prod(i.shape[b:]) for i, b in masks)
    selected = [
        i.flatten(1).count_nonzero(1).unsqueeze(1) if b else i.count_nonzero() for i, b in masks
    ]
    place = torch.arange(count, device=masks[0][0].device)
    there = place < functools.reduce(torch.maximum, selected)
    for n in selected if len(masks) > 1 else ():
        there = there & (n > 0)
    return Count(count, True), there


def masks_numbered(indices: Indices, count: Count) -> list[Tensor | None]:
    """Return the indices of the unbatched op, masks as vectors of positions."""
    return numbered_each(indices, [False] * len(indices), count)[0]


def numbered_each(
    indices: Indices, batched: Sequence[bool], count: Count
) -> tuple[list[Tensor | None], list[bool]]:
    """Return the indices and which are batched, masks as one vector of positions ``[count]``, or
    ``[B, count]`` of each example, for each of their dimensions."""
    found: list[tuple[Tensor | None, bool]] = []
    for index, b in zip(indices, batched, strict=True):
        if index is None or not is_mask(index):
            found.append((index, b))
            continue
        if b:
            columns = columns_each(index, count.number, exact=not count.repeated)
        else:
            columns = list(aten.nonzero_static(index, size=count.number).unbind(1))
        if count.repeated:
            columns = [torch.where(c < 0, c[..., :1], c) for c in columns]
        found += [(c, b) for c in columns]
    return [i for i, _ in found], [b for _, b in found]


def columns_each(x: Tensor, length: Any, fill: int = -1, exact: bool = False) -> list[Tensor]:
    """Return columns ``[B, length]`` of ``nonzero_static``; ``exact``: each has as many."""
    if not length or not x.numel():
        return [torch.full((x.shape[0], length), fill, device=x.device)] * (x.dim() - 1)
    found = x if x.dtype == torch.bool else x != 0
    found = found.flatten(1) if x.dim() > 1 else found.unsqueeze(1)
    # the true ones first, in order
    order = torch.argsort(found, dim=1, descending=True, stable=True)
    columns, stride = [], 1
    if exact:
        order = order.narrow(1, 0, length)
    else:
        order = torch.nn.functional.pad(order, (0, length - order.shape[1]))  # or cuts off
        there = torch.arange(length, device=x.device) < found.sum(1, keepdim=True)
    for d in reversed(range(1, x.dim())):
        column = order if stride == 1 else order.div(stride, rounding_mode="floor")
        column = column if d == 1 else column % x.shape[d]
        columns.append(column if exact else torch.where(there, column, fill))
        stride *= x.shape[d]
    return columns[::-1]


def nonzero_each(x: Tensor, length: Any, fill: int = -1) -> Tensor:
    """Return ``nonzero_static`` for each example: ``[B, length, rank]``."""
    columns = columns_each(x, length, fill)
    return (
        torch.stack(columns, 2)
        if columns
        else x.new_zeros((x.shape[0], length, 0), dtype=torch.int64)
    )

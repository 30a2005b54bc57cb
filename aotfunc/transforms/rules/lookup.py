"""Rules of tables and sorted sequences: embedding, searchsorted, bucketize, and positions of
nonzero elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batching import expand_lead
from .index import count_up
from .places import nonzero_each
from .schema import aten
from .table import linear, nondiff, refuse_sparse, vmap_of

# ----- embedding ---------------------------------------------------------------------------------


def rows_of_all(index: Tensor, table: Any, none: Any) -> Tensor:
    """Return row numbers ``[B, …]`` of tables of ``table`` rows as those of one table of them all.
    A number of no row, which would be in another sample's table, becomes ``none``."""
    moved = index + count_up(index.shape[0], index, index.dim() - 1) * table
    return torch.where(index.clamp(0, table - 1) == index, moved, none)


def check_rows(index: Tensor, table: Any) -> None:
    """Refuse indices of no row, before a kernel that counts how often each occurs."""
    aten._assert_async.msg((index.clamp(0, table - 1) == index).all(), "index out of range")


@vmap_of(aten.embedding)
def _(weight, indices, padding_idx, by_freq, sparse, *, batched, size) -> Tensor:
    weight_batched, indices_batched = batched
    if not weight_batched and not by_freq:
        return aten.embedding(weight, indices, padding_idx)
    weight = expand_lead(weight, weight_batched, size)
    if indices_batched and padding_idx < 0:  # one table of all the examples' rows
        rows = rows_of_all(indices, weight.shape[1], size * weight.shape[1])
        return aten.embedding(weight.flatten(0, 1), rows, padding_idx, by_freq)
    # one table of all the examples' columns, since the padding row of each must keep its number
    out = aten.embedding(weight.movedim(0, 1).flatten(1), indices, padding_idx, by_freq)
    out = out.unflatten(-1, (size, weight.shape[2]))
    return (
        out.diagonal(0, 0, out.dim() - 2).movedim(-1, 0) if indices_batched else out.movedim(-2, 0)
    )


def embedding_back(
    g: Tensor, weight: Tensor, indices: Tensor, pad: Any, by_freq: bool, sparse: bool
) -> Tensor:
    refuse_sparse(sparse)
    if by_freq:
        check_rows(indices, weight.shape[0])
    return aten.embedding_dense_backward(g, indices, weight.shape[0], pad, by_freq)


linear(aten.embedding, embedding_back, None)


def embedding_dense_back(
    g: Tensor, y: Tensor, indices: Tensor, rows: Any, padding_idx: Any, by_freq: bool
) -> Tensor:
    """Return the result of PyTorch's formula, which ignores frequencies in second derivatives."""
    out = aten.index.Tensor(g, [indices])
    return out if padding_idx < 0 else out.masked_fill((indices == padding_idx).unsqueeze(-1), 0)


def batch_embedding_dense_backward(
    g, indices, rows, padding_idx, by_freq, *, batched, size
) -> Tensor:
    width = g.shape[-1]
    if not batched[1]:
        out = aten.embedding_dense_backward(
            g.movedim(0, -2).flatten(-2), indices, rows, padding_idx, by_freq
        )
        return out.unflatten(1, (size, width)).movedim(1, 0)
    g = expand_lead(g, batched[0], size)
    if padding_idx >= 0:
        g = g.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    indices = rows_of_all(indices, rows, -1)
    out = aten.embedding_dense_backward(g, indices, rows * size, -1, by_freq)
    return out.unflatten(0, (size, rows))


linear(
    aten.embedding_dense_backward, embedding_dense_back, None, batch=batch_embedding_dense_backward
)


# ----- positions: no derivative ------------------------------------------------------------------

nondiff(
    aten.searchsorted.Tensor,
    aten.searchsorted.Scalar,
    aten.bucketize.Tensor,
    aten.bucketize.Scalar,
)
nondiff(aten.nonzero_static, aten.nonzero)


@vmap_of(aten.searchsorted.Tensor)
def batch_searchsorted(row, x, int32, right, side, sorter, *, batched, size) -> Tensor:
    shape = x.shape if batched[1] else (size, *x.shape)
    if row.dim() - batched[0] > 1:  # a sequence for each row of x
        row, x = expand_lead(row, batched[0], size), expand_lead(x, batched[1], size)
        sorter = None if sorter is None else expand_lead(sorter, batched[2], size)
    elif batched[0] or (sorter is not None and batched[2]):  # a sequence for each example
        row = expand_lead(row, batched[0], size)
        x = expand_lead(x, batched[1], size).reshape(size, -1)
        sorter = None if sorter is None else expand_lead(sorter, batched[2], size).contiguous()
    found = torch.searchsorted(
        row.contiguous(), x.contiguous(), out_int32=int32, right=right, side=side, sorter=sorter
    )
    return found.reshape(shape)


@vmap_of(aten.searchsorted.Scalar)
def _(row: Tensor, x: Any, *how: Any, batched: Any, size: Any) -> Tensor:
    number, batched = torch.full((), x, device=row.device), (batched[0], False, *batched[1:])
    return batch_searchsorted(row, number, *how, batched=batched, size=size)


@vmap_of(aten.bucketize.Tensor)
def _(
    x: Tensor, boundaries: Tensor, int32: bool, right: bool, *, batched: Any, size: Any
) -> Tensor:
    batched = (batched[1], batched[0])
    return batch_searchsorted(boundaries, x, int32, right, None, None, batched=batched, size=size)


@vmap_of(aten.bucketize.Scalar)
def _(x: Any, boundaries: Tensor, int32: bool, right: bool, *, size: Any) -> Tensor:
    number, how = torch.full((), x, device=boundaries.device), (int32, right, None, None)
    return batch_searchsorted(boundaries, number, *how, batched=(True, False), size=size)


vmap_of(aten.nonzero_static)(nonzero_each)


@vmap_of(aten.nonzero)
def _(x: Tensor, *, shape: Any) -> Tensor:
    return nonzero_each(x, shape[0])


nondiff(aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar)


@vmap_of(aten.isin.Tensor_Tensor)
def _(x: Tensor, tests: Tensor, unique: bool, invert: bool, *, batched: Any, size: Any) -> Tensor:
    if not batched[1]:
        return torch.isin(x, tests, invert=invert)
    x = expand_lead(x, batched[0], size)
    row = tests.reshape(size, *[1] * (x.dim() - 1), tests[0].numel())
    return (x.unsqueeze(-1) != row).all(-1) if invert else (x.unsqueeze(-1) == row).any(-1)


@vmap_of(aten.isin.Tensor_Scalar)
def _(x: Tensor, test: Any, unique: bool, invert: bool) -> Tensor:
    return torch.isin(x, test, invert=invert)

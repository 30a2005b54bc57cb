"""Tables and sorted sequences: embedding, searchsorted, bucketize, and the positions of what is not zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .index import count_up
from .places import nonzero_each
from .table import (
    aten,
    expand_lead,
    jvp_of,
    linear,
    nondiff,
    total,
    vjp_of,
    vmap_of,
)

# ----- embedding ------------------------------------------------------------------------------------------------------


@vmap_of(aten.embedding)
def _(
    weight: Tensor, indices: Tensor, padding_idx: Any, by_freq: bool, sparse: bool, *, batched: Any, size: Any
) -> Tensor:
    weight_batched, indices_batched = batched
    if not weight_batched and not by_freq:
        return aten.embedding(weight, indices, padding_idx)
    weight = expand_lead(weight, weight_batched, size)
    if indices_batched and padding_idx < 0:  # one table of all the examples' rows
        start = count_up(size, indices, indices.dim() - 1) * weight.shape[1]
        return aten.embedding(weight.flatten(0, 1), indices + start, padding_idx, by_freq)
    # one table of all the examples' columns, since the padding row of each must keep its number
    out = aten.embedding(weight.movedim(0, 1).flatten(1), indices, padding_idx, by_freq)
    out = out.unflatten(-1, (size, weight.shape[2]))
    return out.diagonal(0, 0, out.dim() - 2).movedim(-1, 0) if indices_batched else out.movedim(-2, 0)


linear(
    aten.embedding,
    lambda g, weight, indices, pad, by_freq: aten.embedding_dense_backward(g, indices, weight.shape[0], pad, by_freq),
    None,
)


def embedding_dense_back(g: Tensor, y: Tensor, indices: Tensor, rows: Any, padding_idx: Any, by_freq: bool) -> Tensor:
    out = aten.index.Tensor(g, [indices])
    if by_freq:
        count = g.new_zeros(rows).index_put((indices,), g.new_ones(()), True)
        out = out / aten.index.Tensor(count, [indices]).unsqueeze(-1)
    return out if padding_idx < 0 else out.masked_fill((indices == padding_idx).unsqueeze(-1), 0)


def batch_embedding_dense_backward(
    g: Tensor, indices: Tensor, rows: Any, padding_idx: Any, by_freq: bool, *, batched: Any, size: Any
) -> Tensor:
    width = g.shape[-1]
    if not batched[1]:
        out = aten.embedding_dense_backward(g.movedim(0, -2).flatten(-2), indices, rows, padding_idx, by_freq)
        return out.unflatten(1, (size, width)).movedim(1, 0)
    g = expand_lead(g, batched[0], size)
    if padding_idx >= 0:
        g = g.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    start = count_up(size, indices, indices.dim() - 1) * rows
    return aten.embedding_dense_backward(g, indices + start, rows * size, -1, by_freq).unflatten(0, (size, rows))


linear(aten.embedding_dense_backward, embedding_dense_back, None, batch=batch_embedding_dense_backward)


# ----- bags of embeddings ---------------------------------------------------------------------------------------------


def bag_of_each(indices: Tensor, offsets: Tensor, last: bool) -> Tensor:
    """The bag that each index is in. (What the kernel leaves behind says it too, but not in all of its cases.)"""
    begins = offsets[:-1] if last else offsets
    number = torch.arange(indices.shape[0], device=indices.device, dtype=begins.dtype)
    return torch.searchsorted(begins.contiguous(), number, right=True) - 1


def bag_sizes(indices: Tensor, bag: Tensor, bags: Any, padding_idx: int) -> Tensor:
    """How many indices each bag has, padding not counted."""
    real = torch.ones_like(bag) if padding_idx < 0 else (indices != padding_idx).to(bag.dtype)
    return bag.new_zeros(bags).scatter_add(0, bag, real)


@vjp_of(aten._embedding_bag, aten._embedding_bag_forward_only, diff_outputs=(0,))
def _(
    g: Any,
    out: Any,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    by_freq: bool,
    mode: int,
    sparse: bool,
    weights: Tensor | None,
    last: bool,
    padding_idx: int,
    *,
    needs: Any,
) -> list[Tensor | None]:
    """By ops that have derivatives of their own, which the reverse kernels do not."""
    g = g[0]
    bag = bag_of_each(indices, offsets, last)
    count = bag_sizes(indices, bag, g.shape[0], padding_idx)
    of_weight = of_weights = None
    if mode == 2:
        some = count.unsqueeze(-1) > 0
        largest = aten._embedding_bag(weight, indices, offsets, by_freq, mode, False, weights, last, padding_idx)[3]
        of_weight = torch.zeros_like(weight).scatter_add(0, largest * some, g * some)
        return [of_weight, None, None, None]
    rows = (g / count.clamp_min(1).unsqueeze(-1) if mode == 1 else g).index_select(0, bag)
    if needs[0] and by_freq:  # which frequency divides which row is the kernel's own affair
        how = (weight.shape[0], by_freq, mode, weights, padding_idx)
        of_weight = aten._embedding_bag_dense_backward(g, indices, bag, count, count, *how)
    elif needs[0]:
        scaled = rows if weights is None else rows * weights.unsqueeze(-1)
        of_weight = aten.embedding_dense_backward(scaled, indices, weight.shape[0], padding_idx, False)
    if len(needs) > 3 and needs[3]:
        of_weights = (rows * weight.index_select(0, indices)).sum(-1)
        if padding_idx >= 0:
            of_weights = of_weights.masked_fill(indices == padding_idx, 0)
    return [of_weight, None, None, of_weights]


@jvp_of(aten._embedding_bag, aten._embedding_bag_forward_only)
def _(
    tangents: Any,
    out: Any,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    by_freq: bool,
    mode: int,
    sparse: bool,
    weights: Tensor | None,
    last: bool,
    padding_idx: int,
) -> Any:
    """Linear in the table and in the weights, but for the largest rows (mode 2), which are read where they are."""
    of_table, of_weights = tangents[0], tangents[3]
    rest = (last, padding_idx)
    if mode == 2:
        bag = bag_of_each(indices, offsets, last)
        some = bag_sizes(indices, bag, out[0].shape[0], padding_idx).unsqueeze(-1) > 0
        largest = aten._embedding_bag(weight, indices, offsets, by_freq, mode, False, weights, *rest)[3]
        return of_table.gather(0, largest * some) * some, None, None, None
    terms = []
    if of_table is not None:
        terms.append(aten._embedding_bag(of_table, indices, offsets, by_freq, mode, False, weights, *rest)[0])
    if of_weights is not None:
        terms.append(aten._embedding_bag(weight, indices, offsets, by_freq, mode, False, of_weights, *rest)[0])
    return total(terms), None, None, None


# ----- positions: no derivative ---------------------------------------------------------------------------------------

nondiff(aten.searchsorted.Tensor, aten.searchsorted.Scalar, aten.bucketize.Tensor, aten.bucketize.Scalar)
nondiff(aten.nonzero_static, aten.nonzero)


@vmap_of(aten.searchsorted.Tensor)
def _(
    row: Tensor, x: Tensor, int32: bool, right: bool, side: Any, sorter: Tensor | None, *, batched: Any, size: Any
) -> Tensor:
    how = {"out_int32": int32, "right": right, "side": side}
    shape = x.shape if batched[1] else (size, *x.shape)
    if row.dim() - batched[0] > 1:  # a sequence for each row of x
        row, x = expand_lead(row, batched[0], size), expand_lead(x, batched[1], size)
        sorter = None if sorter is None else expand_lead(sorter, batched[2], size)
    elif batched[0] or (sorter is not None and batched[2]):  # a sequence for each example
        row, x = expand_lead(row, batched[0], size), expand_lead(x, batched[1], size).reshape(size, -1)
        sorter = None if sorter is None else expand_lead(sorter, batched[2], size).contiguous()
    return torch.searchsorted(row.contiguous(), x.contiguous(), sorter=sorter, **how).reshape(shape)


@vmap_of(aten.searchsorted.Scalar)
def _(
    row: Tensor, x: Any, int32: bool, right: bool, side: Any, sorter: Tensor | None, *, batched: Any, size: Any
) -> Tensor:
    value = torch.full((size, 1), x, device=row.device)
    row = expand_lead(row, batched[0], size).contiguous()
    sorter = None if sorter is None else expand_lead(sorter, batched[1], size).contiguous()
    return torch.searchsorted(row, value, out_int32=int32, right=right, side=side, sorter=sorter).reshape(size)


@vmap_of(aten.bucketize.Tensor)
def _(x: Tensor, boundaries: Tensor, int32: bool, right: bool, *, batched: Any, size: Any) -> Tensor:
    if not batched[1]:
        return torch.bucketize(x, boundaries, out_int32=int32, right=right)
    x = expand_lead(x, batched[0], size)
    flat_x = x.reshape(size, -1).contiguous()
    return torch.searchsorted(boundaries.contiguous(), flat_x, out_int32=int32, right=right).reshape(x.shape)


@vmap_of(aten.bucketize.Scalar)
def _(x: Any, boundaries: Tensor, int32: bool, right: bool) -> Tensor:
    value = torch.full((boundaries.shape[0], 1), x, device=boundaries.device)
    return torch.searchsorted(boundaries.contiguous(), value, out_int32=int32, right=right).squeeze(1)


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

"""Rules of bags of embeddings.

A batch is the samples' tables one below the other, and their bags one after another.

A call for a whole batch reads rows of one table of ``B * R`` rows, at indices shifted by ``R``
from sample to sample. The padding row must keep one number for all samples: they use that of the
first, which is not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batching import all_batched
from .lookup import check_rows, count_up, rows_of_all
from .schema import aten
from .table import jvp_of, refuse_sparse, total, vjp_of, vmap_of


def lined_up(index: Tensor, step: Any) -> Tensor:
    """Return numbers ``[B, n]`` as ``[B * n]``; sample b's are increased by ``b * step``."""
    return (index + count_up(index.shape[0], index, 1) * step).flatten()


def table_rows(index: Tensor, table: Any, padding_idx: int) -> Tensor:
    """Return row numbers ``[B, n]`` of tables of ``table`` rows as row numbers ``[B * n]`` of one
    table of them all; a number of no row becomes one beyond its end."""
    moved = rows_of_all(index, table, index.shape[0] * table).flatten()
    return (
        moved
        if padding_idx < 0
        else torch.where(index.flatten() == padding_idx, padding_idx, moved)
    )


def starts(offsets: Tensor, n: Any, last: bool) -> Tensor:
    """Return where all samples' bags begin, with ``last`` also where the last ends."""
    if not last:
        return lined_up(offsets, n)
    return torch.cat([lined_up(offsets[:, :-1], n), offsets[-1:, -1] + n * (offsets.shape[0] - 1)])


def bag_of_each(indices: Tensor, begins: Tensor) -> Tensor:
    """Return the bag of each index. (A result of the kernel has it too, but not in all cases.)"""
    number = torch.arange(indices.shape[-1], device=indices.device, dtype=begins.dtype)
    number = number.expand(indices.shape).contiguous()
    return torch.searchsorted(begins.contiguous(), number, right=True) - 1


def bag_sizes(indices: Tensor, bag: Tensor, bags: Any, padding_idx: int) -> Tensor:
    """Return how many indices each bag has without padding."""
    real = torch.ones_like(bag) if padding_idx < 0 else (indices != padding_idx).to(bag.dtype)
    return bag.new_zeros(*bag.shape[:-1], bags).scatter_add(-1, bag, real)


@vmap_of(aten._embedding_bag, aten._embedding_bag_forward_only)
def _(
    weight,
    indices,
    offsets,
    by_freq,
    mode,
    sparse,
    weights,
    last,
    padding_idx,
    *,
    batched,
    size,
    shape,
) -> Any:
    weight, indices, offsets, weights = all_batched(
        (weight, indices, offsets, weights), batched, size
    )
    table, n, bags = weight.shape[1], indices.shape[1], shape[0][0]
    flat = None if weights is None else weights.flatten()
    where = (table_rows(indices, table, padding_idx), starts(offsets, n, last))
    out, _, _, largest = aten._embedding_bag(
        weight.flatten(0, 1), *where, by_freq, mode, False, flat, last, padding_idx
    )
    # The shapes of what the kernel saves depend on its arguments: compute it here.
    bag_of = bag_of_each(indices, offsets[:, :bags])
    count = bag_sizes(indices, bag_of, bags, padding_idx)
    if mode == 2:  # an empty bag has no largest rows, only zeros
        largest = largest.unflatten(0, (size, bags)) - count_up(size, largest, 2) * table
        largest = torch.where(count.unsqueeze(-1) > 0, largest, 0)
    else:
        largest = largest.new_zeros(size, *shape[3])
    count = torch.nn.functional.pad(count, (0, shape[2][0] - bags))
    return (
        out.unflatten(0, (size, bags)),
        bag_of[:, : shape[1][0]].to(indices.dtype),  # empty if the kernel needs none
        count.to(indices.dtype),
        largest,
    )


@vmap_of(aten._embedding_bag_dense_backward)
def _(
    g,
    indices,
    bag_of,
    count,
    largest,
    table,
    by_freq,
    mode,
    weights,
    padding_idx,
    *,
    batched,
    size,
) -> Tensor:
    if not any(batched[1:]):  # the samples' rows side by side
        width = g.shape[2]
        g = g.movedim(0, 1).flatten(1)
        if mode == 2:
            largest = largest.repeat(1, size)
        out = aten._embedding_bag_dense_backward(
            g, indices, bag_of, count, largest, table, by_freq, mode, weights, padding_idx
        )
        return out.unflatten(1, (size, width)).movedim(1, 0)
    # the kernel divides by counts in an order that only a call of its own has: the walker loops
    if by_freq:
        return NotImplemented
    g, *kept, weights = all_batched((g, indices, bag_of, count, largest, weights), batched, size)
    indices, bag_of, count, largest = kept
    bags = g.shape[1]
    if mode == 2:
        largest = (largest + count_up(size, largest, 2) * table).flatten(0, 1)
    out = aten._embedding_bag_dense_backward(
        g.flatten(0, 1),
        table_rows(indices, table, padding_idx),
        lined_up(bag_of, bags),
        count[:, :bags].flatten(),
        largest if mode == 2 else largest.flatten(),
        table * size,
        by_freq,
        mode,
        None if weights is None else weights.flatten(),
        padding_idx,
    )
    return out.unflatten(0, (size, table))


@vmap_of(aten._embedding_bag_per_sample_weights_backward)
def _(g, weight, indices, offsets, bag_of, mode, padding_idx, *, batched, size) -> Tensor:
    g, weight, indices, offsets, bag_of = all_batched(
        (g, weight, indices, offsets, bag_of), batched, size
    )
    table, n, bags = weight.shape[1], indices.shape[1], g.shape[1]
    out = aten._embedding_bag_per_sample_weights_backward(
        g.flatten(0, 1),
        weight.flatten(0, 1),
        table_rows(indices, table, padding_idx),
        starts(offsets, n, False),
        lined_up(bag_of, bags),
        mode,
        padding_idx,
    )
    return out.unflatten(0, (size, n))


@vmap_of(aten.embedding_renorm)
def _(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    table = weight.shape[1]
    rows = table_rows(indices.flatten(1), table, -1)
    out = aten.embedding_renorm(weight.flatten(0, 1), rows, max_norm, norm_type)
    return out.unflatten(0, (weight.shape[0], table))


# ----- derivatives -------------------------------------------------------------------------------


def largest_rows(weight: Tensor, bags: Any, *args: Any) -> tuple[Tensor, Tensor]:
    """Return, for each bag and each column, the table's row with the largest entry, and whether
    the bag has any row; ``args`` are the op's."""
    indices, offsets, _, _, _, _, last, padding_idx = args
    bag = bag_of_each(indices, offsets[:-1] if last else offsets)
    some = bag_sizes(indices, bag, bags, padding_idx).unsqueeze(-1) > 0
    return aten._embedding_bag(weight, *args)[3] * some, some


@vjp_of(aten._embedding_bag, aten._embedding_bag_forward_only, diff_outputs=(0,))
def _(
    g, out, weight, indices, offsets, by_freq, mode, sparse, weights, last, padding_idx, *, needs
) -> list[Tensor | None]:
    """Differentiate by ops that have derivatives of their own; the reverse kernels have none."""
    refuse_sparse(sparse and needs[0])
    g = g[0]
    if mode == 2:
        args = (indices, offsets, by_freq, mode, False, weights, last, padding_idx)
        largest, some = largest_rows(weight, g.shape[0], *args)
        return [torch.zeros_like(weight).scatter_add(0, largest, g * some), None, None, None]
    bag = bag_of_each(indices, offsets[:-1] if last else offsets)
    count = bag_sizes(indices, bag, g.shape[0], padding_idx)
    of_weight = of_weights = None
    rows = (g / count.clamp_min(1).unsqueeze(-1) if mode == 1 else g).index_select(0, bag)
    if needs[0] and by_freq:  # the kernel alone decides which frequency divides which row
        check_rows(indices, weight.shape[0])
        how = (weight.shape[0], by_freq, mode, weights, padding_idx)
        of_weight = aten._embedding_bag_dense_backward(g, indices, bag, count, count, *how)
    elif needs[0]:
        scaled = rows if weights is None else rows * weights.unsqueeze(-1)
        of_weight = aten.embedding_dense_backward(
            scaled, indices, weight.shape[0], padding_idx, False
        )
    if len(needs) > 3 and needs[3]:
        of_weights = (rows * weight.index_select(0, indices)).sum(-1)
        if padding_idx >= 0:
            of_weights = of_weights.masked_fill(indices == padding_idx, 0)
    return [of_weight, None, None, of_weights]


@jvp_of(aten._embedding_bag, aten._embedding_bag_forward_only)
def _(
    tangents, out, weight, indices, offsets, by_freq, mode, sparse, weights, last, padding_idx
) -> Any:
    """Differentiate by table and weights: linear, but for where the largest rows (mode 2) are."""
    of_table, of_weights = tangents[0], tangents[3]
    before, after = (indices, offsets, by_freq, mode, False), (last, padding_idx)
    if mode == 2:
        largest, some = largest_rows(weight, out[0].shape[0], *before, weights, *after)
        return of_table.gather(0, largest) * some, None, None, None
    on = lambda table, weights: aten._embedding_bag(table, *before, weights, *after)[0]
    moved = total(
        None if of_table is None else on(of_table, weights),
        None if of_weights is None else on(weight, of_weights),
    )
    return moved, None, None, None

"""Rules of ops that take a part of a tensor or put it back: slice, select, diagonal, unfold,
as_strided.

If aten has the transpose as one op (``slice_backward``), the rule is that op, and the op has a
line of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .batching import expand_lead, past_batch, shifted
from .schema import Formula, aten, call_op, overload, overloads_named
from .table import linear, wrong_in_autograd


def of_input(op: Any, *names: str) -> Formula:
    """Return the vmap rule of a transpose with ``input_sizes`` and dimensions ``names``."""
    op = overload(op)
    schema = [a.name for a in op._schema.arguments]
    sizes_at, dims_at = schema.index("input_sizes"), [schema.index(name) for name in names]

    def batch(g: Tensor, *rest: Any) -> Tensor:
        full = [g, *rest]
        sizes = full[sizes_at]
        full[sizes_at] = [g.shape[0], *sizes]
        for at in dims_at:
            full[at] = past_batch(full[at], max(len(sizes), 1))
        return call_op(op, full)

    return batch


# ----- a part of the elements, and its place in the whole ----------------------------------------


def slice_back(g: Tensor, x: Tensor, dim: int, start: Any, end: Any, step: Any) -> Tensor:
    return aten.slice_backward(
        g, x.shape, dim, start or 0, sys.maxsize if end is None else end, step
    )


for op in overloads_named("slice.Tensor", "slice_copy.Tensor"):
    linear(op, slice_back, batch=shifted(op, "dim"))
linear(
    aten.narrow_copy,
    lambda g, x, dim, start, length: (
        slice_back(g, x, dim, start % x.shape[dim], start % x.shape[dim] + length, 1)
        if length
        else torch.zeros_like(x, dtype=g.dtype)
    ),
    batch=shifted(aten.narrow_copy, "dim"),
)
for op in overloads_named("select.int", "select_copy.int"):
    linear(
        op, lambda g, x, dim, i: aten.select_backward(g, x.shape, dim, i), batch=shifted(op, "dim")
    )
for op in overloads_named("diagonal", "diagonal_copy"):
    linear(
        op,
        lambda g, x, offset, a, b: aten.diagonal_backward(g, x.shape, offset, a, b),
        batch=shifted(op, "dim1", "dim2"),
    )


def batch_unfold(x: Tensor, dim: int, size: Any, step: Any) -> Tensor:
    return (
        x.unfold(dim % (x.dim() - 1) + 1, size, step) if x.dim() > 1 else x.unsqueeze(1)[:, :size]
    )


def batch_unfold_backward(
    g: Tensor, sizes: Sequence[Any], dim: int, size: Any, step: Any
) -> Tensor:
    if not sizes:  # x is 0-dim: windows have one element, or none
        return g.sum(1)
    return aten.unfold_backward(g, [g.shape[0], *sizes], dim % len(sizes) + 1, size, step)


for op in overloads_named("unfold", "unfold_copy"):
    linear(
        op,
        lambda g, x, d, size, step: aten.unfold_backward(g, x.shape, d, size, step),
        batch=batch_unfold,
    )
linear(
    aten.unfold_backward,
    lambda g, y, sizes, d, size, step: g.unfold(d, size, step),
    batch=batch_unfold_backward,
)
linear(
    aten.slice_backward,
    lambda g, y, sizes, *where: aten.slice(g, *where),
    batch=of_input(aten.slice_backward, "dim"),
)
linear(
    aten.select_backward,
    lambda g, y, sizes, *where: aten.select(g, *where),
    batch=of_input(aten.select_backward, "dim"),
)
linear(
    aten.diagonal_backward,
    lambda g, y, sizes, *where: aten.diagonal(g, *where),
    batch=of_input(aten.diagonal_backward, "dim1", "dim2"),
)


def batch_diag_embed(x: Tensor, offset: int, dim1: int, dim2: int) -> Tensor:
    return x.diag_embed(offset, *(d % x.dim() + 1 for d in (dim1, dim2)))


linear(
    aten.diag_embed, lambda g, x, offset, a, b: g.diagonal(offset, a, b), batch=batch_diag_embed
)
linear(aten.tril, lambda g, x, k: g.tril(k), batch=aten.tril.default)
linear(aten.triu, lambda g, x, k: g.triu(k), batch=aten.triu.default)


def scatter_lines(op: Any, view: Any, *dims: str) -> None:
    """State the rules of an op that replaces ``view(self, *where)`` by ``src``."""
    op = overload(op)

    def batch(
        x: Tensor, src: Tensor, *where: Any, batched: tuple[bool, bool], size: Any
    ) -> Tensor:
        x, src = (expand_lead(t, b, size) for t, b in zip((x, src), batched, strict=True))
        names = [a.name for a in op._schema.arguments]
        full = [x, src, *where]
        for at in (names.index(d) for d in dims):
            full[at] = past_batch(full[at], x.dim() - 1)
        return call_op(op, full)

    linear(
        op,
        lambda g, x, src, *where: op(g, torch.zeros_like(src, dtype=g.dtype), *where),
        lambda g, x, src, *where: view(g, *where),
        batch=batch,
        jointly=True,
    )


scatter_lines(aten.slice_scatter, aten.slice, "dim")
scatter_lines(aten.select_scatter, aten.select, "dim")
scatter_lines(aten.diagonal_scatter, aten.diagonal, "dim1", "dim2")
wrong_in_autograd("complex", aten.slice_scatter, aten.select_scatter, aten.diagonal_scatter)

# ----- as_strided: reads the memory behind x, here a gather of x's elements ----------------------


def cells(
    x: Tensor, layout: tuple[Sequence[Any], Sequence[Any], Any], to: tuple[Any, Any, Any]
) -> Tensor:
    """Return, for each element of ``x.as_strided(*to)``, its number among the elements of ``x``
    (of this shape, stride and offset)."""
    shape, stride, start = layout
    size, strides, offset = to
    offset = 0 if offset is None else offset - start
    numbers = torch.arange(prod(shape), device=x.device)
    expected, dense = 1, True
    for s, st in zip(reversed(shape), reversed(stride), strict=True):
        dense, expected = dense and (s == 1 or st == expected), expected * s
    if not dense:  # lay the numbers out in memory as x is
        length = 1 + sum((s - 1) * st for s, st in zip(shape, stride, strict=True))
        memory = torch.zeros(length, dtype=torch.int64, device=x.device)
        numbers = aten.as_strided_scatter(memory, numbers.reshape(shape), shape, stride, 0)
    return aten.as_strided(numbers, size, strides, offset)


def geometry(x: Tensor) -> tuple[Sequence[Any], Sequence[Any], Any]:
    return x.shape, x.stride(), x.storage_offset()


def as_strided_back(g: Tensor, x: Tensor, *to: Any) -> Tensor:
    at = cells(x, geometry(x), to).reshape(-1)
    return g.new_zeros(x.numel()).index_add(0, at, g.reshape(-1)).reshape(x.shape)


def batch_as_strided(x: Tensor, *to: Any, sample: Any) -> Tensor:
    at = cells(x, (sample.shape, sample.stride, sample.offset), to)
    return x.flatten(1).index_select(1, at.reshape(-1)).reshape(x.shape[0], *at.shape)


def as_strided_scatter_back(g: Tensor, x: Tensor, src: Tensor, *to: Any) -> Tensor:
    at = cells(x, geometry(x), to).reshape(-1)
    return g.reshape(-1).index_fill(0, at, 0).reshape(x.shape)


def as_strided_part(g: Tensor, x: Tensor, src: Tensor, *to: Any) -> Tensor:
    return g.reshape(-1).index_select(0, cells(x, geometry(x), to).reshape(-1)).reshape(src.shape)


def batch_as_strided_scatter(x: Tensor, src: Tensor, *to: Any, sample: Any) -> Tensor:
    at = cells(x, (sample.shape, sample.stride, sample.offset), to).reshape(-1)
    return x.flatten(1).index_copy(1, at, src.reshape(src.shape[0], -1)).reshape(x.shape)


for op in overloads_named("as_strided", "as_strided_copy"):
    linear(op, as_strided_back, batch=batch_as_strided)
linear(
    aten.as_strided_scatter,
    as_strided_scatter_back,
    as_strided_part,
    batch=batch_as_strided_scatter,
    jointly=True,
)
wrong_in_autograd("all", aten.as_strided_scatter)

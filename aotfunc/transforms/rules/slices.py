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
from .table import jvp_of, linear, wrong_in_autograd


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

Layout = tuple[Sequence[Any], Sequence[Any], Any]  # shape, stride and storage offset


def geometry(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.storage_offset()


def start(of: Layout, to: Layout) -> Any:
    """Return how far behind the first element ``as_strided(*to)`` begins."""
    return 0 if to[2] is None else to[2] - of[2]


def memory_length(shape: Sequence[Any], stride: Sequence[Any]) -> Any:
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0


def in_row_order(of: Layout) -> bool:
    step = 1
    for n, s in zip(reversed(of[0]), reversed(of[1]), strict=True):
        if n != 1 and s != step:
            return False
        step *= n
    return True


def within(of: Layout, to: Layout) -> bool:
    """Return whether ``as_strided(*to)`` of such a tensor reads its elements alone: neither what
    lies in memory beside them nor between them."""
    begin = start(of, to)
    if in_row_order(of):
        return begin >= 0 and begin + memory_length(*to[:2]) <= prod(of[0])
    marks = bytearray(memory_length(*of[:2]))
    for line in lines(*of[:2]):
        marks[line] = b"\1" * len(marks[line])
    last = begin + memory_length(*to[:2])
    return (
        begin >= 0 and last <= len(marks) and all(0 not in marks[k] for k in lines(*to[:2], begin))
    )


def lines(shape: Sequence[Any], stride: Sequence[Any], begin: int = 0) -> list[slice]:
    """Return where in memory the elements lie, as lines along the longest dimension."""
    dims = sorted((n, s) for n, s in zip(shape, stride, strict=True) if n != 1 and s)
    n, s = dims.pop() if dims else (1, 1)
    starts = [begin] if all(shape) else []
    for m, step in dims:
        starts = [at + i * step for at in starts for i in range(m)]
    return [slice(at, at + (n - 1) * s + 1, s) for at in starts]


def cells(x: Tensor, of: Layout, to: Layout) -> Tensor:
    """Return, for each element of ``x.as_strided(*to)``, its number among the elements of ``x``
    (of this layout), and their count where it is none of them."""
    (shape, stride, _), (size, strides, _), begin = of, to, start(of, to)
    numbers = torch.arange(prod(shape), device=x.device)
    if not (in_row_order(of) and within(of, to)):  # lay the numbers out in memory as x is
        first = min(begin, 0)
        length = max(memory_length(shape, stride), begin + memory_length(size, strides)) - first
        memory = torch.full((length,), prod(shape), device=x.device)
        numbers = aten.as_strided_scatter(memory, numbers.reshape(shape), shape, stride, -first)
        begin -= first
    return aten.as_strided(numbers, size, strides, begin)


def elements(x: Tensor, of: Layout, to: Layout) -> Tensor:
    """Return all elements of ``x``, and a zero for what is none of them if that is read."""
    flat = x.reshape(-1)
    return flat if within(of, to) else torch.cat([flat, flat.new_zeros(1)])


def shown_elements(t: Tensor, x: Tensor, to: Layout) -> Tensor:
    """Return those elements of ``t`` that ``x.as_strided(*to)`` reads of ``x``."""
    at = cells(x, geometry(x), to)
    return elements(t, geometry(x), to).index_select(0, at.reshape(-1)).reshape(at.shape)


def as_strided_back(g: Tensor, x: Tensor, *to: Any) -> Tensor:
    at = cells(x, geometry(x), to).reshape(-1)
    every = elements(g.new_zeros(x.shape), geometry(x), to)
    return every.index_add(0, at, g.reshape(-1)).narrow(0, 0, x.numel()).reshape(x.shape)


def batch_as_strided(x: Tensor, *to: Any, sample: Any) -> Tensor:
    of = sample.shape, sample.stride, sample.offset
    if within(of, to):
        at = cells(x, of, to)
        return x.flatten(1).index_select(1, at.reshape(-1)).reshape(x.shape[0], *at.shape)
    size, strides, begin = *to[:2], start(of, to)
    if x.stride()[1:] != sample.stride or not (
        0 <= begin <= memory_length(*of[:2]) - memory_length(size, strides)
    ):
        raise NotImplementedError(OUTSIDE)
    where = (x.shape[0], *size), (x.stride(0), *strides), x.storage_offset() + begin
    return aten.as_strided(x, *where).clone()  # between the elements lie those of other samples


OUTSIDE = "it reads memory in which no element of its sample lies; index the elements instead"


def as_strided_scatter_back(g: Tensor, x: Tensor, src: Tensor, *to: Any) -> Tensor:
    at = cells(x, geometry(x), to).reshape(-1)
    every = elements(g, geometry(x), to)
    return every.index_fill(0, at, 0).narrow(0, 0, x.numel()).reshape(x.shape)


def as_strided_part(g: Tensor, x: Tensor, src: Tensor, *to: Any) -> Tensor:
    return shown_elements(g, x, to).reshape(src.shape)


def batch_as_strided_scatter(x: Tensor, src: Tensor, *to: Any, sample: Any) -> Tensor:
    of = sample.shape, sample.stride, sample.offset
    if not within(of, to):
        raise NotImplementedError(OUTSIDE)
    at = cells(x, of, to).reshape(-1)
    return x.flatten(1).index_copy(1, at, src.reshape(src.shape[0], -1)).reshape(x.shape)


def as_strided_tangent(tangents: Any, out: Tensor, x: Tensor, *to: Any) -> Tensor:
    (t,), of = tangents, geometry(x)
    if t.stride() == x.stride() and within(of, to):
        return aten.as_strided(t, *to[:2], t.storage_offset() + start(of, to))
    return shown_elements(t, x, to)


def as_strided_scatter_tangent(
    tangents: Any, out: Tensor, x: Tensor, src: Tensor, *to: Any
) -> Tensor:
    tx, tsrc = (
        torch.zeros_like(p) if t is None else t for t, p in zip(tangents, (x, src), strict=True)
    )
    at = cells(x, geometry(x), to).reshape(-1)
    every = elements(tx, geometry(x), to).index_copy(0, at, tsrc.reshape(-1))
    return every.narrow(0, 0, x.numel()).reshape(x.shape)


for op in overloads_named("as_strided", "as_strided_copy"):
    linear(op, as_strided_back, batch=batch_as_strided)
    jvp_of(op)(as_strided_tangent)
linear(
    aten.as_strided_scatter,
    as_strided_scatter_back,
    as_strided_part,
    batch=batch_as_strided_scatter,
    jointly=True,
)
jvp_of(aten.as_strided_scatter)(as_strided_scatter_tangent)
wrong_in_autograd("all", aten.as_strided_scatter)

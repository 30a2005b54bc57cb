"""Rules of ops that index one dimension: gather and scatter (a position per element), index_select
and its writes (a vector).

A vector of positions that differs between examples is expanded into one index per element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batching import expand_lead, past_batch
from .schema import Formula, aten, call_op, overload
from .table import conj, jvp_of, linear, refuse_sparse, times, vjp_of, vmap_of


def fitted(x: Tensor, shape: Sequence[Any]) -> Tensor:
    """Pad ``x`` with zeros at the far ends to ``shape``: the gradient of unread elements."""
    if x.shape == torch.Size(shape):
        return x
    return torch.nn.functional.pad(
        x, [p for s, n in zip(reversed(shape), reversed(x.shape), strict=True) for p in (0, s - n)]
    )


# ----- gather and scatter: one index per element, along one dimension ----------------------------


def indexed_along(op: Any) -> Formula:
    """Return the vmap rule of ``op(self, dim, index, ...)`` on tensors of one rank."""
    op = overload(op)
    schema = [a.name for a in op._schema.arguments]
    tensors_at = [schema.index(name) for name in ("self", "index", "src") if name in schema]

    def batch(*args: Any, batched: tuple[bool, ...], size: Any) -> Tensor:
        full = list(args)
        rank = max(args[0].dim() - batched[0], 1)
        for at, b in zip(tensors_at, batched, strict=True):
            x = expand_lead(args[at], b, size)
            full[at] = x.unsqueeze(1) if x.dim() == 1 else x
        full[1] = past_batch(args[1], rank)
        out = call_op(op, full)
        like = args[2] if op is aten.gather.default else args[0]
        like_batched = batched[1] if op is aten.gather.default else batched[0]
        return out if like.dim() - like_batched == out.dim() - 1 else out.squeeze(1)

    return batch


def gather_cotangent(g: Tensor, x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    return fitted(g.gather(dim, index), src.shape)


def scatter_cotangent(g: Tensor, x: Tensor, dim: int, index: Tensor, sparse: bool) -> Tensor:
    refuse_sparse(sparse)
    return g.new_zeros(x.shape).scatter_add(dim, index, g)


linear(aten.gather, scatter_cotangent, None, batch=indexed_along(aten.gather))
linear(
    aten.scatter.src,
    lambda g, x, dim, index, src: g.scatter(dim, index, 0),
    None,
    gather_cotangent,
    batch=indexed_along(aten.scatter.src),
    jointly=True,
)
linear(
    aten.scatter_add,
    lambda g, *_: g,
    None,
    gather_cotangent,
    batch=indexed_along(aten.scatter_add),
    jointly=True,
)
linear(
    aten.scatter.value,
    lambda g, x, dim, index, value: g.scatter(dim, index, 0),
    batch=indexed_along(aten.scatter.value),
)


@jvp_of(aten.scatter.value)
def _(tangents: Any, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Tensor:
    return tangents[0].scatter(dim, index, 0)


@vjp_of(aten.scatter.value_reduce)
def _(g: Tensor, out: Tensor, x: Tensor, dim: int, index: Tensor, value: Any, reduce: str) -> Any:
    if reduce == "add":
        return g, None
    factor = torch.ones_like(x).scatter(dim, index, value, reduce="multiply")
    return g * conj(factor), None


def scatter_reduce_back(
    g, out, x, dim, index, src, reduce, include_self=True
) -> tuple[Tensor, None, Tensor]:
    """Return the cotangents of ``scatter_reduce``; other reducing writes are special cases."""

    def reduced(by: str, x: Tensor, src: Tensor) -> Tensor:
        return x.scatter_reduce(dim, index, src, by, include_self=include_self)

    def at_src(y: Tensor) -> Tensor:
        return y.gather(dim, index)

    whole, read = src.shape, at_src(out).shape
    for d, length in enumerate(read):
        src = src.narrow(d, 0, length) if src.shape[d] != length else src
    if reduce == "sum":
        dx, dsrc = g, at_src(g)
    elif reduce == "mean":
        start = torch.ones_like(x) if include_self else torch.zeros_like(x)
        count = start.scatter_add(dim, index, torch.ones_like(src)).clamp_min(1)
        dx, dsrc = g / count, at_src(g / count)
    elif reduce in ("amax", "amin"):  # equal values get equal shares
        is_x, is_src = (x == out).to(g.dtype), (src == at_src(out)).to(g.dtype)
        start = is_x if include_self else torch.zeros_like(is_x)
        share = g / start.scatter_add(dim, index, is_src).clamp_min(1)
        dx, dsrc = share * is_x, at_src(share) * is_src
    else:  # the product of the others: divide, or leave out the only zero
        x_zero, zero = x == 0, src == 0
        full_x, full_src = x.masked_fill(x_zero, 1), src.masked_fill(zero, 1)
        dx = g * conj(reduced("prod", full_x, src) / full_x)
        zeros = torch.zeros_like(x).scatter_add(dim, index, zero.to(x.dtype))
        only = zero & (at_src(zeros) == 1)
        without = torch.where(
            only, at_src(reduced("prod", x, src.masked_fill(only, 1))), at_src(out) / full_src
        )
        dsrc = at_src(g) * conj(without)
    if not include_self:
        dx = dx.scatter(dim, index, 0)
    return dx, None, fitted(dsrc, whole)


vjp_of(aten.scatter_reduce.two)(scatter_reduce_back)


@vjp_of(aten.scatter.reduce)
def _(g: Tensor, out: Tensor, x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str) -> Any:
    return scatter_reduce_back(g, out, x, dim, index, src, "sum" if reduce == "add" else "prod")


for op in (aten.scatter.value_reduce, aten.scatter_reduce.two, aten.scatter.reduce):
    vmap_of(op)(indexed_along(op))

# ----- index_select and its writes: one vector of positions along one dimension ------------------


def every_position(index: Tensor, shape: Sequence[Any], dim: int) -> Tensor:
    """Return positions ``[n]`` or ``[B, n]`` along ``dim`` for elements of ``shape``."""
    ones = [1] * len(shape)
    ones[dim] = shape[dim]
    if index.dim() == 2:
        ones[0] = shape[0]
    return index.reshape(ones).expand(shape)


def batch_index_select(
    x: Tensor, dim: int, index: Tensor, *, batched: tuple[bool, bool], size: Any
) -> Tensor:
    x_batched, index_batched = batched
    rank = x.dim() - x_batched
    scalar = rank == 0
    if scalar:
        x, rank = x.unsqueeze(-1), 1
    dim %= rank
    if not index_batched:
        out = x.index_select(dim + 1, index)
    else:
        index = index.unsqueeze(1) if index.dim() == 1 else index
        if x_batched:
            shape = [*x.shape[: dim + 1], index.shape[1], *x.shape[dim + 2 :]]
            out = x.gather(dim + 1, every_position(index, shape, dim + 1))
        else:
            out = x.index_select(dim, index.flatten()).unflatten(dim, index.shape).movedim(dim, 0)
    return out.squeeze(1) if scalar else out


def select_for(g: Tensor, source: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return what an op wrote from ``source``, or a number, to ``index`` of ``g``."""
    return g.index_select(dim, index).reshape(source.shape)


def write_rule(op: Any, scatter: Any) -> Formula:
    """Return the vmap rule of ``op(self, dim, index, source, ...)`` by a ``scatter``."""
    op = overload(op)

    def batch(
        x: Tensor, dim: int, index: Tensor, source: Tensor, *rest: Any, batched: Any, size: Any
    ) -> Tensor:
        shape = x.shape[1:] if batched[0] else x.shape
        x = expand_lead(x, batched[0], size).reshape(size, *(shape or [1]))
        dim = past_batch(dim, x.dim() - 1)
        source = expand_lead(source, batched[2], size)
        if source.dim() == 1:  # one element for one position
            source = source.reshape(size, *[1] * (x.dim() - 1))
        if batched[1]:
            index = index.unsqueeze(1) if index.dim() == 1 else index
            out = scatter(x, dim, every_position(index, source.shape, dim), source, *rest)
        else:
            out = call_op(op, [x, dim, index, source, *rest])
        return out.reshape(size, *shape)

    return batch


linear(
    aten.index_select,
    lambda g, x, dim, index: g.new_zeros(x.shape).index_add(dim, index, g),
    None,
    batch=batch_index_select,
)
linear(
    aten.index_add,
    lambda g, *_: g,
    None,
    lambda g, x, dim, index, source, alpha: times(select_for(g, source, dim, index), conj(alpha)),
    batch=write_rule(
        aten.index_add,
        lambda x, dim, at, source, alpha: x.scatter_add(dim, at, times(source, alpha)),
    ),
    jointly=True,
)
linear(
    aten.index_copy,
    lambda g, x, dim, index, source: g.index_fill(dim, index, 0),
    None,
    lambda g, x, dim, index, source: select_for(g, source, dim, index),
    batch=write_rule(aten.index_copy, torch.scatter),
    jointly=True,
)


def fill_back(g: Tensor, x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    return g.index_fill(dim, index, 0)


def filled_sum(g: Tensor, x: Tensor, dim: int, index: Tensor, value: Tensor) -> Tensor:
    # a repeated position is written once: a mask counts it once, index_select would not
    return g.masked_fill(
        torch.ones_like(g, dtype=torch.bool).index_fill(dim, index, False), 0
    ).sum()


def batch_fill(
    x: Tensor, dim: int, index: Tensor, value: Any, *, batched: Any, size: Any
) -> Tensor:
    shape = x.shape[1:] if batched[0] else x.shape
    x = expand_lead(x, batched[0], size).reshape(size, *(shape or [1]))
    dim = past_batch(dim, x.dim() - 1)
    value_batched = len(batched) == 3 and batched[2]
    if not batched[1] and not value_batched:
        return aten.index_fill(x, dim, index, value).reshape(size, *shape)
    index = index.unsqueeze(-1) if index.dim() == batched[1] else index
    target = [*x.shape[:dim], index.shape[-1], *x.shape[dim + 1 :]]
    index = torch.where(index < 0, index + x.shape[dim], index)  # scatter takes no negative ones
    index = every_position(index, target, dim)
    if isinstance(value, Tensor):
        value = value.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)).expand(target)
    return x.scatter(dim, index, value).reshape(size, *shape)


linear(aten.index_fill.int_Scalar, fill_back, None, batch=batch_fill)
linear(aten.index_fill.int_Tensor, fill_back, None, filled_sum, batch=batch_fill, jointly=True)


@jvp_of(aten.index_fill.int_Scalar)
def _(tangents: Any, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Tensor:
    return tangents[0].index_fill(dim, index, 0)


@vjp_of(aten.index_reduce)
def _(g, out, x, dim, index, source, reduce, include_self) -> Any:
    at = every_position(index, source.shape, dim) if source.dim() else index.reshape(source.shape)
    return scatter_reduce_back(g, out, x, dim, at, source, reduce, include_self)


@vmap_of(aten.index_reduce)
def _(x, dim, index, source, reduce, include_self, *, batched, size) -> Tensor:
    def scatter(
        x: Tensor, dim: int, at: Tensor, source: Tensor, reduce: str, include_self: bool
    ) -> Tensor:
        return x.scatter_reduce(dim, at, source, reduce, include_self=include_self)

    return write_rule(aten.index_reduce, scatter)(
        x, dim, index, source, reduce, include_self, batched=batched, size=size
    )

"""Chains of views: ``forward`` replays one on its base, ``inverse`` writes through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..errors import CaptureError
from .emit import Builder
from .shapes.rules import in_order, memory_order
from .shapes.sig import Sig

aten = torch.ops.aten

#: ``x.narrow(dim, start, length)`` with a tensor ``start``; only recorded, as graphs hold the
#: view's value
_library = torch.library.Library("aotfunc", "FRAGMENT")
_library.define("narrow_at(Tensor(a) x, int dim, Tensor start, int length) -> Tensor(a)")
_library.impl(
    "narrow_at",
    lambda x, dim, start, length: x.narrow(dim, int(start), length),
    "CompositeExplicitAutograd",
)
narrow_at = torch.ops.aotfunc.narrow_at.default

#: views of a recording that are copies in a graph
COMPUTED = (aten._conj.default, narrow_at)


class Link(tuple):
    """A step of a view chain: ``(op, args after the tensor, kwargs, index or None, val)``."""


def replay_view(b: Builder, link: Link, node: Node) -> Node:
    """Return the view of ``node`` that a link describes."""
    op, args, kwargs, index, _ = link
    if op is aten.as_strided.default:
        node, args = in_memory(b, node, args)
    if op is aten._conj.default:
        op = aten._conj_physical.default
    if op is narrow_at:
        op, args = aten.index_select.default, (args[0], index_node(b, *args[1:]))
    out = b.call(op, node, *args, **kwargs)
    return out if index is None else b.item(out, index)


def index_node(b: Builder, start: Node, length: int) -> Node:
    """Return the indices ``start``, ``start + 1``, … as a node of ``length`` elements."""
    sig: Sig = start.meta["val"]
    if sig.dtype not in (torch.int64, torch.int32):
        start = b.call(aten._to_copy.default, start, dtype=torch.int64)
    if length == 1:
        return b.call(aten.view.default, start, [1])
    return b.call(aten.add.Tensor, b.call(aten.arange.default, length, device=sig.device), start)


def linked(
    base: Sig, op: OpOverload, args: tuple, kwargs: dict, index: int | None, val: Sig
) -> Link:
    """Return the link of a view op on a tensor of signature ``base``."""
    if op is aten.as_strided.default:
        return strided_link(base, val, val.offset - base.offset)
    return Link((op, args, kwargs, index, val))


def restrided(base: Sig, chain: Sequence[Link], val: Sig) -> tuple[Link, ...]:
    """Return the chain to a tensor by its offset in the storage ``base``."""
    if val.dtype is not base.dtype or any(
        link[0] in (*COMPUTED, aten._neg_view.default) for link in chain
    ):
        last = chain[-1][4] if chain else base
        return (*chain, strided_link(last, val, val.offset - last.offset))
    # a part of the storage
    first = chain[0] if chain and chain[0][0] is aten.as_strided.default else None
    start = (
        val.offset - base.offset if first is None else first[1][2] + val.offset - first[4].offset
    )
    return (
        *[link for link in chain if link[0] is aten.detach.default],
        strided_link(base, val, start),
    )


def strided_link(base: Sig, val: Sig, start: int) -> Link:
    """Return the link to a view of ``base``'s memory from its element ``start`` on."""
    return Link(
        (
            aten.as_strided.default,
            (list(val.shape), list(val.stride), start, base.stride),
            {},
            None,
            val,
        )
    )


def in_memory(b: Builder, node: Node, args: tuple) -> tuple[Node, tuple]:
    """Return ``as_strided``'s arguments for a value, copied if laid out otherwise."""
    size, stride, start, layout = args
    if node.meta["val"].stride != layout:
        node = b.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        if node.meta["val"].stride != layout:
            raise CaptureError(
                "as_strided of a tensor that is not contiguous cannot follow writes to it; "
                "clone() it"
            )
    return node, (size, stride, start + node.meta["val"].offset)


def inverse(b: Builder, link: Link, base: Node, new: Node) -> Node:
    """Return the value of ``base`` after the link's view of it became ``new``."""
    op, args, kwargs, index, _ = link
    rule = INVERSES.get(op)
    if op is aten.as_strided.default:
        base, args = in_memory(b, base, args)
    if rule is None:
        return scatter_through(b, link, base, new)
    return rule(b, base, new, index, *args, **kwargs)


def scatter_through(b: Builder, link: Link, base: Node, new: Node) -> Node:
    """Invert any view: look through it at the elements' numbers, and put the new values there."""
    sig: Sig = base.meta["val"]
    numbers = b.call(aten.arange.default, sig.numel, device=sig.device)
    where = replay_view(b, link, b.call(aten.view.default, numbers, list(sig.shape)))
    return b.call(aten.put.default, base, where, new)


def reshape_back(b: Builder, base: Node, new: Node, *_: Any, **__: Any) -> Node:
    return b.reshape(new, base.meta["val"].shape)


def _permuted(b: Builder, base: Node, new: Node, index: Any, dims: Sequence[int]) -> Node:
    back = [0] * len(dims)
    for i, d in enumerate(dims):
        back[d] = i
    return b.call(aten.permute.default, new, back)


def _narrowed(b: Builder, base: Node, new: Node, dim: int, start: int, length: int) -> Node:
    return b.call(aten.slice_scatter.default, base, new, dim, start, start + length)


def _split(b: Builder, base: Node, new: Node, index: int, sizes: Any, dim: int = 0) -> Node:
    if isinstance(sizes, int):
        total = base.meta["val"].shape[dim]
        sizes = [min(sizes, total - i) for i in range(0, total, sizes)]
    return _narrowed(b, base, new, dim, sum(sizes[:index]), sizes[index])


def _expanded(b: Builder, base: Node, new: Node, index: Any, *_: Any, **__: Any) -> Node:
    # a part of it that is not expanded was written
    if new.meta["val"].shape != base.meta["val"].shape:
        raise CaptureError(
            "a write through an expanded tensor: several elements share memory; clone() it first"
        )
    return new


def _call(op: OpOverload) -> Any:
    return lambda b, base, new, index, *args, **kwargs: b.call(op, new, *args, **kwargs)


def _scattered(op: OpOverload) -> Any:
    return lambda b, base, new, index, *args, **kwargs: b.call(op, base, new, *args, **kwargs)


INVERSES: dict[OpOverload, Any] = {
    **dict.fromkeys(
        (
            aten.view.default,
            aten._unsafe_view.default,
            aten._reshape_alias.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
        ),
        reshape_back,
    ),
    **dict.fromkeys(
        (aten.alias.default, aten.detach.default, aten.lift_fresh.default),
        lambda b, base, new, index: new,
    ),
    aten.select.int: _scattered(aten.select_scatter.default),
    aten.slice.Tensor: _scattered(aten.slice_scatter.default),
    narrow_at: lambda b, base, new, index, dim, *at: b.call(
        aten.index_copy.default, base, dim, index_node(b, *at), new
    ),
    aten.diagonal.default: _scattered(aten.diagonal_scatter.default),
    aten.as_strided.default: _scattered(aten.as_strided_scatter.default),
    aten.t.default: _call(aten.t.default),
    aten.transpose.int: _call(aten.transpose.int),
    aten.permute.default: _permuted,
    aten._conj.default: _call(aten._conj_physical.default),
    aten._neg_view.default: _call(aten.neg.default),
    aten.view_as_real.default: lambda b, base, new, index: b.call(
        aten.view_as_complex.default, new
    ),
    aten.view_as_complex.default: lambda b, base, new, index: b.call(
        aten.view_as_real.default, new
    ),
    aten.view.dtype: lambda b, base, new, index, dtype: b.call(
        aten.view.dtype, new, base.meta["val"].dtype
    ),
    aten.unbind.int: lambda b, base, new, index, dim=0: b.call(
        aten.select_scatter.default, base, new, dim, index
    ),
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.expand.default: _expanded,
}


def laid_out(b: Builder, x: Node, sig: Sig, exactly: bool = False) -> Node:
    """Return ``x`` with dimensions in memory in the order of ``sig``, to be viewed as it;
    ``exactly``: with a dense ``sig``'s strides, also in dimensions of size 1."""
    val = x.meta["val"]
    if val.stride == sig.stride:
        return x
    order = memory_order(sig.shape, (sig,))
    if in_order(val, order) and not exactly:
        return x
    if order == sorted(order):
        return b.call(aten.clone.default, x, memory_format=torch.contiguous_format)
    copy = b.call(
        aten.clone.default,
        b.call(aten.permute.default, x, order),
        memory_format=torch.contiguous_format,
    )
    return b.call(aten.permute.default, copy, sorted(range(sig.ndim), key=order.__getitem__))

"""Shorten chains of ops that return the same elements in another shape or order.

Two views of the same memory with the same shape, strides and offset are the same value. So a chain
may end at any of its links that has the signature wanted; and a chain without copies on a
contiguous tensor is a ``view`` of it, or a ``permute`` of one. An expanded input is left alone:
each of its elements is a variable, though they share memory.
"""

from __future__ import annotations

from typing import Any

from ...trace.emit import Builder
from ...trace.memory import overlaps_itself
from ...trace.shapes.sig import Sig, contiguous_stride, make_sig
from .constants import (
    EXPAND,
    FULL,
    MOVES,
    PERMUTE,
    RESHAPES,
    TRANSPOSE,
    TURNS,
    VIEW,
    T,
    filled_constant,
    filled_with,
)
from .table import aten, rewrite, tried


@rewrite(aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)
def _identity(b: Builder, val: Sig, x: Any) -> Any:
    return x


@rewrite(aten._unsafe_view.default)
def _unsafe(b: Builder, val: Sig, x: Any, shape: Any) -> Any:
    return b.node(VIEW, (x, list(val.shape)), {}, val)


@rewrite(aten._reshape_alias.default, aten.slice.Tensor)
def _nothing_done(b: Builder, val: Sig, x: Any, *_: Any) -> Any:
    return x if x.meta["val"] is val else None


@rewrite(*RESHAPES, EXPAND)
def _moved(b: Builder, val: Sig, x: Any, *_: Any, turn: bool = False, **__: Any) -> Any:
    if turned_variables(x, turn):
        return None
    if x.meta["val"] is val:
        return x
    if x.target in MOVES:
        return fewer_moves(b, val, x)
    if (
        x.target is FULL
        and (val.plain or x.meta["val"].numel != 1)
        and (value := filled_with(x)) is not None
    ):
        return filled_constant(b, val, value)
    return None


def turned_variables(x: Any, turns: bool) -> bool:
    """Return whether moves that end with ``x`` permute elements that share memory."""
    while x.target in MOVES:
        turns = turns or x.target in TURNS
        x = x.args[0]
    sig = x.meta["val"]
    return turns and not sig.plain and overlaps_itself(sig)


@rewrite(T, TRANSPOSE, PERMUTE)
def _turned(b: Builder, val: Sig, x: Any, *how: Any) -> Any:
    shorter = _moved(b, val, x, turn=True)
    if shorter is not None:
        return shorter
    dims = order(how, len(val.shape))
    if x.target in TURNS:
        inner = order(x.args[1:], len(dims))
        return turned(b, val, x.args[0], [inner[d] for d in dims])
    return turned(b, val, x, dims, how)


def order(how: tuple, rank: int) -> list[int]:
    """Return the dimensions in the order of ``t()``, ``transpose(i, j)`` or ``permute(dims)``."""
    if len(how) == 1:
        return [d % rank for d in how[0]]
    dims = list(range(rank))
    if rank > 1:
        i, j = how or (0, 1)
        dims[i], dims[j] = dims[j], dims[i]
    return dims


def turned(b: Builder, val: Sig, x: Any, dims: list[int], how: tuple | None = None) -> Any:
    """Return ``x`` with dimensions in this order, in its one form; None if ``how`` is it."""
    off = [d for d, k in enumerate(dims) if d != k]
    if not off:
        return x
    way: tuple[Any, ...] = (
        (PERMUTE, dims) if len(off) > 2 else (TRANSPOSE, *off) if len(dims) > 2 else (T,)
    )
    target, args = way[0], way[1:]
    return None if args == how else b.node(target, (x, *args), {}, val)


def fewer_moves(b: Builder, val: Sig, x: Any) -> Any:
    """Rebuild a view's view ``x`` from an earlier tensor by fewer ops; None if impossible."""
    origin, links = x, 0
    while origin.target in MOVES:
        origin = origin.args[0]
        links += 1
        if origin.meta["val"] is val:
            return origin
    sig = origin.meta["val"]
    if origin.target is FULL:
        value = filled_with(origin)
        return None if value is None else filled_constant(b, val, value)
    if sig.plain and sig.numel == val.numel:
        if val.plain:
            return b.node(VIEW, (origin, list(val.shape)), {}, val)
        return as_turn(b, val, origin, links > 1 and not x.users)
    if expandable(sig.shape, val.shape):
        return tried(b, val, EXPAND, origin, list(val.shape))
    return None


def as_turn(b: Builder, val: Sig, origin: Any, two: bool) -> Any:
    """Return a permutation of contiguous ``origin``, or, by ``two`` moves, of its view."""
    if not two and sorted(origin.meta["val"].shape) != sorted(val.shape):
        return None
    inside = sorted(range(len(val.shape)), key=lambda d: (-val.stride[d], val.shape[d] == 1))
    shape = tuple(val.shape[d] for d in inside)
    stride = contiguous_stride(shape)
    same = shape == origin.meta["val"].shape
    if stride != tuple(val.stride[d] for d in inside) or not (two or same):
        return None
    whole = make_sig(shape, stride, val.dtype, val.device)
    base = origin if same else b.node(VIEW, (origin, list(shape)), {}, whole)
    dims = [0] * len(inside)
    for at, d in enumerate(inside):
        dims[d] = at
    return turned(b, val, base, dims)


def expandable(shape: tuple, wide: tuple) -> bool:
    return len(shape) <= len(wide) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(wide), strict=False)
    )

"""Ops whose result shows elements of their argument: which dimension of the argument each of the
result's dimensions is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

#: for each dimension of a result, the argument's dimension, or None for one of size 1 or one that
#: repeats
Dims = Sequence[int | None]


def shape_of(n: Node) -> tuple[int, ...]:
    return tuple(n.meta["val"].shape)


def expand(n: Node, x: Node) -> Dims:
    have, want = shape_of(x), shape_of(n)
    new = len(want) - len(have)
    return [None if d < new or have[d - new] != want[d] else d - new for d in range(len(want))]


def permute(n: Node, x: Node) -> Dims:
    rank = len(shape_of(x))
    return [d % rank for d in n.args[1]]  # type: ignore[operator, union-attr]


def transpose(n: Node, x: Node) -> Dims:
    rank = len(shape_of(x))
    order = list(range(rank))
    i, j = n.args[1:] if len(n.args) == 3 else (0, -1)
    if rank:
        order[i], order[j] = order[j], order[i]  # type: ignore[index]
    return order


def regrouped(n: Node, x: Node) -> Dims | None:
    """A change of shape that adds or drops dimensions of size 1 only; None for another."""
    have = [d for d, size in enumerate(shape_of(x)) if size != 1]
    if [shape_of(x)[d] for d in have] != [size for size in shape_of(n) if size != 1]:
        return None
    rest = iter(have)
    return [None if size == 1 else next(rest) for size in shape_of(n)]


VIEWS: dict[Any, Callable[[Node, Node], Dims | None]] = {
    aten.expand.default: expand,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.t.default: transpose,
    **dict.fromkeys(
        (
            *(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default),
            *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
            *(aten.alias.default, aten.detach.default),
        ),
        regrouped,
    ),
}


def dims_of(n: Any) -> Dims | None:
    """Which dimensions of its argument a view shows; None for anything else."""
    if not isinstance(n, Node) or n.op != "call_function" or n.target not in VIEWS:
        return None
    return VIEWS[n.target](n, n.args[0])  # type: ignore[index, arg-type]

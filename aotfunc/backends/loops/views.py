"""Place the argument of an op that only shows its elements, from the place of the result."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ...trace.nested import with_items
from .places import FIRST, Index, Place, regrouped

aten = torch.ops.aten

Shape = Sequence[int]


def static_shape(n: Node) -> tuple[int, ...]:
    return tuple(n.meta["val"].shape)


# Each rule takes the argument's shape, the result's place, and the op's other arguments, and
# returns the argument's place.


def place_of_expanded(shape: Shape, place: Place, *_: Any) -> Place:
    last = place[len(place) - len(shape) :]
    return tuple([FIRST if size == 1 else i for size, i in zip(shape, last, strict=True)])


def place_of_permuted(shape: Shape, place: Place, dims: Shape) -> Place:
    return tuple(with_items([FIRST] * len(shape), dims, place))


def place_of_transposed(shape: Shape, place: Place, i: int = 0, j: int = -1) -> Place:
    found = list(place)
    if place:
        found[i], found[j] = found[j], found[i]
    return tuple(found)


def place_of_selected(shape: Shape, place: Place, dim: int, index: int) -> Place:
    dim %= len(shape)
    return (*place[:dim], FIRST.shifted(index % shape[dim]), *place[dim:])


def place_of_sliced(
    shape: Shape,
    place: Place,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Place:
    return with_index(place, dim, (place[dim] * step).shifted(first_of(start, shape[dim])))


def with_index(place: Place, dim: int, index: Index) -> Place:
    """Return the place with another index into one dimension."""
    dim %= len(place)
    return (*place[:dim], index, *place[dim + 1 :])


def first_of(start: int | None, size: int) -> int:
    """Return where a slice begins."""
    start = start or 0
    return min(max(start + size if start < 0 else start, 0), size)


def place_of_flipped(shape: Shape, place: Place, dims: Shape) -> Place:
    for d in dims:
        place = with_index(place, d, (place[d] * -1).shifted(shape[d] - 1))
    return place


def place_of_diagonal(
    shape: Shape, place: Place, offset: int = 0, i: int = 0, j: int = 1
) -> Place:
    i, j = i % len(shape), j % len(shape)
    both = {i: place[-1].shifted(max(0, -offset)), j: place[-1].shifted(max(0, offset))}
    rest = iter(place)
    return tuple([both[d] if d in both else next(rest) for d in range(len(shape))])


#: op -> the rule for its argument; None: the same elements in the same order
VIEWS: dict[Any, Callable[..., Place] | None] = {
    aten.expand.default: place_of_expanded,
    aten.permute.default: place_of_permuted,
    aten.transpose.int: place_of_transposed,
    aten.t.default: place_of_transposed,
    aten.select.int: place_of_selected,
    aten.slice.Tensor: place_of_sliced,
    aten.flip.default: place_of_flipped,
    aten.diagonal.default: place_of_diagonal,
    **dict.fromkeys(
        (
            *(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default),
            *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
            *(aten.alias.default, aten.detach.default),
        )
    ),
}


def place_of_unbound(shape: Shape, place: Place, i: int, dim: int = 0) -> Place:
    return place_of_selected(shape, place, dim, i)


def place_of_part(shape: Shape, place: Place, i: int, size: int | Shape, dim: int = 0) -> Place:
    start = i * size if isinstance(size, int) else sum(size[:i])
    return with_index(place, dim, place[dim].shifted(start))


#: the same for ops that return several parts, with the part's number
SEVERAL: dict[Any, Callable[..., Place]] = {
    aten.unbind.int: place_of_unbound,
    aten.split.Tensor: place_of_part,
    aten.split_with_sizes.default: place_of_part,
}


def source_of(n: Any) -> Node | None:
    """Return the argument that a view shows; None if ``n`` is no view."""
    if not isinstance(n, Node) or n.op != "call_function":
        return None
    if n.target in VIEWS:
        return n.args[0]  # type: ignore[return-value]
    if n.target is operator.getitem:
        several = n.args[0]
        if isinstance(several, Node) and several.target in SEVERAL:
            return several.args[0]  # type: ignore[return-value]
    return None


def source_place(n: Node, place: Place, extents: Sequence[int]) -> Place:
    """Return the place of a view's argument. Raises Split and Unfit."""
    source = source_of(n)
    assert source is not None
    shape = static_shape(source)
    if n.target is operator.getitem:
        several, i = n.args
        return SEVERAL[several.target](shape, place, i, *several.args[1:])  # type: ignore
    move = VIEWS[n.target]
    return (
        regrouped(place, static_shape(n), shape, extents)
        if move is None
        else move(shape, place, *n.args[1:])
    )

"""Lower ops that add values into zeros at given indices: the transpose of a look-up.

Several values may be added to one element, so one thread adds them all, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .checks import index_of
from .constants import constant
from .indexed import At, looked_up, out_of_bounds, out_of_self, place_of_indexed, together
from .ir import Unfit
from .places import Place
from .views import static_shape, with_index

if TYPE_CHECKING:
    from .builder import KernelBuilder

aten = torch.ops.aten

#: the added value, the shape of its points, and the place of a point in the result
Added = tuple[Node, tuple[int, ...], Callable[["KernelBuilder", Place], Place]]


def index_put(n: Node) -> Added:
    x, asked, value, accumulate = (*n.args, False)[:4]
    if not accumulate:
        raise Unfit("values that are put")
    first, shape = together(asked)
    size = static_shape(x)
    rest = tuple([n for d, n in enumerate(size) if d >= len(asked) or asked[d] is None])

    def where(work: KernelBuilder, place: Place) -> Place:
        return place_of_indexed(work, At(place, None), size, asked)

    return value, (*rest[:first], *shape, *rest[first:]), where


def scatter_add(n: Node) -> Added:
    x, dim, index, value = n.args
    shape = static_shape(index)
    if not shape or shape != static_shape(value):
        raise Unfit("a part of the values")
    size = static_shape(x)[dim]

    def where(work: KernelBuilder, place: Place) -> Place:
        error = out_of_bounds(RuntimeError, size, dim % len(shape))
        i = index_of(work, index, At(place, None), 0, size, error)
        return with_index(place, dim, looked_up(i))

    return value, shape, where


def index_add(n: Node) -> Added:
    x, dim, index, value = n.args
    if n.kwargs.get("alpha", 1) != 1 or not static_shape(index) or not static_shape(x):
        raise Unfit("values times a number")
    size = static_shape(x)[dim]

    def where(work: KernelBuilder, place: Place) -> Place:
        i = index_of(work, index, At((place[dim],), None), 0, size, out_of_self)
        return with_index(place, dim, looked_up(i))

    return value, static_shape(value), where


#: op -> what it adds
ADDED: dict[Any, Callable[[Node], Added]] = {
    aten.index_put.default: index_put,
    aten.scatter_add.default: scatter_add,
    aten.index_add.default: index_add,
}


def adds(n: Node) -> bool:
    """Return whether a node adds values into zeros."""
    if n.target not in ADDED or str(constant(n.args[0])) not in ("0", "0.0"):
        return False
    val = n.meta["val"]
    if val.dtype not in (torch.float32, torch.float64) or not val.is_contiguous():
        return False
    try:
        value, _, _ = ADDED[n.target](n)
    except Unfit:
        return False
    return isinstance(value, Node) and value.meta["val"].dtype is val.dtype

"""Lower ops that read elements at other places: look-ups, cut and padded tensors, ranges.

A rule gets the builder, the place of its result, and the op's arguments, which it asks for at
other places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ...trace.shapes.rules import broadcast_shape
from .checks import index_of, wrapped
from .dtypes import as_given, cast
from .ir import Expr, Given, Unfit, function_of, number
from .places import FIRST, Index, Place, divide_index
from .views import first_of, place_of_expanded, static_shape, with_index

if TYPE_CHECKING:
    from .builder import KernelBuilder

aten = torch.ops.aten

# --- look-ups; an index out of range is what the op says of it ---


@dataclass(frozen=True)
class At:
    """The place of a result, and the condition that it is inside."""

    place: Place
    mask: Expr | None


def looked_up(found: Expr) -> Index:
    return Index(((found, 1),))


def out_of_bounds(error: type[Exception], size: int, dim: int) -> Callable[[int], Exception]:
    return lambda i: error(f"index {i} is out of bounds for dimension {dim} with size {size}")


def out_of_self(i: int) -> Exception:
    return IndexError("index out of range in self")


def gather(work: KernelBuilder, at: At, x: Node, dim: int, index: Node, **_: Any) -> Expr:
    if not at.place:
        raise Unfit("a gather from one number")
    dim, size = dim % len(at.place), static_shape(x)[dim]
    found = index_of(work, index, at, 0, size, out_of_bounds(RuntimeError, size, dim))
    return work.value(x, with_index(at.place, dim, looked_up(found)), at.mask)


def index_select(work: KernelBuilder, at: At, x: Node, dim: int, index: Node) -> Expr:
    if not static_shape(index) or not at.place:
        raise Unfit("an index that is one number")
    here = At((at.place[dim],), at.mask)
    found = index_of(work, index, here, 0, static_shape(x)[dim], out_of_self)
    return work.value(x, with_index(at.place, dim, looked_up(found)), at.mask)


def embedding(work: KernelBuilder, at: At, weight: Node, index: Node, *_: Any) -> Expr:
    here = At(at.place[:-1], at.mask)
    found = index_of(work, index, here, 0, static_shape(weight)[0], out_of_self)
    return work.value(weight, (looked_up(found), at.place[-1]), at.mask)


def scatter_element(work: KernelBuilder, at: At, x: Node, dim: int, index: Node, new: Any) -> Expr:
    """Return an element of ``x`` with one element of each row replaced."""
    dim, shape = dim % max(1, len(at.place)), list(static_shape(x))
    if not shape or static_shape(index) != (*shape[:dim], 1, *shape[dim + 1 :]):
        raise Unfit("elements that may be the same")
    here = At(with_index(at.place, dim, FIRST), at.mask)
    found = index_of(
        work, index, here, 0, shape[dim], out_of_bounds(RuntimeError, shape[dim], dim)
    )
    old = work.value(x, at.place, at.mask)
    if isinstance(new, Node):
        value: Expr = cast(work.value(new, here.place, at.mask), old.dtype)
    else:
        value = number(as_given(new), old.dtype)
    return function_of("where", function_of("eq", work.position(at.place[dim]), found), value, old)


def index(work: KernelBuilder, at: At, x: Node, asked: Sequence[Node | None]) -> Expr:
    return work.value(x, place_of_indexed(work, at, static_shape(x), asked), at.mask)


def place_of_indexed(
    work: KernelBuilder, at: At, size: Sequence[int], asked: Sequence[Node | None]
) -> Place:
    """Return the place of an indexed tensor of this size. A negative index counts from the end."""
    indices = {d: i for d, i in enumerate(asked) if i is not None}
    first, shape = together(asked)
    behind = first + len(shape)
    common, rest = at.place[first:behind], iter([*at.place[:first], *at.place[behind:]])
    where = []
    for d, n in enumerate(size):
        if d not in indices:
            where.append(next(rest))
            continue
        here = At(place_of_expanded(static_shape(indices[d]), common), at.mask)
        found = index_of(
            work, indices[d], here, -n, n, out_of_bounds(IndexError, n, list(indices).index(d))
        )
        where.append(looked_up(wrapped(work, found, n)))
    return tuple(where)


def together(asked: Sequence[Node | None]) -> tuple[int, tuple[int, ...]]:
    """Return the position and the shape of dimensions that are indexed together: they replace the
    first of them, or come first of all if others are between them."""
    dims = [d for d, i in enumerate(asked) if i is not None]
    shape = broadcast_shape(*[static_shape(i) for i in asked if i is not None])
    return (dims[0] if dims[-1] - dims[0] + 1 == len(dims) else 0), tuple(shape)


# --- cut, padded, joined ---


def value_or_fill(
    work: KernelBuilder,
    x: Node,
    place: Place,
    inside: Expr | None,
    mask: Expr | None,
    value: Any = 0,
) -> Expr:
    """Return the value if the place is ``inside``, else the fill value."""
    found = work.value(x, place, work.both([mask, inside]))
    return (
        found
        if inside is None
        else function_of("where", inside, found, number(value, found.dtype))
    )


def constant_pad(work: KernelBuilder, at: At, x: Node, pad: Sequence[int], value: Any = 0) -> Expr:
    place, tests = at.place, []
    for i in range(len(pad) // 2):
        d = len(place) - 1 - i
        index = place[d].shifted(-pad[2 * i])
        place = with_index(place, d, index)
        tests.append(work.inside(index, 0, static_shape(x)[d]))
    return value_or_fill(work, x, place, work.both(tests), at.mask, Given(value))


def slice_backward(
    work: KernelBuilder, at: At, g: Node, sizes: Any, dim: int, start: int, end: int, step: int
) -> Expr:
    first, rest = divmod(first_of(start, sizes[dim]), step)
    index, gap = divide_index(at.place[dim], step, work.extents)
    index = index.shifted(-first)
    tests = [work.inside(gap, rest, rest + 1), work.inside(index, 0, static_shape(g)[dim])]
    return value_or_fill(work, g, with_index(at.place, dim, index), work.both(tests), at.mask)


def scattered_slice(
    work: KernelBuilder,
    at: At,
    x: Node,
    src: Node,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Expr:
    """Return an element of a tensor with a slice replaced."""
    size = static_shape(x)[dim]
    index, gap = divide_index(at.place[dim].shifted(-first_of(start, size)), step, work.extents)
    tests = [work.inside(gap, 0, 1), work.inside(index, 0, static_shape(src)[dim])]
    return new_or_old(work, at, x, src, with_index(at.place, dim, index), work.both(tests))


def scattered_row(work: KernelBuilder, at: At, x: Node, src: Node, dim: int, index: int) -> Expr:
    """Return an element of a tensor with a row replaced."""
    index %= static_shape(x)[dim]
    inside = work.inside(at.place[dim], index, index + 1)
    return new_or_old(work, at, x, src, without(at.place, dim), inside)


def new_or_old(
    work: KernelBuilder, at: At, old: Node, new: Node, place: Place, inside: Expr | None
) -> Expr:
    """Return the new value's element here if the place is ``inside``, else the old one's."""
    found = work.value(new, place, work.both([at.mask, inside]))
    if inside is None:
        return found
    kept = work.value(old, at.place, at.mask)
    return function_of("where", inside, cast(found, kept.dtype), kept)


def select_backward(
    work: KernelBuilder, at: At, g: Node, sizes: Any, dim: int, index: int
) -> Expr:
    index %= sizes[dim]
    inside = work.inside(at.place[dim], index, index + 1)
    return value_or_fill(work, g, without(at.place, dim), inside, at.mask)


def without(place: Place, dim: int) -> Place:
    dim %= len(place)
    return (*place[:dim], *place[dim + 1 :])


def cat(work: KernelBuilder, at: At, parts: Sequence[Node], dim: int = 0) -> Expr:
    ends = list(itertools.accumulate([static_shape(x)[dim] for x in parts]))
    index = at.place[dim]
    return part_of_cat(work, at, parts, ends, index, lambda i: with_index(at.place, dim, i))


def stack(work: KernelBuilder, at: At, parts: Sequence[Node], dim: int = 0) -> Expr:
    rest = without(at.place, dim)
    ends = range(1, len(parts) + 1)
    return part_of_cat(work, at, parts, ends, at.place[dim], lambda i: rest)


#: most parts: to find the part of each element takes up to nine times as long as to copy many
#: parts one by one
MOST = 4


def places_beside(place: Place, parts: Sequence[Node], dim: int) -> list[Place]:
    """Return the places of parts of one shape in their join along a dimension."""
    size = static_shape(parts[0])[dim]
    return [with_index(place, dim, place[dim].shifted(i * size)) for i in range(len(parts))]


def places_on_top(place: Place, parts: Sequence[Node], dim: int) -> list[Place]:
    """Return the places of parts along a new dimension."""
    dim %= len(place) + 1
    return [(*place[:dim], FIRST.shifted(i), *place[dim:]) for i in range(len(parts))]


#: op that joins parts -> their places in the result, if they are of one shape
JOINS: dict[Any, Callable[..., list[Place]]] = {
    aten.cat.default: places_beside,
    aten.stack.default: places_on_top,
}


def part_of_cat(
    work: KernelBuilder,
    at: At,
    parts: Sequence[Node],
    ends: Sequence[int],
    index: Index,
    place: Callable[[Index], Place],
) -> Expr:
    """Return the element of the part that ``index`` lies in; ``ends`` are the parts' ends."""
    if len(parts) > MOST:
        raise Unfit("many parts")
    result: Expr | None = None
    for x, start, end in reversed(list(zip(parts, [0, *ends], ends, strict=False))):
        mask = work.both([at.mask, work.inside(index, start, end)])
        value = work.value(x, place(index.shifted(-start)), mask)
        if result is None:
            result = value
        elif value.dtype is not result.dtype:
            raise Unfit("parts of several dtypes")
        elif before := work.inside(index, 0, end):
            result = function_of("where", before, value, result)
        else:
            result = value
    assert result is not None
    return result


def triangle(fn: str) -> Callable[..., Expr]:
    def rule(work: KernelBuilder, at: At, x: Node, diagonal: int = 0) -> Expr:
        past = (at.place[-1] + at.place[-2] * -1).shifted(-diagonal)
        return value_or_fill(work, x, at.place, work.test(fn, past, 0), at.mask)

    return rule


#: op -> its rule
TAKEN: dict[Any, Callable[..., Expr]] = {
    aten.gather.default: gather,
    aten.index_select.default: index_select,
    aten.embedding.default: embedding,
    aten.index.Tensor: index,
    aten.scatter.src: scatter_element,
    aten.scatter.value: scatter_element,
    aten.constant_pad_nd.default: constant_pad,
    aten.slice_backward.default: slice_backward,
    aten.select_backward.default: select_backward,
    aten.slice_scatter.default: scattered_slice,
    aten.select_scatter.default: scattered_row,
    aten.cat.default: cat,
    aten.stack.default: stack,
    aten.tril.default: triangle("le"),
    aten.triu.default: triangle("ge"),
}

# --- tensors that are made of where their elements are ---


def arange(work: KernelBuilder, n: Node, place: Place) -> Expr:
    start, _, step = arange_bounds(n)
    return work.position((place[0] * step).shifted(start))


def eye(work: KernelBuilder, n: Node, place: Place) -> Expr:
    return work.test("eq", place[0] + place[1] * -1, 0)


IOTAS: dict[Any, Callable[[KernelBuilder, Node, Place], Expr]] = {
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), arange),
    **dict.fromkeys((aten.eye.default, aten.eye.m), eye),
}


def arange_bounds(n: Node) -> tuple[Any, Any, Any]:
    """Return start, end and step of an arange."""
    args = n.args if len(n.args) > 1 else (0, *n.args)
    return (*args, 1)[:3]


def iota(n: Node) -> bool:
    """Return whether a node is exactly a range of its positions."""
    if n.target not in IOTAS:
        return False
    if IOTAS[n.target] is eye:
        return True
    numbers = arange_bounds(n)
    dtype = n.meta["val"].dtype
    most = round(2 / torch.finfo(dtype).eps) if dtype.is_floating_point else torch.iinfo(dtype).max
    return all([type(i) is int and abs(i) <= min(most, 2**31 - 1) for i in numbers])

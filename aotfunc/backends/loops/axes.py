"""Make the axes of a kernel, and place values along them, in memory and inside bounds.

``factors`` are the extents of the axes of each dimension, in order of appearance; they may say in
advance that a dimension is several axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ...trace.nested import with_items
from .ir import Access, Expr, Given, Load, Position, Ramp, Unfit, function_of, number, wide
from .places import FIRST, Index, Place, Split, bounds, covers, matched, regrouped
from .views import static_shape


class Axes:
    """The axes of a kernel and its accesses to memory."""

    def __init__(self, factors: list[list[int]], integer: torch.dtype) -> None:
        self.factors = factors
        self.integer = integer  # the dtype of indices
        self.dimensions = 0
        self.extents: list[int] = []
        self.reduced: tuple[int, ...] = ()
        self.accesses: list[Access] = []
        self.ramps: list[Ramp] = []
        self.walked: list[Place] = []  # access -> its place
        self.values: dict[Any, Any] = {}

    def axes(self, sizes: Sequence[int]) -> list[int]:
        """Make new axes for dimensions of these sizes."""
        first = len(self.extents)
        for size in sizes:
            if self.dimensions == len(self.factors):
                self.factors.append([size])
            if math.prod(self.factors[self.dimensions]) != size:
                raise Unfit("axes of other parts")
            self.extents += self.factors[self.dimensions]
            self.dimensions += 1
        return list(range(first, len(self.extents)))

    def split(self, axis: int, inner: int) -> None:
        """Remember, for the next attempt, that an axis becomes two."""
        for parts in self.factors:
            if axis < len(parts):
                parts[axis : axis + 1] = [parts[axis] // inner, inner]
                return
            axis -= len(parts)

    def whole(self, place: Place, n: Node) -> bool:
        """Return whether a kernel here computes each element of the value exactly once."""
        axes = [k for index in place for k in index.axes]
        sizes = zip(place, static_shape(n), strict=True)
        return len({*axes}) == len(axes) and all(  # a diagonal has one axis for two dimensions
            [covers(index, size, self.extents) for index, size in sizes]
        )

    def root(self, shape: tuple[int, ...]) -> Place:
        """Place a result that no node of this kernel reads; return its place."""
        sizes = [size for size in shape if size != 1]
        if not self.extents:
            self.axes(sizes)
        every = range(len(self.extents))
        split = None
        for axes in (list(every), [k for k in every if k not in self.reduced]):
            try:
                if (place := matched(sizes, axes, self.extents)) is not None:
                    return with_unit_dims(place, shape)
            except Split as found:
                split = split or found
        if split:
            raise split
        raise Unfit("results of other sizes")

    def bind(self, sizes: list[int], place: Place) -> Place:
        """Place reduced dimensions of these sizes. Raises Unfit if other axes are reduced."""
        taken = self.reached(place)
        free = [k for k in range(len(self.extents)) if k not in taken]
        if not free and not self.reduced:
            free = self.axes(sizes)
        if self.reduced not in ((), tuple(free)):
            raise Unfit("reductions over other axes")
        found = matched(sizes, free, self.extents)
        if found is None:
            raise Unfit("reductions over other axes")
        self.reduced = tuple(free)
        return found

    def reached(self, place: Place) -> set[int]:
        """Return the axes that a place varies along."""
        found: set[int] = set()
        for index in place:
            found.update(index.axes)
            for e, _ in index.found:
                found |= self.axes_of(e)
        return found

    def axes_of(self, e: Expr) -> set[int]:
        found = set().union(*[self.axes_of(a) for a in e.args])
        if isinstance(e, Load | Position):
            walked = self.accesses[e.access] if isinstance(e, Load) else self.ramps[e.ramp]
            found |= {k for k, s in enumerate(walked.strides) if s}
        return found

    # --- memory ---

    def access(self, n: Node, place: Place) -> int:
        strides, start = [0] * len(self.extents), 0
        for index, stride in zip(place, n.meta["val"].stride(), strict=True):
            start += index.start * stride
            for k, step in index.steps:
                if isinstance(k, int):
                    strides[k] += step * stride
        self.accesses.append(Access(n.name, n.meta["val"].dtype, tuple(strides), n, start))
        self.walked.append(place)
        return len(self.accesses) - 1

    def load(self, n: Node, place: Place, mask: Expr | None) -> Expr:
        shift = self.shift(n, place)
        return Load(wide(n.meta["val"].dtype), self.access(n, place), shift, mask)

    def shift(self, n: Node, place: Place) -> Expr | None:
        """Return the offset that looked-up indices add to an element."""
        shift: Expr | None = None
        for index, stride in zip(place, n.meta["val"].stride(), strict=True):
            for e, step in index.found:
                more = self.times(e, step * stride)
                shift = more if shift is None else shift + more
        return shift

    def times(self, e: Expr, n: int) -> Expr:
        if (e, n) not in self.values:
            self.values[e, n] = e if n == 1 else e * number(Given(n), self.integer)
        return self.values[e, n]

    # --- positions as numbers ---

    def position(self, index: Index) -> Expr:
        """Return an index as an integer expression."""
        if index not in self.values:
            self.values[index] = self.affine(index)
            for e, step in index.found:
                self.values[index] += e * number(Given(step), self.integer)
        return self.values[index]

    def affine(self, index: Index) -> Expr:
        if not index.axes:
            return number(Given(index.start), self.integer)
        strides = [0] * len(self.extents)
        for k, step in index.steps:
            if isinstance(k, int):
                strides[k] = step
        self.ramps.append(Ramp(tuple(strides), index.start))
        return Position(self.integer, len(self.ramps) - 1)

    def inside(self, index: Index, low: int, high: int) -> Expr | None:
        """Return the condition ``low <= index < high``; None if it always holds."""
        least, most = (low - 1, high) if index.found else bounds(index, self.extents)
        above = self.test("ge", index.shifted(-low), 0) if least < low else None
        below = self.test("lt", index, high) if most >= high else None
        return self.both([above, below])

    def test(self, fn: str, index: Index, n: int) -> Expr:
        if (fn, index, n) not in self.values:
            limit = number(Given(n), self.integer)
            self.values[fn, index, n] = function_of(fn, self.position(index), limit)
        return self.values[fn, index, n]

    def both(self, tests: Sequence[Expr | None]) -> Expr | None:
        """Return the conjunction of these conditions, None ignored; None if there are none."""
        result: Expr | None = None
        for test in tests:
            if test is None or result is None:
                result = result if test is None else test
            elif ("and", result, test) not in self.values:
                key = ("and", result, test)
                result = self.values[key] = function_of("bitwise_and", result, test)
            else:
                result = self.values["and", result, test]
        return result


def with_unit_dims(place: Place, shape: Sequence[int]) -> Place:
    """Return the place in all dimensions from that in the dimensions larger than 1."""
    rest = iter(place)
    return tuple([FIRST if size == 1 else next(rest) for size in shape])


def merged_in_memory(
    place: Place, shape: Sequence[int], source: Node, extents: Sequence[int]
) -> Place:
    """Merge dimensions as :func:`regrouped`, in memory: neighbours of equal steps are one."""
    have, strides = static_shape(source), source.meta["val"].stride()
    sizes, last = [1], [0]
    for d, (size, stride) in enumerate(zip(have, strides, strict=True)):
        if size == 1:
            continue
        if sizes[-1] != 1 and strides[last[-1]] == size * stride:
            sizes[-1] *= size
            last[-1] = d
        else:
            sizes.append(size)
            last.append(d)
    found = with_items([FIRST] * len(have), last[1:], regrouped(place, shape, sizes[1:], extents))
    return tuple(found)

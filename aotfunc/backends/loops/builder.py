"""Build one kernel of nodes of an aten graph: each value becomes an expression over its axes.

A value is asked for at a *place*: an index into each of its dimensions. Places are derived from a
result to its arguments, through broadcasting, views and look-ups, so one value may be computed at
two places. Under a *mask* a place may lie outside of the tensor, and its value be any number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.fx import Node

from .axes import Axes, merged_in_memory
from .blocks import block_sums
from .complexes import in_parts
from .constants import constant
from .division import STEPWISE
from .dtypes import NARROW, as_given, cast, integer, working
from .indexed import IOTAS, JOINS, MOST, TAKEN, At, iota
from .ir import (
    ROUNDED,
    SLOW,
    Access,
    Apply,
    Cast,
    Expr,
    Given,
    Kernel,
    Prefix,
    Ramp,
    Reduce,
    Requirement,
    Store,
    Unfit,
    number,
    short,
    wide,
)
from .members import seen_through
from .places import FIRST, Index, Place, Split, index_along
from .pointwise import COMPLEX, FACTORS, POWERS, ROUND_FIRST, RULES
from .reductions import REDUCTIONS
from .resized import RESIZED, SUMMED
from .scans import SCANS, reversed_walk
from .scatter import ADDED
from .steps import FEW, MANY
from .views import VIEWS, place_of_expanded, source_of, source_place, static_shape
from .waste import check_one_way, often

Walked = TypeVar("Walked", Access, Ramp)


def build_kernel(nodes: Sequence[Node], stored: Sequence[Node], name: str) -> Kernel:
    """Return the kernel that computes these nodes, in the graph's order, and stores some of them.
    The ``tensor`` of each access is its node. Raises Unfit if one kernel cannot."""
    factors: list[list[int]] = []
    for _ in range(8):
        work = KernelBuilder(nodes, factors)
        try:
            stores = [work.stores(n) for n in reversed(stored)]
            return work.kernel(name, list(itertools.chain(*reversed(stores))))
        except Split as split:
            work.split(split.axis, split.inner)
    raise Unfit("axes of too many parts")


class KernelBuilder(Axes):
    """The state of a kernel while it is built."""

    def __init__(self, nodes: Sequence[Node], factors: list[list[int]]) -> None:
        super().__init__(factors, integer(nodes))
        self.nodes = dict.fromkeys(nodes)
        self.places: dict[Node, list[tuple[Place, Expr | None]]] = {}  # value -> its place
        self.slow: set[Node] = set()
        self.checks: dict[Any, Requirement] = {}
        self.turned: bool | None = None  # whether scans run from the end of their axis

    def stores(self, n: Node) -> list[Store]:
        if n.target is block_sums:
            return [self.added_up(n)]
        if n.target in ADDED:
            return [self.scattered(n)]
        whole = [p for p, mask in self.places.get(n, ()) if mask is None and self.whole(p, n)]
        if n.target in JOINS and not whole and (parts := self.in_parts(n)):
            return parts
        place = whole[0] if whole else self.root(static_shape(n))
        return [self.store(n, place, self.value(n, place))]

    def store(self, n: Node, place: Place, value: Expr) -> Store:
        if isinstance(value, Cast) and (value.value.dtype, value.dtype) == NARROW:
            value = value.value  # memory is wide enough
        if isinstance(value, Apply) and value.fn == ROUNDED.get(n.meta["val"].dtype):
            (value,) = value.args  # memory rounds
        return Store(self.access(n, place), value)

    def in_parts(self, n: Node) -> list[Store]:
        """Store parts of one shape beside each other, if they are many or computed here."""
        parts, dim = (*n.args, n.kwargs.get("dim", 0))[:2]
        shapes = {static_shape(x) for x in parts}
        if len(shapes) > 1 or not (len(parts) > MOST or any(x in self.nodes for x in parts)):
            return []
        try:
            place = self.root(*shapes)
        except Unfit:
            return []
        dtype = n.meta["val"].dtype
        return [
            self.store(n, where, cast(self.value(x, place), dtype))
            for x, where in zip(parts, JOINS[n.target](place, parts, dim), strict=True)
        ]

    def added_up(self, n: Node) -> Store:
        """Return a value summed over blocks of the axes that are not reduced."""
        x, dims = n.args
        whole = [p for p, mask in self.places.get(x, ()) if mask is None and self.whole(p, x)]
        place = whole[0] if whole else self.root(static_shape(x))
        inner = tuple(sorted(self.reached(place[dims:])))
        if not inner or self.reduced not in ((), inner) or not self.reached(place[:dims]):
            raise Unfit("blocks of other rows")
        self.reduced = inner
        return Store(self.access(n, (FIRST, *place[dims:])), self.value(x, place), blocks=True)

    def scattered(self, n: Node) -> Store:
        """Return a value to add at computed indices, at each point or each outer one."""
        value, shape, where = ADDED[n.target](n)
        place = self.root(shape)
        found = self.value(value, place_of_expanded(static_shape(value), place))
        target = where(self, place)
        shift = self.shift(n, target)
        if shift is None:
            raise Unfit("one index for all points")
        size = n.meta["val"].numel()
        return Store(self.access(n, target), found, shift=shift, size=size)

    def value(self, n: Node, place: Place, mask: Expr | None = None) -> Expr:
        found = self.values.get((n, place, mask))
        if found is None:
            found = self.values[n, place, mask] = self.made(n, place, mask)
        return found

    def made(self, n: Node, place: Place, mask: Expr | None) -> Expr:
        if (fixed := constant(n)) is not None:
            dtype = n.meta["val"].dtype
            return number(bool(fixed) if dtype is torch.bool else as_given(fixed), dtype)
        if iota(n):
            return cast(IOTAS[n.target](self, n, place), n.meta["val"].dtype)
        if (source := source_of(n)) is not None:
            return self.value(source, self.behind(n, source, place), mask)
        if n not in self.nodes:
            return self.load(n, place, mask)
        self.places.setdefault(n, []).append((place, mask))
        if n.target in REDUCTIONS:
            return self.reduction(n, place, mask)
        if n.target in SCANS:
            return self.scan(n, place, mask)
        if n.target is block_sums or n.target in ADDED:
            raise Unfit("what another kernel adds up")
        if taken := TAKEN.get(n.target) or RESIZED.get(n.target):
            if n.target in SUMMED:
                self.slow.add(n)
            return cast(taken(self, At(place, mask), *n.args, **n.kwargs), n.meta["val"].dtype)
        return self.pointwise(n, place, mask)

    def behind(self, n: Node, source: Node, place: Place) -> Place:
        if VIEWS.get(n.target, source_place) is None and source_of(source) is None:
            if source not in self.nodes and not seen_through(source):
                return merged_in_memory(place, static_shape(n), source, self.extents)
        return source_place(n, place, self.extents)

    def reduction(self, n: Node, place: Place, mask: Expr | None) -> Expr:
        if mask is not None and not self.axes_of(mask) <= self.reached(place):
            raise Unfit("a reduction over an axis that a mask varies along")
        asked = REDUCTIONS[n.target](*n.args, **n.kwargs)
        x: Node = n.args[0]  # type: ignore[assignment]
        out, shape = n.meta["val"].dtype, static_shape(x)
        every = range(len(shape))
        dims = {every[d] for d in asked.dims if shape} if asked.dims else set(every)
        sizes = [shape[d] for d in sorted(dims) if shape[d] != 1]
        bound = iter(self.bind(sizes, place) if sizes else ())
        kept = iter(place if asked.keepdim else ())
        rest = iter(place)
        where: list[Index] = []
        for d, size in enumerate(shape):
            if asked.keepdim:
                axis = next(kept)
            elif d not in dims:
                axis = next(rest)
            where.append((next(bound) if size != 1 else FIRST) if d in dims else axis)
        truth = asked.fn in ("any", "all")  # any and all of uint8 are uint8
        if (out is torch.bool and not truth) or (out in ROUNDED and asked.fn == "prod"):
            raise Unfit(f"{n.target} of {out}")
        dtype = torch.bool if truth else wide(out)
        value = self.value(x, tuple(where), mask)
        if out in ROUNDED and x.meta["val"].dtype is not out:
            value = cast(value, out)
        value = cast(value, dtype)
        result = Reduce(dtype, asked.fn, value) if sizes else of_one(asked.fn, value)
        if asked.mean:
            result = result / Given(math.prod([shape[d] for d in dims]))
        return cast(result, out)

    def scan(self, n: Node, place: Place, mask: Expr | None) -> Expr:
        x, dim = n.args[:2]
        out = n.meta["val"].dtype
        value = cast(cast(self.value(x, place, mask), out), wide(out))
        size = static_shape(n)[dim] if place else 1
        if size == 1:
            return cast(of_one(SCANS[n.target], value), out)
        index = place[dim]
        (axis, *more) = index.axes or [-1]
        forward, backward = index_along(axis), index_along(axis, -1).shifted(size - 1)
        if more or index not in (forward, backward) or self.extents[axis] != size:
            raise Unfit("a scan of a part, or along several axes")
        others = (*place[:dim], *place[dim:][1:])
        if axis in self.reached(others) or (mask is not None and axis in self.axes_of(mask)):
            raise Unfit("a scan along which another index or a mask varies")
        if self.reduced not in ((), (axis,)) or self.turned is (index == forward):
            raise Unfit("scans along other axes, or the other way")
        self.reduced, self.turned = (axis,), index == backward
        return cast(Prefix(value.dtype, SCANS[n.target], value), out)

    def pointwise(self, n: Node, place: Place, mask: Expr | None) -> Expr:
        rule, out = RULES[n.target], n.meta["val"].dtype
        common = working(rule.kind, n, out)
        if common.is_complex and n.target not in COMPLEX:
            raise Unfit(f"{n.target} of {common}")
        if common in ROUNDED and n.target in STEPWISE and isinstance(n.args[1], Node):
            raise Unfit(f"{n.target} by a tensor of {common}")
        dtype = wide(common)
        read: list[Expr] = []

        def given(i: int | str, a: Any) -> Any:
            if not isinstance(a, Node):
                if common in ROUNDED and (rule.kind == "compare" or n.target in ROUND_FIRST):
                    a = number(a, common).value
                return as_given(a) if dtype.is_floating_point or dtype.is_complex else a
            value = self.value(a, place_of_expanded(static_shape(a), place), mask)
            if (rule.kind == "where" and i == 0) or (rule.kind == "masked" and i == 1):
                value = cast(value, torch.bool)
            else:
                as_it_is = n.target in FACTORS and i == 1 and not static_shape(a)
                value = cast(value if as_it_is else cast(value, common), dtype)
            read.append(value)
            return value

        args = [given(i, a) for i, a in enumerate(n.args)]
        kwargs = {k: given(k, a) for k, a in n.kwargs.items()}
        body = rule.body
        if common is torch.float16 and n.target in POWERS and n.args[1] in (0.5, -0.5):
            body = POWERS[n.target]
        result = body(*args, **kwargs)
        if is_slow(result, set(read)):
            self.slow.add(n)
        return cast(result, out)

    # --- the kernel ---

    def kernel(self, name: str, stores: list[Store]) -> Kernel:
        rank = len(self.extents)
        order = [k for k in range(rank) if k not in self.reduced] + list(self.reduced)
        rows = math.prod([self.extents[k] for k in order if k not in self.reduced])
        if self.turned is not None and rows < FEW and math.prod(self.extents) >= MANY:
            if len(self.nodes) > 1:
                raise Unfit("what other threads may compute beside a long scan")

        def ordered(walked: Walked) -> Walked:
            strides, start = (*walked.strides, *[0] * (rank - len(walked.strides))), walked.start
            if self.turned:
                strides, start = reversed_walk(strides, start, self.reduced[0], self.extents)
            return replace(walked, strides=tuple([strides[k] for k in order]), start=start)

        accesses, ramps = list(map(ordered, self.accesses)), list(map(ordered, self.ramps))
        outer = set(range(rank - len(self.reduced)))
        for s in stores:
            walked = accesses[s.access]
            if s.shift is not None and walked.start:  # the memory is cleared from there on
                raise Unfit("values that are added along with a scan from the end")
            if s.blocks or s.shift is not None:
                continue
            if not outer <= {k for k, stride in enumerate(walked.strides) if stride}:
                raise Unfit("a result that is smaller than the kernel, or overlaps itself")
        for n in self.places:
            often(self, n, set(order[: len(outer)]))
        check_one_way(self)
        comments = [comment(n) for n in self.nodes]
        extents = tuple([self.extents[k] for k in order])
        kernel = Kernel(
            name,
            extents,
            len(self.reduced),
            tuple(accesses),
            tuple(stores),
            tuple(ramps),
            checks=tuple(self.checks.values()),
            comments=tuple(comments),
        )
        return in_parts(kernel)


def of_one(fn: str, value: Expr) -> Expr:
    """Return the reduction of one value. A sum begins with 0, so that of -0 is 0."""
    return value + 0 if fn == "sum" else value


def is_slow(e: Expr, given: set[Expr]) -> bool:
    """Return whether a value takes long to compute from ``given`` ones."""
    if e in given:
        return False
    given.add(e)
    return (isinstance(e, Apply) and e.fn in SLOW) or any([is_slow(a, given) for a in e.args])


def comment(n: Node) -> str:
    val = n.meta["val"]
    args = [str(a) for a in n.args] + [f"{k}={v}" for k, v in n.kwargs.items()]
    return f"{n.name}: {short(val.dtype)} = {n.target}({', '.join(args)})"

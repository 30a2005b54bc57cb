"""Nodes of an aten graph as one kernel: each value an expression over the kernel's axes.

A value is asked for at a *place*: an index into each of its dimensions. Places are derived from
a result to its arguments, through broadcasting, views and look-ups, so the same value may be
computed at two places; under a *mask*, where it may lie outside of its tensor, and is any number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .classes import class_of
from .constants import constant
from .indexed import IOTAS, TAKEN, At, iota
from .ir import (
    ROUNDED,
    SLOW,
    Access,
    Apply,
    Cast,
    Check,
    Const,
    Expr,
    Given,
    Kernel,
    Load,
    Position,
    Ramp,
    Reduce,
    Store,
    Unfit,
    apply,
    number,
    short,
    wide,
)
from .places import FIRST, Index, Place, Split, along, bounds, covers, matched, regrouped
from .pointwise import ROUND_FIRST, RULES
from .reductions import REDUCTIONS
from .views import VIEWS, behind, shape_of, source_of

#: dtypes of the tensors that kernels compute
DTYPES = (
    *(torch.float32, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float16),
)

#: integers of these dtypes are in lanes as the first and in memory as the second, so that there
#: are as many of them as of floats
NARROW = (torch.int32, torch.int64)


def computed(n: Any) -> bool:
    """Whether a node may be part of a kernel: there is a rule for it, and it is a plain tensor on
    the CPU made of such."""
    return (
        isinstance(n, Node)
        and n.op == "call_function"
        and (n.target in RULES or n.target in REDUCTIONS or n.target in TAKEN)
        and plain(n)
        and all(map(plain, n.all_input_nodes))
    )


def plain(n: Node) -> bool:
    val = n.meta.get("val")
    return (
        isinstance(val, Tensor)
        and val.device.type == "cpu"
        and val.dtype in DTYPES
        and val.numel() != 0  # there is no memory to read
    )


def seen_through(n: Any) -> bool:
    """Whether a kernel that reads this node reads its argument, or a number, in its place."""
    return isinstance(n, Node) and (
        source_of(n) is not None
        or constant(n) is not None
        or iota(n)
        or n.target is torch.ops.aten.unbind.int
    )


def lower(nodes: Sequence[Node], stored: Sequence[Node], name: str) -> Kernel:
    """The kernel that computes these nodes, in the graph's order, and stores some of them. The
    ``tensor`` of each access is its node. Raises Unfit where one kernel does not do."""
    factors: list[list[int]] = []
    for _ in range(8):
        work = Lowering(nodes, factors)
        try:
            stores = [work.store(n) for n in reversed(stored)]
            return work.kernel(name, stores[::-1])
        except Split as split:
            work.split(split.axis, split.inner)
    raise Unfit("axes of too many parts")


class Lowering:
    """``factors`` are the extents of the axes that stand for each dimension, in the order in which
    these come up; it may say in advance that one is several axes."""

    def __init__(self, nodes: Sequence[Node], factors: list[list[int]]) -> None:
        self.nodes = dict.fromkeys(nodes)
        self.factors = factors
        self.dimensions = 0
        self.extents: list[int] = []
        self.reduced: tuple[int, ...] = ()
        self.accesses: list[Access] = []
        self.ramps: list[Ramp] = []
        self.walked: list[Place] = []  # where each access lies
        self.values: dict[Any, Expr] = {}
        self.places: dict[Node, list[tuple[Place, Expr | None]]] = {}
        self.slow: set[Node] = set()
        self.checks: dict[Any, Check] = {}
        self.integer = integer(nodes)

    def axes(self, sizes: Sequence[int]) -> list[int]:
        """New axes for dimensions of these sizes."""
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
        """Say for the next time that an axis is two."""
        for parts in self.factors:
            if axis < len(parts):
                parts[axis : axis + 1] = [parts[axis] // inner, inner]
                return
            axis -= len(parts)

    # --- places ---

    def store(self, n: Node) -> Store:
        whole = [p for p, mask in self.places.get(n, ()) if mask is None and self.whole(p, n)]
        place = whole[0] if whole else self.root(shape_of(n))
        value = self.value(n, place)
        if isinstance(value, Cast) and (value.value.dtype, value.dtype) == NARROW:
            value = value.value  # memory is wide enough
        return Store(self.access(n, place), value)

    def whole(self, place: Place, n: Node) -> bool:
        sizes = zip(place, shape_of(n), strict=True)
        return all([covers(index, size, self.extents) for index, size in sizes])

    def root(self, shape: tuple[int, ...]) -> Place:
        """Where a result lies that nothing in this kernel reads."""
        sizes = [size for size in shape if size != 1]
        if not self.extents:
            self.axes(sizes)
        every = range(len(self.extents))
        split = None
        for axes in (list(every), [k for k in every if k not in self.reduced]):
            try:
                if (place := matched(sizes, axes, self.extents)) is not None:
                    return spread(place, shape)
            except Split as found:
                split = split or found
        if split:
            raise split
        raise Unfit("results of other sizes")

    def reached(self, place: Place) -> set[int]:
        """The axes that a place varies along."""
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

    def position(self, index: Index) -> Expr:
        """An index as a number."""
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
        """Where an index is ``low`` at least and less than ``high``; None where that is
        everywhere."""
        least, most = (low - 1, high) if index.found else bounds(index, self.extents)
        above = self.test("ge", index.shifted(-low), 0) if least < low else None
        below = self.test("lt", index, high) if most >= high else None
        return self.both([above, below])

    def test(self, fn: str, index: Index, n: int) -> Expr:
        if (fn, index, n) not in self.values:
            limit = number(Given(n), self.integer)
            self.values[fn, index, n] = apply(fn, self.position(index), limit)
        return self.values[fn, index, n]

    def both(self, tests: Sequence[Expr | None]) -> Expr | None:
        """Where all of these hold that are not None; None where that is everywhere."""
        result: Expr | None = None
        for test in tests:
            if test is None or result is None:
                result = result if test is None else test
            elif ("and", result, test) not in self.values:
                key = ("and", result, test)
                result = self.values[key] = apply("bitwise_and", result, test)
            else:
                result = self.values["and", result, test]
        return result

    # --- values ---

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

    def value(self, n: Node, place: Place, mask: Expr | None = None) -> Expr:
        found = self.values.get((n, place, mask))
        if found is None:
            found = self.values[n, place, mask] = self.made(n, place, mask)
        return found

    def made(self, n: Node, place: Place, mask: Expr | None) -> Expr:
        if (fixed := constant(n)) is not None:
            return number(said(fixed), n.meta["val"].dtype)
        if iota(n):
            return cast(IOTAS[n.target](self, n, place), n.meta["val"].dtype)
        if (source := source_of(n)) is not None:
            return self.value(source, self.behind(n, source, place), mask)
        if n not in self.nodes:
            return self.load(n, place, mask)
        self.places.setdefault(n, []).append((place, mask))
        if n.target in REDUCTIONS:
            return self.reduction(n, place, mask)
        if n.target in TAKEN:
            return cast(
                TAKEN[n.target](self, At(place, mask), *n.args, **n.kwargs), n.meta["val"].dtype
            )
        return self.pointwise(n, place, mask)

    def behind(self, n: Node, source: Node, place: Place) -> Place:
        if VIEWS.get(n.target, behind) is None and source_of(source) is None:
            if source not in self.nodes and not seen_through(source):
                return in_memory(place, shape_of(n), source, self.extents)
        return behind(n, place, self.extents)

    def load(self, n: Node, place: Place, mask: Expr | None) -> Expr:
        shift: Expr | None = None
        for index, stride in zip(place, n.meta["val"].stride(), strict=True):
            for e, step in index.found:
                more = self.times(e, step * stride)
                shift = more if shift is None else shift + more
        return Load(wide(n.meta["val"].dtype), self.access(n, place), shift, mask)

    def times(self, e: Expr, n: int) -> Expr:
        if (e, n) not in self.values:
            self.values[e, n] = e if n == 1 else e * number(Given(n), self.integer)
        return self.values[e, n]

    def looked_up(
        self, n: Node, at: At, low: int, high: int, error: Callable[[int], Exception]
    ) -> Expr:
        """An element of a tensor of indices, which are in range. Raises Unfit where these are not
        in memory."""
        e = self.value(n, at.place, at.mask)
        if not isinstance(e, Load) or e.shift is not None:
            raise Unfit("indices that are computed")
        if e.dtype not in (torch.int64, torch.int32):
            raise Unfit(f"indices of {e.dtype}")
        memory = self.accesses[e.access].tensor
        if memory.target is not class_of and (n, low, high) not in self.checks:
            self.checks[n, low, high] = check(n, memory, low, high, error)
        key = (e, "index")
        if key not in self.values:
            self.values[key] = Load(self.integer, e.access, None, e.mask)
        return self.values[key]

    def wrapped(self, found: Expr, size: int) -> Expr:
        """An index that counts from the end where it is negative."""
        if (found, size, "wrapped") not in self.values:
            end = found + number(Given(size), self.integer)
            self.values[found, size, "wrapped"] = apply("where", found < 0, end, found)
        return self.values[found, size, "wrapped"]

    def reduction(self, n: Node, place: Place, mask: Expr | None) -> Expr:
        if mask is not None and not self.axes_of(mask) <= self.reached(place):
            raise Unfit("a reduction over an axis that a mask varies along")
        asked = REDUCTIONS[n.target](*n.args, **n.kwargs)
        x: Node = n.args[0]  # type: ignore[assignment]
        out, shape = n.meta["val"].dtype, shape_of(x)
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
        truth = asked.fn in ("any", "all")  # of bytes these are bytes, 0 or 1
        if (out is torch.bool and not truth) or (out in ROUNDED and asked.fn == "prod"):
            raise Unfit(f"{n.target} of {out}")
        dtype = torch.bool if truth else wide(out)
        value = self.value(x, tuple(where), mask)
        if out in ROUNDED and x.meta["val"].dtype is not out:
            value = cast(value, out)
        value = cast(value, dtype)
        result = Reduce(dtype, asked.fn, value) if sizes else value
        if asked.mean:
            result = result / Given(math.prod([shape[d] for d in dims]))
        return cast(result, out)

    def bind(self, sizes: list[int], place: Place) -> Place:
        """Where the reduced dimensions, of these sizes, lie. Raises Unfit where other axes are
        reduced already."""
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

    def pointwise(self, n: Node, place: Place, mask: Expr | None) -> Expr:
        rule, out = RULES[n.target], n.meta["val"].dtype
        common = working(rule.kind, n, out)
        dtype = wide(common)
        read: list[Expr] = []

        def given(i: int | str, a: Any) -> Any:
            if not isinstance(a, Node):
                if common in ROUNDED and (rule.kind == "compare" or n.target in ROUND_FIRST):
                    a = number(a, common).value
                return said(a) if dtype.is_floating_point else a
            value = self.value(a, aligned(place, shape_of(a)), mask)
            if (rule.kind == "where" and i == 0) or (rule.kind == "masked" and i == 1):
                value = cast(value, torch.bool)
            else:
                value = cast(value, dtype)
            read.append(value)
            return value

        args = [given(i, a) for i, a in enumerate(n.args)]
        kwargs = {k: given(k, a) for k, a in n.kwargs.items()}
        result = rule.body(*args, **kwargs)
        if slow(result, set(read)):
            self.slow.add(n)
        return cast(result, out)

    # --- the kernel ---

    def kernel(self, name: str, stores: list[Store]) -> Kernel:
        rank = len(self.extents)
        order = [k for k in range(rank) if k not in self.reduced] + list(self.reduced)

        def ordered(strides: tuple[int, ...]) -> tuple[int, ...]:
            strides = (*strides, *[0] * (rank - len(strides)))
            return tuple([strides[k] for k in order])

        accesses = [
            Access(a.name, a.dtype, ordered(a.strides), a.tensor, a.start) for a in self.accesses
        ]
        ramps = [Ramp(ordered(r.strides), r.start) for r in self.ramps]
        outer = set(range(rank - len(self.reduced)))
        for s in stores:
            walked = accesses[s.access]
            if not outer <= {k for k, stride in enumerate(walked.strides) if stride}:
                raise Unfit("a result that is smaller than the kernel, or overlaps itself")
        for n in self.places:
            self.often(n, set(order[: len(outer)]))
        self.one_way()
        comments = [comment(n) for n in self.nodes]
        extents = tuple([self.extents[k] for k in order])
        return Kernel(
            name,
            extents,
            len(self.reduced),
            tuple(accesses),
            tuple(stores),
            tuple(ramps),
            checks=tuple(self.checks.values()),
            comments=tuple(comments),
        )

    def often(self, n: Node, outer: set[int]) -> None:
        """Raise Unfit where a value would be computed again and again."""
        points = 0
        for place, _ in self.places[n]:
            axes = self.reached(place)
            if (axes or n.target in REDUCTIONS) and not axes >= outer:
                raise Unfit("a value that would be computed again and again")
            points += math.prod([self.extents[k] for k in axes])
        most = 5 if n in self.slow or n.target in REDUCTIONS else 16
        if points * 4 > most * math.prod(shape_of(n)):
            raise Unfit("a value that would be computed several times")

    def one_way(self) -> None:
        """Raise Unfit where a value is walked along in two ways, as sums over its rows and over
        its columns do: one of them would go through memory in large steps."""
        ways: dict[Node, set[Place]] = {
            n: {place for place, _ in places} for n, places in self.places.items()
        }
        for a, place in zip(self.accesses, self.walked, strict=True):
            ways.setdefault(a.tensor, set()).add(place)
        for places in ways.values():
            orders = {tuple([k for index in place for k in index.axes]) for place in places}
            for one, other in combinations(orders, 2):
                if [k for k in one if k in other] != [k for k in other if k in one]:
                    raise Unfit("a value read in two orders")


def spread(place: Place, shape: Sequence[int]) -> Place:
    """A place of the dimensions that are not of size 1, for all of them."""
    rest = iter(place)
    return tuple([FIRST if size == 1 else next(rest) for size in shape])


def in_memory(place: Place, shape: Sequence[int], source: Node, extents: Sequence[int]) -> Place:
    """As :func:`regrouped` for a tensor in memory: neighbouring dimensions that are walked in equal
    steps need not be told apart."""
    have, strides = shape_of(source), source.meta["val"].stride()
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
    found = [FIRST] * len(have)
    for d, index in zip(last[1:], regrouped(place, shape, sizes[1:], extents), strict=True):
        found[d] = index
    return tuple(found)


def check(n: Node, tensor: Node, low: int, high: int, error: Any) -> Check:
    """That of the elements of a view of a tensor in memory."""
    shape = shape_of(n)
    place: Place = tuple([along(d) for d in range(len(shape))])
    while n is not tensor:
        place = behind(n, place, shape)
        n = source_of(n)  # type: ignore[assignment]
    strides, start = [0] * len(shape), 0
    for index, stride in zip(place, n.meta["val"].stride(), strict=True):
        start += index.start * stride
        for d, step in index.steps:
            strides[d] += step * stride  # type: ignore[index]
    return Check(tensor, (shape, tuple(strides), start), low, high, error)


def integer(nodes: Sequence[Node]) -> torch.dtype:
    """The dtype of indices: one that fills as many lanes as the values do. Raises Unfit for
    tensors that are too large for it."""
    dtypes = {wide(n.meta["val"].dtype) for n in nodes}
    if torch.float64 in dtypes or (torch.int64 in dtypes and torch.float32 not in dtypes):
        return torch.int64
    for val in [m.meta["val"] for n in nodes for m in (n, *n.all_input_nodes)]:
        if sum([(size - 1) * s for size, s in zip(val.shape, val.stride(), strict=True)]) >> 31:
            return torch.int64
    return torch.int32


def slow(e: Expr, given: set[Expr]) -> bool:
    """Whether a value takes long to compute of these."""
    if e in given:
        return False
    given.add(e)
    return (isinstance(e, Apply) and e.fn in SLOW) or any([slow(a, given) for a in e.args])


def aligned(place: Place, shape: tuple[int, ...]) -> Place:
    """Where an argument of this shape lies that is broadcast to a result's place."""
    last = place[len(place) - len(shape) :]
    return tuple([FIRST if size == 1 else i for size, i in zip(shape, last, strict=True)])


def working(kind: str, n: Node, out: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in. Raises Unfit for one that its body is not meant for."""
    if kind in ("compare", "truth"):
        values = [a.meta["val"] if isinstance(a, Node) else a for a in n.args]
        common = values[0].dtype if len(values) == 1 else torch.result_type(*values)
        if common not in DTYPES:
            raise Unfit(f"{common} is not computed with")
        return torch.bool if kind == "truth" else common
    right = {
        "float": out.is_floating_point,
        "any": out is not torch.bool,
        "bits": not out.is_floating_point,
    }
    if not right.get(kind, True):
        raise Unfit(f"{n.target} of {out}")
    return out


def said(a: Any) -> Any:
    """A number of the graph as one that is given with the call."""
    return Given(a) if isinstance(a, float) or (type(a) is int and abs(a) < 2**53) else a


def cast(value: Expr, dtype: torch.dtype) -> Expr:
    """The value in this dtype, rounded or wrapped to it."""
    if dtype in ROUNDED:
        if isinstance(value, Const):
            return number(Given(value.value) if value.given else value.value, dtype)
        value = cast(value, torch.float32)
        exact = isinstance(value, Apply) and value.fn == ROUNDED[dtype]
        return value if exact else apply(ROUNDED[dtype], value)
    if value.dtype is dtype:
        return value
    if isinstance(value, Load) and (dtype, value.dtype) == NARROW:
        return Load(dtype, value.access, value.shift, value.mask)
    if isinstance(value, Const) and dtype.is_floating_point:
        return number(Given(value.value) if value.given else value.value, dtype)
    return Cast(dtype, value)


def comment(n: Node) -> str:
    val = n.meta["val"]
    args = [str(a) for a in n.args] + [f"{k}={v}" for k, v in n.kwargs.items()]
    return f"{n.name}: {short(val.dtype)} = {n.target}({', '.join(args)})"

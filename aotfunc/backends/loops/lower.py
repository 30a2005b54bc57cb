"""Nodes of an aten graph as one kernel: each value an expression over the kernel's axes.

A value is asked for with its *place*: the axis that each of its dimensions lies along, None for a
dimension of size 1 or one that is broadcast. Places are derived from a result to its arguments,
through broadcasting and views, so the same value may be computed at two places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .constants import constant
from .ir import (
    Access,
    Cast,
    Const,
    Expr,
    Given,
    Kernel,
    Load,
    Reduce,
    Store,
    Unfit,
    number,
    short,
)
from .pointwise import RULES
from .reductions import REDUCTIONS
from .views import dims_of, shape_of

Place = tuple[int | None, ...]

#: dtypes of a kernel's values
DTYPES = (
    *(torch.float32, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)


def computed(n: Any) -> bool:
    """Whether a node may be part of a kernel: there is a rule for it, and it is a plain tensor on
    the CPU made of such."""
    return (
        isinstance(n, Node)
        and n.op == "call_function"
        and (n.target in RULES or n.target in REDUCTIONS)
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
    return isinstance(n, Node) and (constant(n) is not None or dims_of(n) is not None)


def lower(nodes: Sequence[Node], stored: Sequence[Node], name: str) -> Kernel:
    """The kernel that computes these nodes, in the graph's order, and stores some of them. The
    ``tensor`` of each access is its node. Raises Unfit where one kernel does not do."""
    work = Lowering(nodes)
    stores = [work.store(n) for n in reversed(stored)]
    return work.kernel(name, stores[::-1])


class Lowering:
    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = dict.fromkeys(nodes)
        self.extents: list[int] = []
        self.reduced: tuple[int, ...] = ()
        self.accesses: list[Access] = []
        self.walked: list[Place] = []  # where each access lies
        self.values: dict[Any, Expr] = {}
        self.places: dict[Node, list[Place]] = {}

    def store(self, n: Node) -> Store:
        place = next(iter(self.places.get(n, ())), None) or self.root(shape_of(n))
        value = self.value(n, place)
        return Store(self.access(n, place), value)

    def root(self, shape: tuple[int, ...]) -> Place:
        """Where a result lies that nothing in this kernel reads."""
        sizes = [size for size in shape if size != 1]
        if not self.extents:
            self.extents = sizes
        every = range(len(self.extents))
        for axes in (list(every), [k for k in every if k not in self.reduced]):
            if [self.extents[k] for k in axes] == sizes:
                rest = iter(axes)
                return tuple([None if size == 1 else next(rest) for size in shape])
        raise Unfit("results of other sizes")

    def access(self, n: Node, place: Place) -> int:
        strides = [0] * len(self.extents)
        for axis, stride in zip(place, n.meta["val"].stride(), strict=True):
            if axis is not None:
                strides[axis] += stride
        self.accesses.append(Access(n.name, n.meta["val"].dtype, tuple(strides), n))
        self.walked.append(place)
        return len(self.accesses) - 1

    def value(self, n: Node, place: Place) -> Expr:
        found = self.values.get((n, place))
        if found is None:
            found = self.values[n, place] = self.made(n, place)
        return found

    def made(self, n: Node, place: Place) -> Expr:
        if (fixed := constant(n)) is not None:
            return number(said(fixed), n.meta["val"].dtype)
        if (dims := dims_of(n)) is not None:
            source: Node = n.args[0]  # type: ignore[assignment]
            return self.value(source, behind(place, dims, len(shape_of(source))))
        if n not in self.nodes:
            return Load(n.meta["val"].dtype, self.access(n, place))
        self.places.setdefault(n, []).append(place)
        return (self.reduction if n.target in REDUCTIONS else self.pointwise)(n, place)

    def reduction(self, n: Node, place: Place) -> Expr:
        asked = REDUCTIONS[n.target](*n.args, **n.kwargs)
        x: Node = n.args[0]  # type: ignore[assignment]
        out, shape = n.meta["val"].dtype, shape_of(x)
        every = range(len(shape))
        dims = {every[d] for d in asked.dims if shape} if asked.dims else set(every)
        sizes = [shape[d] for d in sorted(dims) if shape[d] != 1]
        bound = iter(self.bind(sizes, place) if sizes else ())
        kept = iter(place if asked.keepdim else ())
        rest = iter(place)
        where: list[int | None] = []
        for d, size in enumerate(shape):
            if asked.keepdim:
                axis = next(kept)
            elif d not in dims:
                axis = next(rest)
            where.append((next(bound) if size != 1 else None) if d in dims else axis)
        truth = asked.fn in ("any", "all")  # of bytes these are bytes, 0 or 1
        if out is torch.bool and not truth:
            raise Unfit("a reduction of bools")
        dtype = torch.bool if truth else out
        value = cast(self.value(x, tuple(where)), dtype)
        result = cast(Reduce(dtype, asked.fn, value) if sizes else value, out)
        if asked.mean:
            result = result / Given(math.prod([shape[d] for d in dims]))
        return result

    def bind(self, sizes: list[int], place: Place) -> tuple[int, ...]:
        """The axes that are reduced, of these sizes. Raises Unfit where others are already."""
        free = [k for k in range(len(self.extents)) if k not in place]
        if not free and not self.reduced:
            free = list(range(len(self.extents), len(self.extents) + len(sizes)))
            self.extents += sizes
        if [self.extents[k] for k in free] != sizes or self.reduced not in ((), tuple(free)):
            raise Unfit("reductions over other axes")
        self.reduced = tuple(free)
        return self.reduced

    def pointwise(self, n: Node, place: Place) -> Expr:
        rule, out = RULES[n.target], n.meta["val"].dtype
        dtype = working(rule.kind, n, out)

        def given(i: int | str, a: Any) -> Any:
            if not isinstance(a, Node):
                return said(a) if dtype.is_floating_point else a
            value = self.value(a, aligned(place, shape_of(a)))
            if (rule.kind == "where" and i == 0) or (rule.kind == "masked" and i == 1):
                return cast(value, torch.bool)
            return cast(value, dtype)

        args = [given(i, a) for i, a in enumerate(n.args)]
        kwargs = {k: given(k, a) for k, a in n.kwargs.items()}
        result = rule.body(*args, **kwargs)
        return cast(result, out)

    def kernel(self, name: str, stores: list[Store]) -> Kernel:
        rank = len(self.extents)
        order = [k for k in range(rank) if k not in self.reduced] + list(self.reduced)
        accesses = []
        for a in self.accesses:
            strides = [*a.strides, *[0] * (rank - len(a.strides))]
            accesses.append(Access(a.name, a.dtype, tuple([strides[k] for k in order]), a.tensor))
        outer = set(range(rank - len(self.reduced)))
        for s in stores:
            walked = accesses[s.access]
            if not outer <= {k for k, stride in enumerate(walked.strides) if stride}:
                raise Unfit("a result that is smaller than the kernel, or overlaps itself")
        for n, places in self.places.items():
            for place in places:
                axes = set(place) - {None}
                if (axes or n.target in REDUCTIONS) and not axes >= set(order[: len(outer)]):
                    raise Unfit("a value that would be computed again and again")
        self.one_way()
        comments = [comment(n) for n in self.nodes]
        extents = tuple([self.extents[k] for k in order])
        return Kernel(
            name,
            extents,
            len(self.reduced),
            tuple(accesses),
            tuple(stores),
            comments=tuple(comments),
        )

    def one_way(self) -> None:
        """Raise Unfit where a value is walked along in two ways, as sums over its rows and over
        its columns do: one of them would go through memory in large steps."""
        ways: dict[Node, set[Place]] = {n: set(places) for n, places in self.places.items()}
        for a, place in zip(self.accesses, self.walked, strict=True):
            ways.setdefault(a.tensor, set()).add(place)
        for places in ways.values():
            if len({tuple([axis for axis in place if axis is not None]) for place in places}) > 1:
                raise Unfit("a value read in two orders")


def behind(place: Place, dims: Sequence[int | None], rank: int) -> Place:
    """Where the argument of a view lies."""
    found: list[int | None] = [None] * rank
    for axis, d in zip(place, dims, strict=True):
        if d is not None:
            found[d] = axis
    return tuple(found)


def aligned(place: Place, shape: tuple[int, ...]) -> Place:
    """Where an argument of this shape lies that is broadcast to a result's place."""
    last = place[len(place) - len(shape) :]
    return tuple([None if size == 1 else axis for size, axis in zip(shape, last, strict=True)])


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
    if value.dtype is dtype:
        return value
    if isinstance(value, Const) and dtype.is_floating_point:
        return number(Given(value.value) if value.given else value.value, dtype)
    return Cast(dtype, value)


def comment(n: Node) -> str:
    val = n.meta["val"]
    args = [str(a) for a in n.args] + [f"{k}={v}" for k, v in n.kwargs.items()]
    return f"{n.name}: {short(val.dtype)} = {n.target}({', '.join(args)})"

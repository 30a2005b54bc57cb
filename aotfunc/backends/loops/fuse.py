"""Which nodes of a graph form a kernel together.

Nodes join the kernel of what they read, or of what reads the same, as long as one set of loops
computes them all and no kernel waits for another that waits for it."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx
from torch._ops import OpOverload
from torch.fx import Node

from ...graph import draws
from .constants import constant
from .ir import Unfit
from .lower import computed, lower, seen_through
from .views import dims_of

#: a kernel of more nodes is slow to compile, and has more values than there are registers
MOST = 64


class Unit:
    """Nodes that run together: a kernel's, or one that is called."""

    def __init__(self, nodes: Sequence[Node], kernel: bool) -> None:
        self.nodes = list(nodes)
        self.kernel = kernel
        #: units that must have run before, as bits
        self.after = 0


def units(graph: fx.Graph, worth: Callable[[Sequence[Node]], bool]) -> list[Unit]:
    """The graph's calls, in an order in which they can run. A kernel that is not ``worth`` being
    one is several calls."""
    kernels = grouped(graph)
    alone = [u for u in kernels if u.kernel and not worth(u.nodes)]
    split = {n for u in alone for n in u.nodes}
    kernels = [u for u in kernels if u not in alone]
    kernels += [Unit([n], False) for n in split]
    return ordered(graph, kernels)


def grouped(graph: fx.Graph) -> list[Unit]:
    found: list[Unit] = []
    at: dict[Node, int] = {}
    last: int | None = None  # what draws random numbers or has effects keeps its turn
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr", "output"):
            continue
        reads = {at[m] for m in read(n) if m in at}
        if keeps_its_turn(n):
            if last is not None:
                reads.add(last)
            last = len(found)
        place = joined(n, found, at, reads) if computed(n) and not seen_through(n) else None
        if place is None:
            place = len(found)
            found.append(Unit([n], computed(n) and fits([n])))
        else:
            found[place].nodes.append(n)
        at[n] = place
        wait(found, place, reads - {place})
    return found


def read(n: Node) -> Iterator[Node]:
    """The values that must be there when a node runs: a kernel looks through views."""
    for m in n.all_input_nodes:
        if not (computed(n) and not seen_through(n) and seen_through(m)):
            yield m
        elif constant(m) is None:
            yield from read_by_view(m)


def read_by_view(v: Node) -> Iterator[Node]:
    source: Node = v.args[0]  # type: ignore[assignment]
    if constant(source) is not None:
        return
    if seen_through(source):
        yield from read_by_view(source)
    else:
        yield source


def wait(found: list[Unit], place: int, reads: set[int]) -> None:
    """Let a unit, and those that wait for it, wait for others."""
    more = 0
    for i in reads:
        more |= found[i].after | 1 << i
    if more & ~found[place].after:
        found[place].after |= more
        for u in found:
            if u.after >> place & 1:
                u.after |= more


def joined(n: Node, found: list[Unit], at: dict[Node, int], reads: set[int]) -> int | None:
    """The kernel that a node may join: one that it reads from, the latest first, or one that
    reads what it reads."""
    near = {at[m] for m in read(n) if m in at}
    beside = {at[u] for m in read(n) for v in shown(m) for u in v.users if u in at}
    for place in [*sorted(near, reverse=True), *sorted(beside - near, reverse=True)]:
        unit = found[place]
        if not unit.kernel or len(unit.nodes) >= MOST:
            continue
        if any(found[i].after >> place & 1 for i in reads if i != place):
            continue
        if fits([*unit.nodes, n]):
            return place
    return None


def shown(n: Node) -> Iterator[Node]:
    """A value, and the views of it that kernels look through."""
    yield n
    for u in n.users:
        if dims_of(u) is not None:
            yield from shown(u)


def fits(nodes: Sequence[Node]) -> bool:
    try:
        lower(nodes, stored(nodes), "kernel")
    except Unfit:
        return False
    return True


def stored(nodes: Sequence[Node]) -> list[Node]:
    """Those whose values are read elsewhere, also through views."""
    inside = set(nodes)

    def leaves(n: Node) -> bool:
        return any(
            u not in inside and not (seen_through(u) and u.users and not leaves(u))
            for u in n.users
        )

    return [n for n in nodes if leaves(n)]


def keeps_its_turn(n: Node) -> bool:
    if n.target is operator.getitem:
        return False
    return not isinstance(n.target, OpOverload) or draws(n) or n.is_impure()


def ordered(graph: fx.Graph, found: list[Unit]) -> list[Unit]:
    """Each unit after those that it reads from, otherwise in the graph's order."""
    rank = {n: i for i, n in enumerate(graph.nodes)}
    of = {n: u for u in found for n in u.nodes}
    waits: dict[Unit, set[Unit]] = {u: set() for u in found}
    last: Unit | None = None
    for n in graph.nodes:
        if n not in of:
            continue
        unit = of[n]
        needed = read(n) if unit.kernel else n.all_input_nodes
        waits[unit].update([of[m] for m in needed if of.get(m, unit) is not unit])
        if keeps_its_turn(n):
            if last is not None and last is not unit:
                waits[unit].add(last)
            last = unit
    readers: dict[Unit, list[Unit]] = {u: [] for u in found}
    for u, before in waits.items():
        for b in before:
            readers[b].append(u)
    left = {u: len(before) for u, before in waits.items()}
    first = {u: max([rank[n] for n in u.nodes]) for u in found}
    ready = [(first[u], i, u) for i, u in enumerate(found) if not left[u]]
    heapq.heapify(ready)
    result = []
    while ready:
        _, _, u = heapq.heappop(ready)
        result.append(u)
        for r in readers[u]:
            left[r] -= 1
            if not left[r]:
                heapq.heappush(ready, (first[r], rank[r.nodes[0]] + len(found), r))
    assert len(result) == len(found), "kernels wait for each other"
    return result

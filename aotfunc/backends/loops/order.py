"""Order the units of a graph: as the graph does, but units that free as much memory as they take
run as soon as they can.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush

from torch import fx
from torch.fx import Node

from ...graph import output_node
from ...trace.records import flat_tensors
from .fuse import Unit, keeps_its_turn, stored, values_behind, values_read
from .views import source_of


def calls(
    graph: fx.Graph, units: Sequence[Unit], worth: Callable[[Sequence[Node]], bool]
) -> list[Unit]:
    """Return the units in an order to run. One not ``worth`` a launch is several calls."""
    found = []
    for u in units:
        if u.kernel and not worth(u.nodes):
            found += [Unit([n], False) for n in u.nodes]
        else:
            found.append(u)
    return in_dependency_order(graph, found)


def in_dependency_order(graph: fx.Graph, found: list[Unit]) -> list[Unit]:
    """Return units behind those they read, in the graph's order unless memory grows."""
    rank = {n: i for i, n in enumerate(graph.nodes)}
    waits = dependencies(graph, found)
    readers: dict[Unit, list[Unit]] = {u: [] for u in found}
    for u, before in waits.items():
        for b in before:
            readers[b].append(u)
    left = {u: len(before) for u, before in waits.items()}
    last = {u: max([rank[n] for n in u.nodes]) for u in found}
    memory = LiveBytes(graph, found)
    ready = [(memory.grows(u), last[u], u) for u in found if not left[u]]
    heapify(ready)
    done: dict[Unit, None] = {}
    while ready:
        *_, u = heappop(ready)
        if u in done:
            continue
        done[u] = None
        for r in readers[u]:
            left[r] -= 1
        for r in (*readers[u], *memory.run(u)):
            if not left[r]:  # it is pushed a second time if it grows no longer
                heappush(ready, (memory.grows(r), last[r], r))
    assert len(done) == len(found), "kernels wait for each other"
    return [*done]


def dependencies(graph: fx.Graph, found: Sequence[Unit]) -> dict[Unit, set[Unit]]:
    """Return for each unit the units that must run before it."""
    of = {n: u for u in found for n in u.nodes}
    waits: dict[Unit, set[Unit]] = {u: set() for u in found}
    last: Unit | None = None
    for n in graph.nodes:
        if n not in of:
            continue
        unit = of[n]
        needed = values_read(n) if unit.kernel else n.all_input_nodes
        waits[unit].update([of[m] for m in needed if of.get(m, unit) is not unit])
        if keeps_its_turn(n):
            if last is not None and last is not unit:
                waits[unit].add(last)
            last = unit
    return waits


class LiveBytes:
    """The bytes that each unit makes, and the units that have yet to read each value. A view
    counts as the values that it shows."""

    def __init__(self, graph: fx.Graph, found: Sequence[Unit]) -> None:
        self.made = {u: sum(map(bytes_made, stored(u.nodes))) for u in found}
        self.reads: dict[Unit, set[Node]] = {}
        self.waiting: dict[Node, set[Unit]] = {}
        kept = {m for n in output_node(graph).all_input_nodes for m in memory_shown(n)}
        inside = {n for u in found for n in u.nodes} - kept
        for u in found:
            read = {m for n in u.nodes for i in n.all_input_nodes for m in memory_shown(i)}
            self.reads[u] = (read & inside).difference(u.nodes)
            for n in self.reads[u]:
                self.waiting.setdefault(n, set()).add(u)

    def grows(self, u: Unit) -> bool:
        """Return whether a unit takes more than it frees."""
        return self.made[u] > sum(
            [bytes_made(n) for n in self.reads[u] if len(self.waiting[n]) == 1]
        )

    def run(self, u: Unit) -> list[Unit]:
        """Note that a unit has run. Return the units that are now the last to read a value."""
        last: list[Unit] = []
        for n in self.reads[u]:
            self.waiting[n].remove(u)
            if len(self.waiting[n]) == 1:
                last += self.waiting[n]
        return last


def bytes_made(n: Node) -> int:
    """Return the bytes of a node's values; a view has none of its own."""
    if source_of(n) is not None:
        return 0
    if n.target is operator.getitem:
        return 0
    return sum([t.numel() * t.element_size() for t in flat_tensors(n.meta["val"])])


def memory_shown(n: Node) -> Iterator[Node]:
    """Yield the values whose memory a node shows."""
    for m in values_behind(n):
        if m.target is operator.getitem:
            yield from memory_shown(m.args[0])  # type: ignore[arg-type]
        else:
            yield m

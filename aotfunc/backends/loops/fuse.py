"""Choose which nodes of a graph form a kernel together.

Nodes join the kernel of what they read, or of what reads the same, as long as one set of loops
computes them all and no two kernels wait for each other.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence, Set

from torch import fx
from torch._ops import OpOverload
from torch.fx import Node

from ...cache import Cache
from ...graph import draws
from ...progress import with_progress
from .alike import description
from .builder import build_kernel
from .ir import Unfit
from .members import in_kernels, seen_through
from .pointwise import RULES
from .views import SEVERAL, source_of, static_shape

#: most nodes of a kernel: more compile slowly, and have more values than there are registers
MOST = 64

#: whether nodes of a description form a kernel: the layers of a network are alike
TRIED = Cache(1 << 14)


class Unit:
    """Nodes that run together in one kernel, or one node that is called."""

    def __init__(self, nodes: Sequence[Node], kernel: bool) -> None:
        self.nodes = list(nodes)
        self.kernel = kernel
        #: the shape of all its values, if each element is computed by itself
        self.shape: tuple[int, ...] | None = None
        #: the values that it reads through views
        self.shown: set[Node] = set()
        self.untried = False  # likely, but not known, to be a kernel


class Groups:
    """The units so far and, for each, a bit set of the units that must run before it."""

    def __init__(self, graph: fx.Graph, doubted: Set[Node]) -> None:
        self.rank = {n: i for i, n in enumerate(graph.nodes)}
        self.units: list[Unit] = []
        self.before: list[int] = []
        self.at: dict[Node, int] = {}
        self.doubted = doubted
        self.failed: dict[frozenset, int] = {}  # pair of units -> their number of nodes

    def add(self, n: Node, kernel: bool, reads: set[int]) -> None:
        """Add a unit of one node."""
        self.at[n] = len(self.units)
        self.units.append(unit := Unit([n], kernel))
        if kernel and n.target in RULES and n not in self.doubted:
            unit.shape = static_shape(n)
            unit.shown = {
                v for m in n.all_input_nodes if seen_through(m) for v in values_behind(m)
            }
        before = 0
        for i in reads:
            before |= self.before[i] | 1 << i
        self.before.append(before)

    def merge(self, p: int, q: int) -> bool:
        """Merge the second unit into the first; return whether they can be one kernel."""
        one, other = self.units[p], self.units[q]
        if not (one.kernel and other.kernel) or len(one.nodes) + len(other.nodes) > MOST:
            return False
        for first, last in ((p, q), (q, p)):  # no unit may have to run between them
            if self.before[last] >> first & 1:
                between = set_bits(self.before[last] & ~(1 << first))
                if any(self.before[i] >> first & 1 for i in between):
                    return False
        nodes = sorted([*one.nodes, *other.nodes], key=self.rank.__getitem__)
        if same_elementwise(one, other):  # trials take time, and large kernels would need many
            one.untried = True
        elif self.tried(p, q, nodes):
            one.shape, one.untried = None, False
        else:
            return False
        one.nodes, other.nodes = nodes, []
        one.shown |= other.shown
        self.at.update(dict.fromkeys(nodes, p))
        both = 1 << p | 1 << q
        before = (self.before[p] | self.before[q]) & ~both
        for i, old in enumerate(self.before):
            if old & both:
                self.before[i] = (old | 1 << p | before) & ~(1 << q)
        self.before[p], self.before[q] = before, 0
        return True

    def tried(self, p: int, q: int, nodes: Sequence[Node]) -> bool:
        """Return whether the nodes of two units can be one kernel. A pair that has failed is tried
        again when it has half as many nodes more."""
        pair = frozenset((self.kind(p), self.kind(q)))
        if len(nodes) < 1.5 * self.failed.get(pair, 0):
            return False
        if is_kernel(nodes):
            return True
        self.failed[pair] = len(nodes)
        return False

    def kind(self, p: int) -> Hashable:
        """Return a unit's place; a single node's is the same in all steps of an unrolled loop."""
        if len(self.units[p].nodes) > 1:
            return p
        (n,) = self.units[p].nodes
        reads = [(m.target, [self.at.get(v) for v in values_behind(m)]) for m in n.all_input_nodes]
        return n.target, static_shape(n), str(reads)


def same_elementwise(one: Unit, other: Unit) -> bool:
    """Return whether two units compute elements of one shape without views of each other."""
    return (
        one.shape is not None
        and one.shape == other.shape
        and one.shown.isdisjoint(other.nodes)
        and other.shown.isdisjoint(one.nodes)
    )


def set_bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def grouped(graph: fx.Graph) -> Groups:
    """Return the units of a graph, each of which can be a kernel."""
    doubted: set[Node] = set()
    while True:
        groups = formed(graph, doubted)
        wrong = [u for u in groups.units if u.untried and u.nodes and not is_kernel(u.nodes)]
        if not wrong:
            return groups
        doubted.update(*[u.nodes for u in wrong])


def formed(graph: fx.Graph, doubted: Set[Node]) -> Groups:
    """Try each node alone, then with the kernels that it reads from or shares an argument with.
    One of the ``doubted`` nodes is not taken to be a kernel."""
    groups = Groups(graph, doubted)
    at = groups.at
    last: int | None = None  # draws and effects keep their order
    for n in with_progress("ops put into kernels", list(graph.nodes)):
        if n.op in ("placeholder", "get_attr", "output"):
            continue
        reads = {at[m] for m in values_read(n) if m in at}
        if keeps_its_turn(n):
            if last is not None:
                reads.add(last)
            last = len(groups.units)
        kernel = bool(n.users) and in_kernels(n) and not seen_through(n) and is_kernel([n])
        groups.add(n, kernel, reads)
        if not kernel:
            continue
        beside = {at[u] for m in values_read(n) for v in with_views(m) for u in v.users if u in at}
        for near in (reads, beside - reads):
            for place in sorted(near, reverse=True):
                if place != at[n] and groups.units[place].nodes:
                    groups.merge(place, at[n])
    return groups


def values_read(n: Node) -> Iterator[Node]:
    """Yield the values that must exist when a node runs: a kernel looks through views."""
    for m in n.all_input_nodes:
        if in_kernels(n) and not seen_through(n):
            yield from values_behind(m)
        else:
            yield m


def values_behind(m: Node) -> Iterator[Node]:
    """Yield the value itself, or the values that a view or constant is made of."""
    if not seen_through(m):
        yield m
        return
    for source in m.all_input_nodes:
        yield from values_behind(source)


def with_views(n: Node) -> Iterator[Node]:
    """Yield a value, and the views of it that kernels look through."""
    yield n
    for u in n.users:
        if source_of(u) is not None or u.target in SEVERAL:
            yield from with_views(u)


def is_kernel(nodes: Sequence[Node]) -> bool:
    """Return whether one kernel can compute these nodes."""
    stores = stored(nodes)

    def tried() -> bool:
        try:
            build_kernel(nodes, stores, "kernel")
        except Unfit:
            return False
        return True

    return TRIED.once(description(nodes, stores), tried)


def stored(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes that other nodes read, also through views."""
    inside = set(nodes)

    def leaves(n: Node) -> bool:
        return any(
            u not in inside and not (seen_through(u) and u.users and not leaves(u))
            for u in n.users
        )

    return [n for n in nodes if leaves(n)]


def keeps_its_turn(n: Node) -> bool:
    """Return whether a node keeps its place among others: it draws, or has effects."""
    if n.target is operator.getitem:
        return False
    return not isinstance(n.target, OpOverload) or draws(n) or n.is_impure()

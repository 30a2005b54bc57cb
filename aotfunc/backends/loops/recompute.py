"""Recompute values in the kernel that reads them, if that is cheaper than to load them."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import fx
from torch.fx import Node

from ...graph import output_node
from .builder import build_kernel
from .fuse import MOST, Unit, is_kernel, stored
from .ir import SLOW, Apply, walk
from .members import seen_through
from .pointwise import RULES
from .reductions import REDUCTIONS
from .views import static_shape


def recompute(graph: fx.Graph, units: Sequence[Unit]) -> list[Unit]:
    """Return the units; cheap values stored for one other kernel are moved into that one."""
    of = {n: u for u in units for n in u.nodes}
    kept = {n for n in graph.nodes if n.op == "placeholder"} | read_by(output_node(graph))
    for unit in units:
        for v in reversed(stored(unit.nodes)) if unit.kernel else ():
            readers = {of.get(n) for n in readers_of(v)} - {unit}
            reader = readers.pop()
            if readers or reader is None or not reader.kernel:
                continue
            for ends in (frozenset[Node](), kept):
                if len(unit.nodes) > 1 and pays(v, unit, reader, ends):
                    move(graph, v, unit, reader, ends)
                    of.update(dict.fromkeys(reader.nodes, reader))
                    of.update(dict.fromkeys(unit.nodes, unit))
                    break
    alive = set(graph.nodes)
    return [u for u in units if alive.issuperset(u.nodes)]


def readers_of(v: Node) -> set[Node]:
    """Return the nodes that read a value, also through views."""
    found: set[Node] = set()
    for u in v.users:
        found |= readers_of(u) if seen_through(u) and u.users else {u}
    return found


def read_by(n: Node) -> set[Node]:
    """Return the values that a node reads, also through views."""
    found: set[Node] = set()
    for m in n.all_input_nodes:
        found |= read_by(m) if seen_through(m) else {m}
    return found


def made_of(v: Node, unit: Unit, ends: Set[Node]) -> tuple[list[Node], list[Node]]:
    """Return, in order, the nodes of the unit that compute ``v``, with views of them, and the
    memory that they read; stop at ``ends`` and at values that lack a dimension of ``v``."""
    inside = set(unit.nodes)
    nodes: dict[Node, None] = {}
    memory: dict[Node, None] = {}

    def visit(n: Node) -> None:
        if n in nodes or n in memory:
            return
        shown = seen_through(n)
        ended = n not in inside or n in ends or lacks_dimension(n, v)
        if n is not v and not shown and ended:
            memory[n] = None
            return
        for m in n.all_input_nodes:
            visit(m)
        if not shown or any(m in nodes for m in n.all_input_nodes):
            nodes[n] = None

    visit(v)
    return list(nodes), list(memory)


def lacks_dimension(n: Node, v: Node) -> bool:
    """Return whether ``n`` has fewer dimensions larger than 1 than ``v`` has."""
    return rank(n) < rank(v)


def rank(n: Node) -> int:
    return sum(size != 1 for size in static_shape(n))


def numel(n: Node) -> int:
    return n.meta["val"].numel()


def pays(v: Node, unit: Unit, reader: Unit, ends: Set[Node]) -> bool:
    """Return whether a value is better computed by its reader: that reads no more memory than
    storing and reading it would. Values among ``ends`` are kept anyway, and may cost as much."""
    nodes, memory = made_of(v, unit, ends)
    computed = [n for n in nodes if not seen_through(n)]
    if any(n.target not in RULES for n in computed) or len(nodes) + len(reader.nodes) > MOST:
        return False
    read = set().union(*map(read_by, reader.nodes))
    more = [m for m in memory if m not in read and not lacks_dimension(m, v)]
    most = 2 if set(more) <= ends else 1
    if len(more) > most or any(numel(m) > numel(v) for m in more):
        return False
    inside = set(unit.nodes) - set(nodes)
    twice = feeds_reduction(v, reader)  # at least: each reduction is a pass
    return not any((twice or readers_of(n) & inside) and computes_slowly(n) for n in computed)


def computes_slowly(n: Node) -> bool:
    kernel = build_kernel([n], [n], "kernel")
    return any(isinstance(e, Apply) and e.fn in SLOW for e in walk(kernel.values))


def feeds_reduction(v: Node, reader: Unit) -> bool:
    """Return whether a reduction of the unit needs the value."""
    needs = {v}
    for n in reader.nodes:
        if needs & read_by(n):
            needs.add(n)
    return any(n.target in REDUCTIONS for n in needs)


def move(graph: fx.Graph, v: Node, unit: Unit, reader: Unit, ends: Set[Node]) -> None:
    """Move the computation of a value into its reader. Leave it if either unit would be no kernel,
    or if the reader shares a view of it with the unit."""
    nodes, _ = made_of(v, unit, ends)
    new: dict[Node, Node] = {}
    with graph.inserting_before(v.next):
        for n in nodes:
            new[n] = graph.node_copy(n, lambda m: new.get(m, m))
    inside = set(unit.nodes)
    v.replace_all_uses_with(new[v], lambda u: u not in inside and not readers_of(u) & inside)
    for n in reversed(nodes):
        if not n.users:
            graph.erase_node(n)
    order = {n: i for i, n in enumerate(graph.nodes)}
    left = [n for n in unit.nodes if n in order]
    moved = [n for n in new.values() if not seen_through(n)]
    both = sorted([*moved, *reader.nodes], key=order.__getitem__)
    if new[v].users and left and is_kernel(left) and is_kernel(both):
        unit.nodes, reader.nodes = left, both
        return
    for n, copy in reversed(new.items()):  # restore it, with copies of the erased nodes
        if n in order:
            copy.replace_all_uses_with(n)
            graph.erase_node(copy)
            moved = [m for m in moved if m is not copy]
    unit.nodes = sorted([*left, *moved], key=order.__getitem__)

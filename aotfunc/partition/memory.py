"""Tell how much memory the values of a graph take while it runs, op by op."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import fx
from torch.fx import Node

from ..graph import output_node
from .cost import Sizes, nbytes
from .ops import base, is_single, is_symbol, is_view


def is_new(n: Node) -> bool:
    """Return whether a value that is no view has new memory; a tuple's parts have theirs."""
    return n.op == "call_function" and is_single(n) and not is_symbol(n)


class Layout:
    """Which of some nodes, by number, owns the memory of each, and how many bytes it makes."""

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: list[list[int]] | None = None,
        sizes: Mapping[Node, int] | None = None,
    ) -> None:
        index = {n: i for i, n in enumerate(nodes)}
        self.inputs = inputs or [[index[p] for p in n.all_input_nodes] for n in nodes]
        sizes = Sizes() if sizes is None else sizes
        self.owner: list[int] = []
        self.size: list[int] = []
        for i, n in enumerate(nodes):
            view = is_view(n)
            self.owner.append(self.owner[self.inputs[i][0]] if view else i)
            self.size.append(sizes[n] if not view and is_new(n) else 0)

    def live(self, order: Sequence[int], given: set[int], kept: set[int]) -> Iterator[int]:
        """Yield the bytes that live while each of these nodes runs: the values ``given``, and what
        is made. Each is freed after the last op that reads it or a view of it before it is made
        anew, those ``kept`` are not. What kernels need for themselves is not counted."""
        owner, size = self.owner, self.size
        ends: list[list[int]] = []
        awaited: set[int] = set()
        for i in reversed(order):
            mine = owner[i]
            ended = {owner[p] for p in self.inputs[i]} | {mine}
            ended -= awaited
            ends.append([o for o in ended if o not in kept])
            awaited |= ended
            if mine == i:
                awaited.discard(i)
        live = sum([size[o] for o in given])
        made = set(given)
        for i, freed in zip(order, reversed(ends), strict=True):
            if owner[i] == i and i not in made:
                made.add(i)
                live += size[i]
            yield live
            for o in freed:
                if o in made:
                    made.remove(o)
                    live -= size[o]

    def peak(self, order: Sequence[int], given: set[int], kept: set[int]) -> int:
        """Return the most bytes that live at one time while these nodes run, as ``live`` says."""
        start = sum([self.size[o] for o in given])
        return max(start, max(self.live(order, given, kept), default=0))


def live_bytes(nodes: Sequence[Node], results: Iterable[Node]) -> list[int]:
    """Return the bytes beyond the inputs that live while each node of a graph runs."""
    index, layout = {n: i for i, n in enumerate(nodes)}, Layout(nodes)
    kept = {layout.owner[index[o]] for o in results}
    return list(layout.live(range(len(nodes)), set(), kept))


def peak(graph: fx.Graph, given: Iterable[Node] = ()) -> int:
    """Return the most bytes of memory that values of the graph take at one time, beyond its inputs
    other than those ``given``; the results stay."""
    nodes = [n for n in graph.nodes if n.op != "output"]
    index, layout = {n: i for i, n in enumerate(nodes)}, Layout(nodes)
    for n in given:
        layout.size[index[n]] = nbytes(n.meta["val"])
    kept = {layout.owner[index[o]] for o in output_node(graph).all_input_nodes}
    return layout.peak(range(len(nodes)), {index[n] for n in given}, kept)


def saved(forward: fx.Graph, n_results: int) -> int:
    """Return the bytes that a forward hands to its backward beyond its inputs and results; a view
    counts as the memory that it shows."""
    outputs = output_node(forward).args[0]
    owners = [base(n) for n in outputs if isinstance(n, Node)]
    results = {base(n) for n in outputs[:n_results] if isinstance(n, Node)}
    rest = {n for n in owners if n.op != "placeholder"} - results
    return sum([nbytes(n.meta["val"]) for n in rest])

"""How much memory the values of a graph take while it runs, op by op."""

from __future__ import annotations

import operator

from torch import fx
from torch.fx import Node

from ..graph import output_node
from .cost import nbytes
from .ops import base, is_symbol


def new_memory(n: Node) -> list[Node]:
    """The values that own the memory that a node makes: its own, or its parts."""
    if n.op != "call_function" or is_symbol(n) or n.target is operator.getitem:
        return []
    if isinstance(n.meta.get("val"), tuple | list):
        return [part for part in n.users if base(part) is part]
    return [n] if base(n) is n else []


def peak(graph: fx.Graph) -> int:
    """The most bytes of memory that values of the graph take at one time, beyond its inputs: each
    is freed after the last op that reads it or a view of it, the results are not. What kernels
    need for themselves is not counted."""
    last: dict[Node, Node] = {}
    for n in graph.nodes:
        for i in n.all_input_nodes:
            last[base(i)] = n
    ends: dict[Node, list[Node]] = {}
    for value, reader in last.items():
        ends.setdefault(reader, []).append(value)
    live, most = 0, 0
    mine: set[Node] = set()
    for n in graph.nodes:
        if n.op == "output":
            break
        new = new_memory(n)
        mine.update(new)
        live += sum([nbytes(v.meta["val"]) for v in new])
        most = max(most, live)
        done = [v for v in (*ends.get(n, ()), *new) if v in mine and last.get(v, n) is n]
        live -= sum([nbytes(v.meta["val"]) for v in dict.fromkeys(done)])
        mine.difference_update(done)
    return most


def saved(forward: fx.Graph, n_results: int) -> int:
    """Bytes of what a forward hands to its backward beyond its inputs and results; views are the
    memory that they show."""
    outputs = output_node(forward).args[0]
    owners = [base(n) for n in outputs if isinstance(n, Node)]
    results = {base(n) for n in outputs[:n_results] if isinstance(n, Node)}
    rest = {n for n in owners if n.op != "placeholder"} - results
    return sum([nbytes(n.meta["val"]) for n in rest])

"""Split a joint graph by what to save into ``early`` and ``late``, which takes that."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.node import map_arg

from ..errors import PartitionError
from ..trace.emit import paused_gc
from .order import schedule
from .roles import Joint

try:  # the Python code of a module is made when it is asked for, if torch offers that
    from torch.fx._lazy_graph_module import _LazyGraphModule as GraphModule
except ImportError:  # pragma: no cover
    from torch.fx import GraphModule


def split(
    joint: Joint,
    saved: Sequence[Node],
    hosted: Collection[Node] = (),
    orders: tuple[list[int], list[int]] | None = None,
) -> tuple[fx.Graph, fx.Graph]:
    """Return the early and the late graph of ``joint`` when ``saved`` is handed over, in that
    order, and those ``hosted`` by way of the host's memory; ``orders`` of nodes are what
    :func:`schedule` returns where they are not given.

    The late graph computes again what it reads and is not handed. Nodes keep their names and
    metadata. Raises PartitionError if an input is needed and not among ``saved``."""
    index = joint.index
    if orders is None:
        held = {index[n] for n in saved}
        orders = schedule(joint, held, {index[n] for n in hosted})
    with paused_gc():
        return _split_now(joint, saved, hosted, *orders)


def _split_now(
    joint: Joint,
    saved: Sequence[Node],
    hosted: Collection[Node],
    early_order: list[int],
    late_order: list[int],
) -> tuple[fx.Graph, fx.Graph]:
    nodes = joint.nodes
    early, late = (Copy({n.name for n in nodes}) for _ in range(2))
    for n in joint.early_inputs:
        early.placeholder(n)
    for i in early_order:
        if nodes[i].op != "placeholder":
            early.node(nodes[i])
        if nodes[i] in hosted:
            early.offload(nodes[i])
    early.output(list(joint.early_outputs) + [early.keep(n) for n in saved])

    for n in saved:
        late.placeholder(early.away.get(n, n), role="residual")
    for n in joint.late_inputs:
        late.placeholder(n)
    for i in late_order:
        if nodes[i] in hosted:
            late.bring_back(nodes[i], early.away[nodes[i]])
        elif nodes[i].op != "placeholder":
            late.node(nodes[i])
        elif nodes[i] not in late.env:
            raise PartitionError(
                f"the backward reads the input {nodes[i].name}, which is not saved"
            )
    late.output(joint.late_outputs)
    return early.graph, late.graph


def module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Return ``graph`` as a module that shares the constants of ``root``."""
    return GraphModule(root, graph, class_name=name)


def append_copy(graph: fx.Graph, n: Node, args: tuple, kwargs: dict, name: str) -> Node:
    """Append a node like ``n``, with its metadata, under a name that no other node has.
    ``create_node`` takes three times as long."""
    node = Node(graph, name, n.op, n.target, args, kwargs, n.type)
    space = graph._graph_namespace
    space._used_names.add(name)
    space._obj_to_name[node] = name
    graph._insert(node)
    graph._find_nodes_lookup_table.insert(node)
    graph._len += 1
    node.meta.update(n.meta)
    return node


def on_host(val: Any) -> Any:
    """Return a value's metadata as it is in the host's memory."""
    if isinstance(val, Tensor):
        return val.to("cpu")
    found = copy.copy(val)
    found.device = torch.device("cpu")
    return found


class Copy:
    """A graph copied node by node; ``env`` maps old nodes to new ones, ``taken`` are the old
    names. ``meta["original"]`` tells what a new node of another name stands for."""

    def __init__(self, taken: set[str]) -> None:
        self.graph, self.taken = fx.Graph(), taken
        self.env: dict[Node, Node] = {}
        self.away: dict[Node, Node] = {}  # copies in the host's memory

    def node(self, n: Node) -> Node:
        """Add a node; what reads ``n`` from then on reads this one."""
        name = self.fresh(n.name, "_again") if n in self.env else n.name
        new = append_copy(self.graph, n, self.map(n.args), self.map(n.kwargs), name)
        if name != n.name:
            new.meta.update(original=n.name, again=name)
        self.env[n] = new
        return new

    def fresh(self, name: str, suffix: str) -> str:
        """Return a name that no node has, for another one that stands for the one of this name."""
        while name in self.taken:
            name += suffix
        self.taken.add(name)
        return name

    def placeholder(self, n: Node, role: str | None = None) -> None:
        """Add an input that stands for ``n``."""
        new = self.graph.create_node(
            "placeholder",
            n.target if n.op == "placeholder" else n.name,
            name=n.name,
            type_expr=n.type,
        )
        new.meta = n.meta.copy()
        if role is not None:
            new.meta.setdefault("role", role)
        self.env[n] = new

    def copy(self, n: Node, name: str, device: Any) -> Node:
        """Add a copy of the value of a new node on another device."""
        to = torch.ops.aten._to_copy.default
        return self.graph.create_node("call_function", to, (n,), {"device": device}, name=name)

    def offload(self, n: Node) -> None:
        new = self.copy(self.env[n], self.fresh(n.name, "_host"), torch.device("cpu"))
        new.meta = {"val": on_host(n.meta["val"]), "line": n.meta.get("line"), "original": n.name}
        self.away[n] = self.env[new] = new

    def bring_back(self, n: Node, away: Node) -> None:
        new = self.copy(self.env[away], n.name, torch.device(n.meta["val"].device))
        new.meta = n.meta.copy()
        self.env[n] = new

    def keep(self, n: Node) -> Node:
        """Return the node to hand over for ``n``: a copy of it if the caller's tensor is
        overwritten after the early part, or if it goes to the host."""
        if n in self.away:
            return self.away[n]
        if n.meta.get("mutated") and n.op == "placeholder":
            new = self.graph.create_node(
                "call_function",
                torch.ops.aten.clone.default,
                (self.env[n],),
                name=self.fresh(n.name, "_kept"),
            )
            new.meta = {k: n.meta[k] for k in ("val", "line") if k in n.meta}
            new.meta["original"] = n.name
            self.env[new] = new
            return new
        return n

    def output(self, values: list[Any]) -> None:
        self.graph.output(self.map(tuple(values)))

    def map(self, a: Any) -> Any:
        return map_arg(a, self.env.__getitem__) if a else a

"""A joint graph and what to save -> ``early(*inputs) -> (*outputs, *saved)`` and ``late(*saved,
*late_inputs)``.

Values are placed where they live shortest: what is computed again stands right before its first
reader in the late graph; what the early graph computes only to be saved stands right after its
last input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.fx.node import map_arg

from ..trace.emit import paused_gc
from .roles import Joint, PartitionError, ancestors

try:  # the Python code of a module is made when it is asked for, if torch offers that
    from torch.fx._lazy_graph_module import _LazyGraphModule as GraphModule
except ImportError:  # pragma: no cover
    from torch.fx import GraphModule


def split(joint: Joint, saved: Sequence[Node]) -> tuple[fx.Graph, fx.Graph]:
    """The early and the late graph of ``joint`` when ``saved`` is handed over, in that order.

    The late graph computes again what it reads and is not handed. Nodes keep their names and
    metadata. Raises PartitionError if an input is needed and not among ``saved``."""
    with paused_gc():
        return _split_now(joint, saved)


def _split_now(joint: Joint, saved: Sequence[Node]) -> tuple[fx.Graph, fx.Graph]:
    nodes, inputs, index = joint.nodes, joint.inputs, joint.index
    held = [False] * len(nodes)
    for n in saved:
        held[index[n]] = True

    kept = ancestors(inputs, [i for i, h in enumerate(held) if h])
    # nodes that run only to be saved follow their last input; all others stay where they are
    when = list(range(len(nodes)))
    for i in range(len(nodes)):
        if kept[i] and not joint.forward[i] and nodes[i].op != "placeholder":
            when[i] = max([when[p] for p in inputs[i]], default=i)
    order = sorted(
        [i for i in range(len(nodes)) if joint.forward[i] or kept[i]], key=lambda i: (when[i], i)
    )
    early = Copy()
    for n in joint.early_inputs:
        early.placeholder(n)
    for i in order:
        if nodes[i].op != "placeholder":
            early.node(nodes[i])
    early.output(list(joint.early_outputs) + [early.keep(n) for n in saved])

    wanted = ancestors(inputs, [i for i in joint.needed if not held[i]], stop=held)
    # what is computed again stands before its first reader
    end = len(nodes)
    first = [end] * len(nodes)
    for i in range(len(nodes) - 1, -1, -1):
        if joint.live[i]:
            first[i] = i
        elif not wanted[i]:
            continue
        for p in inputs[i]:
            first[p] = min(first[p], first[i])
    late = Copy()
    for n in saved:
        late.placeholder(n, role="residual")
    for n in joint.late_inputs:
        late.placeholder(n)
    for i in sorted(
        [i for i in range(end) if joint.live[i] or wanted[i]], key=lambda i: (first[i], i)
    ):
        if nodes[i].op != "placeholder":
            late.node(nodes[i])
        elif nodes[i] not in late.env:
            raise PartitionError(
                f"the backward reads the input {nodes[i].name}, which is not saved"
            )
    late.output(joint.late_outputs)
    return early.graph, late.graph


def module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """``graph`` as a module that shares the constants of ``root``."""
    return GraphModule(root, graph, class_name=name)


class Copy:
    """A graph copied node by node from another; ``env`` maps old nodes to new ones."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.env: dict[Node, Node] = {}

    def node(self, n: Node) -> Node:
        # arguments come afterwards: create_node searches those it is given for SymInts, half of
        # its time
        new = self.graph.create_node(n.op, n.target, name=n.name, type_expr=n.type)
        if n.args:
            new.args = self.map(n.args)
        if n.kwargs:
            new.kwargs = self.map(n.kwargs)
        new.meta = n.meta.copy()
        self.env[n] = new
        return new

    def placeholder(self, n: Node, role: str | None = None) -> None:
        """An input that stands for ``n``."""
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

    def keep(self, n: Node) -> Node:
        """The node to hand over for ``n``: a copy of it if the caller's tensor is overwritten
        after the early part."""
        if n.meta.get("mutated") and n.op == "placeholder":
            new = self.graph.create_node(
                "call_function",
                torch.ops.aten.clone.default,
                (self.env[n],),
                name=f"{n.name}_kept",
            )
            new.meta = {k: n.meta[k] for k in ("val", "line") if k in n.meta}
            self.env[new] = new
            return new
        return n

    def output(self, values: list[Any]) -> None:
        self.graph.output(self.map(tuple(values)))

    def map(self, a: Any) -> Any:
        return map_arg(a, self.env.__getitem__)

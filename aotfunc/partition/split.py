"""A joint graph and what to save -> ``early(*inputs) -> (*outputs, *saved)`` and ``late(*saved,
*late_inputs)``.

Values are placed where they live shortest. What the early graph computes only to be saved stands
right after its last input. In the late graph what is computed again stands right before its first
reader, and so does what takes more memory than it frees."""

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
from .roles import Joint, ancestors

try:  # the Python code of a module is made when it is asked for, if torch offers that
    from torch.fx._lazy_graph_module import _LazyGraphModule as GraphModule
except ImportError:  # pragma: no cover
    from torch.fx import GraphModule


def schedule(joint: Joint, held: list[bool], hosted: set[int]) -> tuple[list[int], list[int]]:
    """Return the numbers of the nodes that the early and the late part run, in order, when those
    ``held`` are handed over. Those ``hosted`` come back from the host in the late part."""
    nodes, inputs = joint.nodes, joint.inputs
    kept = ancestors(inputs, [i for i, h in enumerate(held) if h])
    # nodes that run only to be saved follow their last input; all others stay where they are
    when = list(range(len(nodes)))
    for i in range(len(nodes)):
        if kept[i] and not joint.forward[i] and nodes[i].op != "placeholder":
            when[i] = max([when[p] for p in inputs[i]], default=i)
    early = sorted(
        [i for i in range(len(nodes)) if joint.forward[i] or kept[i]], key=lambda i: (when[i], i)
    )
    wanted = ancestors(inputs, [i for i in joint.needed if not held[i]], stop=held)
    run = [live or want for live, want in zip(joint.live, wanted, strict=True)]
    for i in hosted:
        run[i] = True
    return early, right_before(joint, readers_of(joint, run), run)


def readers_of(joint: Joint, run: list[bool]) -> list[int]:
    """Return for each node that the late part runs the one before whose run it stands: its first
    reader's for what is computed again, and for what takes more memory than it frees; the node
    itself for all others."""
    owner, size = joint.layout.owner, joint.layout.size
    count = len(run)
    before, last = [count] * count, [-1] * count  # of an owner's readers the last one
    for i in range(count - 1, -1, -1):
        if not run[i]:
            continue
        owners, reader = {owner[p] for p in joint.inputs[i]}, before[i]
        if joint.live[i]:
            freed = sum([size[o] for o in owners if last[o] < reader])
            grows = owner[i] != i or size[i] > freed
            if reader == count or not grows or not joint.moves[i]:
                before[i] = i
        for o in owners:
            last[o] = max(last[o], before[i])
        for p in joint.inputs[i]:
            before[p] = min(before[p], before[i])
    return before


def right_before(joint: Joint, before: list[int], run: list[bool]) -> list[int]:
    """Return the nodes that ``run`` in order, each in the group of the node ``before`` which it
    stands. Of the inputs of a node those come first that need most memory beside their result
    (Sethi and Ullman, JACM 17, 1970)."""
    size, count = joint.layout.size, len(run)
    need, inputs = [0] * count, list(joint.inputs)
    for i in range(count):
        if run[i]:
            group = {p for p in joint.inputs[i] if run[p] and before[p] == before[i]}
            inputs[i] = sorted(group, key=lambda p: (size[p] - need[p], p))
            held = 0
            for p in inputs[i]:
                need[i] = max(need[i], held + need[p])
                held += size[p]
            need[i] = max(need[i], held + size[i])
    order: list[int] = []
    seen = [False] * count
    ends = [i for i in range(count) if run[i] and before[i] in (i, count)]
    for end in sorted(ends, key=lambda i: (before[i], i)):  # what nobody reads is only returned
        todo = [end]
        while todo:
            i = todo[-1]
            waits = [] if seen[i] else [p for p in inputs[i] if not seen[p]]
            if waits:
                todo += reversed(waits)
                continue
            todo.pop()
            for made in (i, *joint.parts[i]):  # the parts of a tuple are made with it
                if run[made] and before[made] == before[i] and not seen[made]:
                    seen[made] = True
                    order.append(made)
    return order


def split(
    joint: Joint, saved: Sequence[Node], hosted: Collection[Node] = ()
) -> tuple[fx.Graph, fx.Graph]:
    """Return the early and the late graph of ``joint`` when ``saved`` is handed over, in that
    order, and those ``hosted`` by way of the host's memory.

    The late graph computes again what it reads and is not handed. Nodes keep their names and
    metadata. Raises PartitionError if an input is needed and not among ``saved``."""
    with paused_gc():
        return _split_now(joint, saved, hosted)


def _split_now(
    joint: Joint, saved: Sequence[Node], hosted: Collection[Node]
) -> tuple[fx.Graph, fx.Graph]:
    nodes, index = joint.nodes, joint.index
    held = [False] * len(nodes)
    for n in saved:
        held[index[n]] = True
    early_order, late_order = schedule(joint, held, {index[n] for n in hosted})
    early = Copy()
    for n in joint.early_inputs:
        early.placeholder(n)
    for i in early_order:
        if nodes[i].op != "placeholder":
            early.node(nodes[i])
        if nodes[i] in hosted:
            early.offload(nodes[i])
    early.output(list(joint.early_outputs) + [early.keep(n) for n in saved])

    late = Copy()
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


def on_host(val: Any) -> Any:
    """Return a value's metadata as it is in the host's memory."""
    if isinstance(val, Tensor):
        return val.to("cpu")
    found = copy.copy(val)
    found.device = torch.device("cpu")
    return found


class Copy:
    """A graph copied node by node from another; ``env`` maps old nodes to new ones."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.env: dict[Node, Node] = {}
        self.away: dict[Node, Node] = {}  # copies in the host's memory

    def node(self, n: Node) -> Node:
        # arguments come afterwards: create_node searches those it is given for SymInts, half of
        # its time
        new = self.graph.create_node(n.op, n.target, name=n.name, type_expr=n.type)
        if n.args:
            new.args = self.map(n.args)
        if n.kwargs:
            new.kwargs = self.map(n.kwargs)
        new.meta.update(n.meta)  # not assigned: fx makes that slow
        self.env[n] = new
        return new

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
        new = self.copy(self.env[n], f"{n.name}_host", torch.device("cpu"))
        new.meta = {"val": on_host(n.meta["val"]), "line": n.meta.get("line")}
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

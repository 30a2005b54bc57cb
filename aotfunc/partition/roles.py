"""Tell the parts of a joint graph apart: inputs, cotangents, forward, backward, and what stands on
the border.

Every node is **late** (it depends on a cotangent), **forward** (a forward output, a draw or an
effect needs it) or **free** (neither: ``cos(x)`` for the derivative of ``sin(x)``, which may be
computed on either side)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import getitem
from typing import Any

from torch import fx
from torch.fx import Node

from ..errors import PartitionError
from .cost import Sizes
from .memory import Layout
from .ops import (
    gathers_again,
    is_pinned,
    is_single,
    is_together,
    is_uneven,
    made_at,
    once,
    writes,
)


def describe(n: Node) -> str:
    """Return how errors name a node: what it is and where it comes from."""
    line = made_at(n)
    return f"{n.name} = {n.target}" + (f" ({line.strip()})" if line else "")


def is_tangent(n: Node) -> bool:
    """Return whether a placeholder is an output's cotangent: by its role, else by its name."""
    role = n.meta.get("role")
    return role == "tangent" if role is not None else "tangents" in n.name


@dataclass
class Joint:
    """A joint graph, read once. Nodes have numbers; the lists run parallel to ``nodes``."""

    nodes: list[Node]
    index: dict[Node, int]
    inputs: list[list[int]]
    early_inputs: list[Node]
    late_inputs: list[Node]
    early_outputs: list[Any]
    late_outputs: list[Any]
    late: list[bool]
    forward: list[bool]
    #: draws and effects, which run exactly once and in order
    pinned: list[bool]
    #: what runs in the late part whatever is saved
    live: list[bool]
    #: early values that the late part reads or returns, in order
    needed: list[int]
    sizes: Sizes = field(default_factory=Sizes)

    @cached_property
    def layout(self) -> Layout:
        """Return whose memory the values lie in, and how much that is."""
        return Layout(self.nodes, self.inputs, self.sizes)

    @cached_property
    def gathers(self) -> bool:
        """Return whether there are parts that the backward is to gather again."""
        return any(map(gathers_again, self.nodes))

    @cached_property
    def uneven(self) -> bool:
        """Return whether the processes hold parts of other sizes somewhere."""
        return any(map(is_uneven, self.nodes))

    @cached_property
    def shared(self) -> bool:
        """Return whether processes, whose batches or parts may have other sizes, must run
        collectives in one order."""
        return self.uneven or any(map(is_together, self.nodes))

    @cached_property
    def once(self) -> list[bool]:
        """Return which nodes may run only once."""
        return list(map(once, self.nodes))

    @cached_property
    def may_run_later(self) -> list[bool]:
        """Return which nodes of the backward may run later: those whose value is one tensor or
        number that they alone make, and that nothing tells when."""
        return [
            not (one or n.target is getitem or gathers_again(n)) and is_single(n)
            for n, one in zip(self.nodes, self.once, strict=True)
        ]

    @cached_property
    def parts(self) -> list[list[int]]:
        """Return for each node the parts of its value, if that is a tuple."""
        return [
            [] if is_single(n) else [self.index[u] for u in n.users if u.target is getitem]
            for n in self.nodes
        ]


def read_joint(graph: fx.Graph, num_early: int) -> Joint:
    """Number and classify the nodes of ``graph``, whose first ``num_early`` outputs belong to the
    early part.

    The late part gets the cotangents. A node with ``meta["phase"] == "backward"`` is late as well,
    whatever it reads. Raises PartitionError if an early output depends on something late or if a
    node writes its arguments."""
    nodes = list(graph.nodes)
    output = nodes.pop()
    outputs = output.args[0]
    outputs = list(outputs) if isinstance(outputs, Sequence) else [outputs]
    index = {n: i for i, n in enumerate(nodes)}
    inputs = [[index[p] for p in n._input_nodes] for n in nodes]
    placeholders = [n for n in nodes if n.op == "placeholder"]
    chosen = {n for n in placeholders if is_tangent(n)}

    for n in nodes:
        if writes(n):
            raise PartitionError(
                f"{describe(n)} writes one of its arguments: a joint graph must be functional"
            )

    late: list[bool] = []
    for n, read in zip(nodes, inputs, strict=True):
        late.append(
            any([late[p] for p in read]) or n in chosen or n.meta.get("phase") == "backward"
        )
    pinned = [is_pinned(n) for n in nodes]

    early_outputs, late_outputs = outputs[:num_early], outputs[num_early:]
    for o in early_outputs:
        if isinstance(o, Node) and late[index[o]]:
            raise PartitionError(f"the forward output {describe(o)} depends on a cotangent")

    def roots(outs: list[Any], side: bool) -> list[int]:
        return [index[o] for o in outs if isinstance(o, Node)] + [
            i for i, pin in enumerate(pinned) if pin and late[i] is side
        ]

    ends = roots(late_outputs, True)
    live = ancestors(inputs, [i for i in ends if late[i]], stop=[not x for x in late])
    needed = {i for i in ends if not late[i]}
    needed.update(p for i, alive in enumerate(live) if alive for p in inputs[i] if not late[p])
    return Joint(
        nodes=nodes,
        index=index,
        inputs=inputs,
        early_inputs=[n for n in placeholders if n not in chosen],
        late_inputs=[n for n in placeholders if n in chosen],
        early_outputs=early_outputs,
        late_outputs=late_outputs,
        late=late,
        forward=ancestors(inputs, roots(early_outputs, False)),
        pinned=pinned,
        live=live,
        needed=sorted(needed),
    )


def ancestors(
    inputs: list[list[int]], ends: Iterable[int], stop: Sequence[bool] | None = None
) -> list[bool]:
    """Return which nodes are needed for ``ends``, these included, without those in ``stop``."""
    seen = [False] * len(inputs)
    for i in ends:
        seen[i] = True
    for i in range(len(inputs) - 1, -1, -1):
        if seen[i]:
            for p in inputs[i]:
                if stop is None or not stop[p]:
                    seen[p] = True
    return seen

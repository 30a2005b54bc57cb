"""Write results of kernels into the memory of values read for the last time.

A kernel may write an element that it has read and does not read again (:func:`fitting`), if no
later node reads that value's memory (:func:`reuse`).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

from torch import fx
from torch.fx import Node

from ...graph import op_of, output_node
from .ir import Kernel, Load, walk
from .launch import EMPTY, Launch
from .memory import OWN_MEMORY
from .recompute import numel
from .tasks import InRange, LaidOut
from .views import VIEWS


def fitting(kernel: Kernel, late: set[tuple[int, int]]) -> dict[Node, list[Node]]:
    """List for each output the inputs whose memory it may take: those of its dtype and size that
    the kernel walks in the same order, one element for each point. ``late`` are the accesses
    ``(read, written)`` of which the printed kernel may read one at a point after writing the
    other."""
    tensors = [a.tensor for a in kernel.accesses]
    written = {s.access for s in kernel.stores}
    moved = {e.access for e in walk(kernel.values) if isinstance(e, Load) and e.shift is not None}
    found: dict[Node, list[Node]] = {}
    for s in kernel.stores:
        out = kernel.accesses[s.access]
        if s.blocks or s.shift is not None or not all(out.strides):
            continue
        for i, a in enumerate(kernel.accesses):
            alike = (a.strides, a.dtype, a.start) == (out.strides, out.dtype, out.start)
            if alike and i not in written | moved and (i, s.access) not in late:
                once = tensors.count(a.tensor) == tensors.count(out.tensor) == 1
                if once and numel(a.tensor) == numel(out.tensor):
                    found.setdefault(out.tensor, []).append(a.tensor)
    return found


def reuse(graph: fx.Graph, donated: Mapping[int, int] = EMPTY) -> None:
    """Let launches write into the memory of their inputs where they may: that of the ``donated``
    inputs of the graph is for one result each, input -> result. Changes the graph."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    given = given_memory(graph, donated)
    owner = owners(graph, given)
    end: dict[Node, int] = {}  # owner -> the last reader of its memory
    for n, mine in owner.items():
        end[mine] = max([end.get(mine, 0), *[place[u] for u in n.users]])
    for n in graph.nodes:
        if not isinstance(n.target, Launch):  # a constant that a launch has made
            continue
        taken: dict[int, int] = {}
        for out, inputs in n.meta.get("fitting", {}).items():
            for i in sorted(inputs, key=lambda i: n.args[i] not in given):
                mine = owner.get(n.args[i])
                alone = [owner.get(a) for a in n.args].count(mine) == 1
                if mine and alone and end[mine] == place[n] and i not in taken.values():
                    if mine in given and given[mine] is not launch_result(n, out):
                        continue
                    if numel(n.args[i]) == numel(mine):
                        taken[out] = i
                        break
        if taken:
            n.target = n.target.taking(taken)


def given_memory(graph: fx.Graph, donated: Mapping[int, int]) -> dict[Node, Node]:
    """Return the donated inputs, each with the result that may take its memory: that is returned
    once, no other result shows it, and what runs after it raises no error, as a call that fails
    leaves its inputs as they were."""
    if not donated:
        return {}
    nodes, outs = [*graph.nodes], output_node(graph).args[0]
    inputs = [n for n in nodes if n.op == "placeholder"]
    last = max([i for i, n in enumerate(nodes) if not is_safe(n)], default=-1)
    after = {*nodes[last + 1 :]}
    found = {inputs[i]: outs[k] for i, k in donated.items()}
    return {
        p: o
        for p, o in found.items()
        if isinstance(o, Node)
        and op_of(o) in after
        and outs.count(o) == 1
        and all(u.op == "output" or has_own_memory(u) for u in o.users)
    }


def is_safe(n: Node) -> bool:
    """Return whether a node raises no error for values."""
    kernels = has_own_memory(n) or n.target in VIEWS or n.target is operator.getitem
    return n.op in ("placeholder", "get_attr", "output") or kernels


def launch_result(launch: Node, k: int) -> Node | None:
    """Return the node of a launch's result ``k``."""
    parts = [u for u in launch.users if u.target is operator.getitem]
    return next((u for u in parts if u.args[1] == k), None) if parts else launch


def owners(graph: fx.Graph, given: Collection[Node] = ()) -> dict[Node, Node]:
    """Return, for nodes that alone show the memory of one value of the graph, or of one of the
    ``given`` inputs, that value."""
    found: dict[Any, Node] = {n: n for n in given}
    known: set[Node | None] = set()
    for n in graph.nodes:
        first = n.args[0] if n.args else None
        if n.op == "call_function" and has_own_memory(n):
            found[n] = n
        elif n.target in VIEWS or isinstance(n.target, LaidOut | InRange):
            if first in found:
                found[n] = found[first]
        elif not (n.target is operator.getitem and first in found and found[first] is first):
            known.update(map(found.get, n.all_input_nodes))
        else:
            found[n] = n
    return {n: mine for n, mine in found.items() if mine not in known}


def has_own_memory(n: Node) -> bool:
    return isinstance(n.target, Launch) or OWN_MEMORY.get(n.target) is True

"""Results that must not share memory with inputs or with one another get a copy: rewriting may have made them the
same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..graph import Program, output_node
from ..trace.emit import paused_gc
from ..trace.shapes import Facts
from .walk import builder

aten = torch.ops.aten


def fresh(program: Program, own: Sequence[int]) -> Program:
    """The program with copies where an output would be an input, a view of one, or the same as another output;
    ``own`` are the outputs that ``f`` returned itself and that may alias as it wishes.
    """
    outs = list(output_node(program.graph).args[0])
    seen: set[Node] = set()
    copied = []
    for i, o in enumerate(outs[: program.n_outputs]):
        if not isinstance(o, Node):
            continue
        root = storage_root(o)
        if i not in own and (root.op == "placeholder" or root in seen):
            copied.append(i)
        else:
            seen.add(root)
    if not copied:
        return program
    with paused_gc():
        b = builder()
        new = [b.placeholder(p.name, p.meta["val"], role=p.meta.get("role")) for p in program.placeholders]
        results = list(b.splice(program.graph, new, tuple(outs)))
        for i in copied:
            x = results[i]
            results[i] = b.make("call_function", aten.clone.default, (x,), {}, x.meta["val"])
        return Program(b.finish(results), program.n_inputs, program.n_outputs, program.mutated, program.name)


def storage_root(n: Node) -> Node:
    """The node whose memory ``n`` shows."""
    while n.op == "call_function":
        view: Any = n.args[0] if n.target is operator.getitem else n
        if not (isinstance(view.target, OpOverload) and Facts(view.target).view_of is not None):
            break
        n = view.args[0]
    return n

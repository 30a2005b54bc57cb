"""The last pass before a graph is run: marks of intent have done their work and are dissolved."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graph import Program, output_node
from ..trace.emit import Builder, carried, paused_gc, remap
from ..trace.functionalize import hidden_write, once
from .custom import CustomDerivative
from .steps import CompiledCall
from .tidy import REWRITES

aten = torch.ops.aten


def marked(program: Program) -> bool:
    """Whether the graph carries intent that plain autograd, run over its ops, would not see."""
    return any(
        n.target in (aten.detach.default, hidden_write, once) or isinstance(n.target, CustomDerivative | CompiledCall)
        for n in program.graph.nodes
    )


def lowered(program: Program, calls: bool = False, marks: bool = True) -> Program:
    """Without custom derivatives; with ``marks``, without ``detach`` and hidden writes; with ``calls``, without nested compiled calls."""
    if not marked(program):
        return program
    with paused_gc():
        b = Builder(REWRITES)
        env: dict[Node, Any] = {}
        for n in program.graph.nodes:
            target = n.target
            b.meta = carried(n)
            if n.op == "placeholder":
                env[n] = b.placeholder(n.name, n.meta["val"], role=n.meta.get("role"))
            elif n.op == "call_function":
                args = remap(n.args, env)
                if marks and target in (aten.detach.default, once):
                    env[n] = args[0]
                elif marks and target is hidden_write:
                    env[n] = args[1]
                elif isinstance(target, CustomDerivative):
                    env[n] = target.inline(b, args)
                elif calls and isinstance(target, CompiledCall):
                    env[n] = lowered_call(b, target, args, marks)
                else:
                    env[n] = b.node(target, args, {k: remap(v, env) for k, v in n.kwargs.items()}, n.meta["val"])
        outs = remap(output_node(program.graph).args[0], env)
        return Program(b.finish(outs), program.n_inputs, program.n_outputs, program.mutated, program.name)


def lowered_call(b: Builder, call: CompiledCall, args: Any, marks: bool) -> list:
    body = lowered(call.program, calls=True, marks=marks)
    return list(b.splice(body.graph, args, output_node(body.graph).args[0]))

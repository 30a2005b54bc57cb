"""The last pass before a graph is run: marks of intent have done their work and are dissolved."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graph import Program
from ..trace.emit import Builder, carried, casts, paused_gc, remap
from ..trace.functionalize import check_gradient, dead_end, hidden_write, no_tangent, once
from .tidy import FINAL

aten = torch.ops.aten


IDENTITIES = (aten.detach.default, dead_end, no_tangent, once)


def marked(program: Program) -> bool:
    """Whether the graph carries intent that plain autograd, run over its ops, would not see."""
    return any(
        n.target in (*IDENTITIES, hidden_write, check_gradient)
        or getattr(n.target, "dissolved_with", "")
        for n in program.graph.nodes
    )


MARKS = frozenset({"marks", "customs"})
CALLS = frozenset({"calls"})
EVERYTHING = MARKS | CALLS


def lowered(program: Program, dissolve: frozenset[str] = MARKS) -> Program:
    """The program without ``marks`` (``detach`` and hidden writes), ``customs`` (custom
    derivatives) and ``calls`` (nested compiled calls), as far as ``dissolve`` names them."""
    final = dissolve == EVERYTHING
    casting = final and any(
        casts(n.target, n.args, n.meta.get("val")) for n in program.graph.nodes
    )
    if not (casting or marked(program)):
        return program
    with paused_gc():
        b = Builder(FINAL, final=final)
        env: dict[Node, Any] = {}
        for n in program.graph.nodes:
            target = n.target
            b.meta = carried(n)
            if n.op == "placeholder":
                env[n] = b.placeholder(n.name, n.meta["val"], role=n.meta.get("role"))
            elif n.op == "call_function":
                args = remap(n.args, env)
                if "marks" in dissolve and target in IDENTITIES:
                    env[n] = args[0]
                elif "marks" in dissolve and target is hidden_write:
                    env[n] = args[1]
                elif getattr(target, "dissolved_with", None) in dissolve:
                    env[n] = target.inline(b, args, lambda p: lowered(p, dissolve))  # type: ignore
                else:
                    env[n] = b.node(
                        target,
                        args,
                        {k: remap(v, env) for k, v in n.kwargs.items()},
                        n.meta["val"],
                    )
        outs = remap(program.outputs, env)
        return Program(
            b.finish(outs), program.n_inputs, program.n_outputs, program.mutated, "lower"
        )

"""Compute sums of products in another order if that costs less: for example, the norms of
per-sample gradients without these gradients. Results differ by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...graph import Program
from ...trace.emit import Builder, paused_gc
from ...trace.node_views import view_source
from ...trace.shapes.sig import Sig
from ...trace.views import laid_out
from ..decompose import separate_outputs
from ..walk import apply, builder, traced
from .choice import Way, chosen
from .order import contracted


def reassociated(program: Program) -> Program:
    """Return the program with its sums of products in the order that costs least."""
    with paused_gc():
        ways = chosen(program.graph)
        return rewritten(program, ways) if ways else program


def rewritten(program: Program, ways: dict[Node, Way]) -> Program:
    """Return the program with these nodes computed otherwise."""

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        if n not in ways:
            return NotImplemented
        nodes, plan, order = ways[n]
        new = apply(b, (contracted,), traced(contracted), [env[a] for a in nodes], plan, order)
        new = with_strides(b, laid_out(b, new, n.meta["val"]), n.meta["val"])
        return unshared(b, new, [env[a] for a in nodes])

    b, env = builder(), dict[Node, Any]()
    b.copy(program.graph.nodes, env, visit)
    outs = separate_outputs(b, program.outputs, env)
    graph = b.finish(outs)
    return Program(graph, program.n_inputs, program.n_outputs, program.mutated, "reassociate")


def unshared(b: Builder, x: Node, factors: list[Node]) -> Node:
    """Return ``x``, copied if it shows the memory of one of ``factors``."""
    base: Node | None = x
    while base is not None and base not in factors:
        base = view_source(base)
    return x if base is None else b.call(torch.ops.aten.clone.default, x)


def with_strides(b: Builder, x: Node, sig: Sig) -> Node:
    """Return ``x`` laid out as ``sig``, with its strides in dimensions of extent 1, too."""
    if x.meta["val"].stride == sig.stride:
        return x
    return b.call(torch.ops.aten.as_strided.default, x, list(sig.shape), list(sig.stride))

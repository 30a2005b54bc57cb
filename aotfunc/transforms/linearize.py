"""Linearise: cut a tangent or joint program by dependence on its tangents (or cotangents)."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..graph import Program, cut, output_node
from ..trace.emit import drop_dead, paused_gc
from ..trace.node_views import storage_root
from .fresh import fresh
from .jvp import jvp
from .walk import builder

aten = torch.ops.aten


def halve(joint: Program, n_early: int, n_late: int) -> tuple[Program, Program, list[int]]:
    """Cut a joint program by dependence on its ``n_late`` late inputs, those right after the
    primals.

    Return the early program ``inputs -> (first n_early outputs, residuals)``, the late program
    ``(residuals, late inputs) -> rest``, and which inputs are residuals as they are: they follow
    the computed ones."""
    placeholders = joint.placeholders
    n_primal = joint.n_inputs - n_late
    late = placeholders[n_primal : joint.n_inputs]
    outs = joint.outputs
    first, rest, written = outs[:n_early], outs[n_early : joint.n_outputs], outs[joint.n_outputs :]
    early_nodes, late_nodes, residuals = cut(joint.graph, late, [*first, *written], rest)
    inputs = [*placeholders[:n_primal], *placeholders[joint.n_inputs :]]
    # copy a residual that shows an input which the program writes at the end
    volatile = {placeholders[i] for i in joint.mutated}
    copied = {r for r in residuals if storage_root(r) in volatile}
    direct = [inputs.index(r) for r in residuals if r.op == "placeholder" and r not in copied]
    computed = [r for r in residuals if r.op != "placeholder" or r in copied]
    with paused_gc():
        b = builder()
        env = dict(zip(inputs, b.inputs(inputs), strict=True))
        b.copy(early_nodes, env)
        kept = [
            b.make("call_function", aten.clone.default, (env[r],), {}, r.meta["val"])
            if r in copied
            else env[r]
            for r in computed
        ]
        results = [env.get(o, o) if isinstance(o, Node) else o for o in first]
        results += [*kept, *(env.get(o, o) if isinstance(o, Node) else o for o in written)]
        shift = [i if i < n_primal else i - n_late for i in joint.mutated]
        early = Program(b.finish(results), n_primal, n_early + len(computed), shift, "forward")
        b = builder()
        env = {
            r: b.placeholder(r.name, r.meta["val"])
            for r in (*computed, *(inputs[i] for i in direct), *late)
        }
        b.copy(late_nodes, env)
        results = [env.get(o, o) if isinstance(o, Node) else o for o in rest]
        late_program = Program(
            b.finish(results), len(residuals) + n_late, len(rest), (), "backward"
        )
    return early, fresh(late_program, ()), direct


def linear_program(base: Program, wrt: tuple[int, ...], n_out: int) -> Program:
    """Return the tangent program of ``wrt``: results, then ``n_out`` tangents."""
    whole = jvp(base, wrt)
    count = base.n_outputs
    outs = whole.outputs
    kept = [*outs[: count + n_out], *outs[2 * count :]]
    output_node(whole.graph).args = (tuple(kept),)
    drop_dead(whole.graph, output_node(whole.graph))
    return Program(whole.graph, whole.n_inputs, count + n_out, whole.mutated, "jvp")

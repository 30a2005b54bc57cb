"""Results that eager does not save, to which the caller may write before the backward: a compiled
backward reads none of their memory, but computes them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..capture.calls import CompiledCall
from ..capture.makers import maker
from ..graph import Program
from ..partition.ops import once
from ..trace.emit import paused_gc, remap
from ..trace.node_views import storage_root
from ..transforms.activity import active_nodes
from ..transforms.walk import builder
from .chain_steps import saves
from .meetings import is_saved

aten = torch.ops.aten


def apart_from_results(
    call: CompiledCall,
    program: Program,
    wrt: Sequence[int],
    halves: tuple[CompiledCall, CompiledCall],
    count: int,
) -> tuple[CompiledCall, CompiledCall]:
    """Return the ``halves`` of a call, whose whole program this is, for the gradients of the
    inputs ``wrt``, with no residual in the memory of a result that eager does not save: where
    eager saves an equal value it is a copy, else the backward computes it again of what its op
    reads. ``count`` values come before the residuals."""
    outs = halves[0].program.outputs
    residuals = outs[count:]
    roots = {*map(storage_root, residuals)}
    each = [(k, storage_root(o)) for k, o in enumerate(outs[: program.n_outputs])]
    shown = {k: n for k, n in each if n in roots and is_repeatable(n)}
    if not shown or not all([isinstance(r, Node) for r in residuals]):
        return halves
    repeated, copied = unsaved(program, wrt, call.made, shown)
    kept: dict[Node, None] = {}
    again: dict[Node, None] = {}  # each behind what it reads

    def need(n: Node) -> None:
        if storage_root(n) not in repeated:
            kept[n] = None
        elif n not in again:
            for i in n._input_nodes:
                need(i)
            again[n] = None

    for r in residuals:
        need(r)
    if not (again or copied):
        return halves
    early = handing_over(halves[0].program, count, kept, copied)
    late = with_repeated(halves[1].program, residuals, kept, again)
    forward, backward = (
        CompiledCall(new, half.compile, half.split, half.__name__)
        for new, half in zip((early, late), halves, strict=True)
    )
    return forward, backward


def handing_over(early: Program, count: int, kept: Iterable[Node], copied: set[Node]) -> Program:
    """Return the forward half with other residuals, some of them copies."""
    with paused_gc():
        b = builder()
        env = dict(zip(early.placeholders, b.inputs(early.placeholders), strict=True))
        b.copy(early.graph.nodes, env)
        outs = [*remap(early.outputs[:count], env)]
        for r in kept:
            new, copy = env[r], aten.clone.default
            val = r.meta["val"]
            outs.append(b.make("call_function", copy, (new,), {}, val) if r in copied else new)
        return Program(b.finish(outs), early.n_inputs, len(outs), (), early.name)


def with_repeated(
    late: Program, residuals: Sequence[Node], kept: Iterable[Node], again: Iterable[Node]
) -> Program:
    """Return the backward half as it computes values ``again`` of the residuals ``kept``."""
    inputs = late.placeholders
    roles = {r: p.meta.get("role") for r, p in zip(residuals, inputs, strict=False)}
    with paused_gc():
        b = builder()
        env: dict[Node, Any] = {
            r: b.placeholder(r.name, r.meta["val"], role=roles.get(r, "residual")) for r in kept
        }
        given = [*env, *(cts := b.inputs(inputs[len(residuals) :]))]
        b.copy(again, env)
        outs = b.inlined(late, [*[env[r] for r in residuals], *cts])
        return Program(b.finish(outs), len(given), len(outs), (), late.name)


def unsaved(
    program: Program, wrt: Sequence[int], made: Sequence[str], shown: Mapping[int, Node]
) -> tuple[set[Node], set[Node]]:
    """Return which of the values that results show, by the result, eager does not save, neither
    for the op that computes it, of those ``made`` for results, nor for one that reads it; and
    those of which it saves an equal value, which it does not return."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    active = active_nodes(calls, [program.placeholders[i] for i in wrt], zeros=True)
    names = dict(enumerate(made))

    def is_read(n: Node, root: Node) -> bool:
        return any(
            is_read(u, root) if storage_root(u) is root else saves(u, n, active)
            for u in n.users
            if u.op != "output"
        )

    repeated, copied = set[Node](), set[Node]()
    for k, value in shown.items():
        n = storage_root(o := program.outputs[k])
        if n in active and n.op == "call_function" and not is_read(n, n):
            if not is_saved(n, active):
                repeated.add(value)
            elif n is o and names.get(k) not in (None, "", maker(n)):
                copied.add(value)
    return repeated, copied


def is_repeatable(n: Any) -> bool:
    """Return whether a value may be computed again, from tensors alone."""
    if not isinstance(n, Node) or n.op != "call_function" or once(n):
        return False
    return not any(isinstance(i.meta["val"], tuple) for i in n._input_nodes)

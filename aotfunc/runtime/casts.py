"""Autocast's casts of leaves that a nested compiled function shares with the recording around it.

In eager mode both use the one cast that autocast keeps, and add its gradients in the narrow dtype.
So the nested function's step takes the casts as further inputs, from the outer recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..capture.calls import CompiledCall, CompiledStep
from ..capture.captured import Captured
from ..graph import Program
from ..trace.casts import kept, nesting
from ..trace.emit import Builder, paused_gc, remap
from ..trace.tracer import Trace
from ..transforms.tidy import REWRITES
from .execute import run_eager

aten = torch.ops.aten
#: pairs of an input of a program that is cast, and the dtype
Casts = tuple[tuple[int, torch.dtype], ...]


def casts_of(rec: Captured) -> Casts:
    """Return the casts that a region of autocast around the function keeps at its end."""
    trace = rec.trace
    return tuple([(trace.position(ref), dtype) for ref, dtype in trace.casts_left])


def record_sharing(
    trace: Trace, step: CompiledStep, casts: Casts, inputs: Sequence[Tensor]
) -> Any:
    """Return the results of the step in a recording, whose casts it shares."""
    if not (casts and trace.caches_casts and nesting() and torch.is_grad_enabled()):
        return trace.record(step, inputs)
    step, shared = step.program.once(("takes", casts), lambda: taking(step.call, casts))
    return trace.record(step, [*inputs, *(kept(trace, inputs[i], dtype) for i, dtype in shared)])


def taking(call: CompiledCall, casts: Casts) -> tuple[CompiledStep, Casts]:
    """Return the step that takes casts as its last inputs, and these casts."""
    program = call.program
    found = {casting(program.placeholders[i], dtype): (i, dtype) for i, dtype in casts}
    found.pop(None, None)
    b = Builder(REWRITES)
    with paused_gc():
        env: dict[Node, Any] = dict(
            zip(program.placeholders, b.inputs(program.placeholders), strict=True)
        )
        given = {n: b.placeholder(n.name, n.meta["val"]) for n in found if n is not None}
        b.copy(program.graph.nodes, env, lambda b, n, env: given.get(n, NotImplemented))
        graph = b.finish(remap(program.outputs, env))
    count = len(program.placeholders) + len(given)
    whole = Program(graph, count, program.n_outputs, program.mutated, program.name)
    new = CompiledCall(whole, call.compile, call.split, call.__name__)
    new.made = call.made
    return CompiledStep(new, run_eager), tuple(found.values())


def casting(p: Node, dtype: torch.dtype) -> Node | None:
    """Return the cast of an input if there is exactly one: others are not autocast's."""
    found = [
        n for n in p.users if n.target is aten._to_copy.default and n.kwargs == {"dtype": dtype}
    ]
    return found[0] if len(found) == 1 else None

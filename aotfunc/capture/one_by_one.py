"""Batch control flow sample by sample."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..debug import at
from ..errors import ArgumentError, RuleError
from ..graph import Program
from ..trace.emit import paused_gc
from ..trace.views import laid_out
from ..transforms.rules import axes
from ..transforms.walk import builder
from .bodies import dense, emit_flow, row_sig
from .scan import Scan


def one_by_one(walk: Any, n: Node) -> tuple[list, list[bool]]:
    """Return the results of the node ``n`` for a batch by a loop over the samples, each of which
    takes its own way alone; and that all of them differ. Raises ArgumentError if samples share a
    draw, RuleError if they exchange values."""
    target: Any = n.target
    if target.draws and not walk.once_each(n):
        raise ArgumentError(
            "vmap(cond='map', randomness='same'): each sample draws for itself in control flow "
            f"that goes sample by sample{at(n.meta.get('line'))}; say randomness='different'"
        )
    if any(has_collective(body, walk.axis.name) for body in target.bodies):
        raise RuleError(
            f"vmap(cond='map'): the samples of the axis {walk.axis.name!r} tell each other "
            f"something in control flow that goes sample by sample{at(n.meta.get('line'))}; call "
            "psum and its kind outside of it, or drop cond='map'"
        )
    args: list[Any] = list(n.args)
    shared = [i for i, a in enumerate(args) if not walk.has(a)]
    own = [i for i in range(len(args)) if i not in shared]
    given = [walk.env[a] for a in args]
    stacks = [laid_out(walk.b, given[i], dense(given[i].meta["val"]), exactly=True) for i in own]
    with paused_gc():
        b = builder()
        inputs = {i: b.placeholder("const", given[i].meta["val"]) for i in shared}
        rows = zip(own, stacks, strict=True)
        inputs |= {i: b.placeholder("x", row_sig(x.meta["val"])) for i, x in rows}
        outs = emit_flow(b, target, [inputs[i] for i in range(len(args))])
        body = Program(b.finish(outs), len(args), len(outs), (), "sample")
    loop = Scan(body, len(shared), 0, walk.size)
    results = emit_flow(walk.b, loop, [*[given[i] for i in shared], *stacks])
    return results, [True] * len(results)


def has_collective(body: Program, axis: str | None) -> bool:
    """Return whether a body has a collective over the axis of this name."""
    for n in body.graph.nodes:
        if n.target in axes.OPS and n.args[-1] == axis:
            return True
        if any(has_collective(inner, axis) for inner in getattr(n.target, "bodies", ())):
            return True
    return False

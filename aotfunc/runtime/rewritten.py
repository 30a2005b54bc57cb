"""Results that the caller writes to before the backward, where eager has not saved them and a
compiled call has: the backward computes them again."""

from __future__ import annotations

from typing import Any

from ..capture.makers import maker
from ..transforms.activity import active_nodes
from .meetings import is_saved


def rewritten(ctx: Any) -> bool:
    """Return whether such a result of a node was written to."""
    if not ctx.saved_versions or ctx.done or ctx.inputs is None:
        return False
    kept = [i for i, r in ctx.residuals.items() if r is None]
    each = zip(kept, ctx._raw_saved_tensors, ctx.saved_versions, strict=False)
    mine = [(saved, before) for i, saved, before in each if i in ctx.rewritable]
    try:
        return any(saved.data._version != before for saved, before in mine)
    except RuntimeError:  # the caller's saved_tensors_hooks hold it
        return False


def rewritable(halves: Any) -> frozenset[int]:
    """Return which of the residuals are results that eager does not save."""
    return halves.program.once(("rewritable", halves.wrt), lambda: unsaved(halves))


def unsaved(halves: Any) -> frozenset[int]:
    """Return which of the residuals are results that eager saves neither for their op, by its
    name, nor for another one."""
    program, made = halves.program, dict(enumerate(halves.call.made))
    if halves.met or halves.keeping:
        return frozenset()
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    active = active_nodes(nodes, [program.placeholders[i] for i in halves.wrt], zeros=True)
    early = halves.forward.program.outputs
    shown = {}
    for k, o in enumerate(program.outputs):
        if halves.live[k] and o.op == "call_function" and all(u.op == "output" for u in o.users):
            if maker(o) != made.get(k) or not is_saved(o, active):
                shown[early[k]] = k
    return frozenset([i for i, r in enumerate(early[halves.early :]) if r in shown])

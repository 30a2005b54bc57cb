"""Tidy graphs: local rewritings make them small and keep every value bit for bit, NaN, infinities
and signed zeros included.

They are applied as nodes are made (:class:`~aotfunc.trace.emit.Builder`), so each level of a
nested transform works on a tidy graph. The rules, by subject, are in ``rewrites/``."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graph import Program
from ..trace.emit import Builder, Visit, paused_gc, remap
from .rewrites import REWRITES

aten = torch.ops.aten

#: rewritings for the last passes, after results got copies
FINAL: dict[Any, list] = {
    call: rules for call, rules in REWRITES.items() if call is not aten.clone.default._op
}


def rebuilt(
    program: Program,
    name: str = "tidy",
    visit: Visit | None = None,
    b: Builder | None = None,
    env: dict[Node, Any] | None = None,
) -> Program:
    """Return the program copied by a pass, whose name it gets: rewritten, with equal nodes merged,
    dead ones dropped, names counted anew.

    ``visit`` may replace calls, see :meth:`~aotfunc.trace.emit.Builder.copy`. A node in ``env``
    replaces an input, which is dropped."""
    b, env = b or Builder(REWRITES), {} if env is None else env
    count = sum(p not in env for p in program.placeholders[: program.n_inputs])
    with paused_gc():
        b.copy(program.graph.nodes, env, visit)
        outs = remap(program.outputs, env)
        return Program(b.finish(outs), count, program.n_outputs, program.mutated, name)

"""Tidying: local rewritings that make graphs small and keep every value bit for bit, NaN,
infinities and signed zeros included.

They are applied as nodes are made (:class:`~aotfunc.trace.emit.Builder`), so each level of a
nested transform works on a tidy graph. The rules, by subject, are in ``rewrites/``."""

from __future__ import annotations

from typing import Any

import torch

from ..graph import Program
from ..trace.emit import Builder, paused_gc
from .rewrites import REWRITES

aten = torch.ops.aten

#: for the last passes, after results that need memory of their own were given copies
FINAL: dict[Any, list] = {
    target: rules for target, rules in REWRITES.items() if target is not aten.clone.default
}


def retidy(program: Program, name: str = "tidy") -> Program:
    """The program rebuilt: rewritten, equal nodes merged, dead ones gone, names counted anew."""
    with paused_gc():
        b = Builder(REWRITES)
        inputs = b.inputs(program.placeholders)
        outs = b.splice(program.graph, inputs, program.outputs)
        return Program(b.finish(outs), program.n_inputs, program.n_outputs, program.mutated, name)

"""Find the layouts of gradients taken inside a recording: whether ``g.reshape(-1)`` shares memory
with ``g`` depends on them, and only the derived program has them.
"""

from __future__ import annotations

from typing import Any

import torch

from ..cache import Cache
from ..errors import AotfuncError
from ..trace.emit import Builder, paused_gc
from ..trace.functionalize import Functionalizer, input_nodes
from ..trace.memory import overlaps_itself
from ..trace.shapes.instr import Instr
from ..trace.shapes.sig import Sig, make_sig
from ..trace.traced import as_if_outside
from ..trace.tracer import Trace
from .calls import CallStep
from .grad_step import GradStep
from .gradient_paths import path_from

_layouts = Cache(256)  # keys are whole recordings


def computed_layouts(trace: Trace, step: GradStep, refs: tuple[int, ...]) -> tuple[Sig, ...]:
    """Return the signatures of the results of a gradient step to be recorded for ``refs``; the
    step's own if its derivation is refused, which the program's will raise."""

    def found() -> tuple[Sig, ...]:
        if trace.mutates or not all(stands_alone(instr) for instr, *_ in trace.records):
            return derived_layouts(trace, step, refs)
        # other rounds of a loop share it
        part, given, _ = path_from(trace, trace.records, refs, len(step.outs))
        return _layouts.once((part.key(), step, given), lambda: derived_layouts(part, step, given))

    return _layouts.once((trace.key(), step, refs), found)


def derived_layouts(trace: Trace, step: GradStep, refs: tuple[int, ...]) -> tuple[Sig, ...]:
    with as_if_outside(), paused_gc():
        b = Builder(None, merge=False)
        f = Functionalizer(trace, b, input_nodes(trace, b))
        f.run()
        try:
            made = [n.meta["val"].start for n in step.nodes(f, refs)]
        except AotfuncError:
            return step.outs
    # eager expands some too; others, as those of means, it computes after that
    return tuple([dense_layout(sig) if overlaps_itself(sig) else sig for sig in made])


def dense_layout(sig: Sig) -> Sig:
    """Return the signature of the result of a layout-keeping op on a tensor of this signature."""
    with torch._C._DisableTorchDispatch():
        stride = sig.proto.clone().stride()  # empty_like would import sympy
    return make_sig(sig.shape, stride, sig.dtype, sig.device)


def stands_alone(instr: Any) -> bool:
    """Return whether a step is complete by itself, unlike the parts of a Function."""
    return isinstance(instr, Instr | CallStep | GradStep)

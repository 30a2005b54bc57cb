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
from ..trace.records import result_sigs
from ..trace.scalars import FIRST
from ..trace.shapes.instr import Instr
from ..trace.shapes.sig import Sig, make_sig
from ..trace.traced import as_if_outside
from ..trace.tracer import Trace
from .calls import CallStep
from .grad_step import GradStep

_layouts = Cache(256)  # keys are whole recordings


def computed_layouts(trace: Trace, step: GradStep, refs: tuple[int, ...]) -> tuple[Sig, ...]:
    """Return the signatures of the results of a gradient step to be recorded for ``refs``; the
    step's own if its derivation is refused, which the program's will raise."""

    def found() -> tuple[Sig, ...]:
        if trace.mutates or not all(stands_alone(instr) for instr, *_ in trace.records):
            return derived_layouts(trace, step, refs)
        part, given = path_from(trace, step, refs)  # other rounds of a loop share it
        return _layouts.once((part.key(), step, given), lambda: derived_layouts(part, step, given))

    return _layouts.once((trace.key(), step, refs), found)


def derived_layouts(trace: Trace, step: GradStep, refs: tuple[int, ...]) -> tuple[Sig, ...]:
    with as_if_outside(), paused_gc():
        b = Builder(None, merge=False)
        f = Functionalizer(trace, b, input_nodes(trace, b))
        f.run()
        first = f.number
        try:
            step.emit(f, refs, True, None)
        except AotfuncError:
            return step.outs
        made = [f.read(r).meta["val"].start for r in range(first, f.number)]
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


def path_from(
    trace: Trace, step: GradStep, refs: tuple[int, ...]
) -> tuple[Trace, tuple[int, ...]]:
    """Return the part of the recording after the differentiated values of the step, as a recording
    of its own, and the numbers of ``refs`` in it."""
    wanted, sigs = refs[len(refs) - len(step.outs) :], dict(enumerate(trace.signatures()))
    count = len(trace.inputs)
    sigs |= {-1 - i: sigs[count + i] for i in range(len(trace.lifted))}
    reach = trace.autograd.reach()
    on = set().union(*(reach.of(r, trace.records, trace.autograd.leaves) for r in wanted))
    taken, own, number = [], list[int](), count
    for record in trace.records:
        made = range(number, number := number + len(result_sigs(record[0])))
        sigs.update(zip(made, result_sigs(record[0]), strict=True))
        if not on.isdisjoint(made):
            taken.append(record)
            own += made
    known = {*own}
    read = [r for _, given, *_ in taken for r in given] + [*refs]
    outside = [r for r in dict.fromkeys(read) if r not in known and r > FIRST]
    place: dict[int, Any] = {r: i for i, r in enumerate((*outside, *own))}
    part = Trace()
    part.inputs += [sigs[r] for r in outside]
    part.numbers += trace.numbers
    part.records += [
        (instr, tuple([place.get(r, r) for r in given]), grad, None, None)
        for instr, given, grad, *_ in taken
    ]
    return part, tuple([place[r] for r in refs])

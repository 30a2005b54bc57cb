"""Find which values of a recording share memory, and through which views. The records tell this;
the graph does not, as it is rewritten while it is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .records import flat_tensors, instr_op, n_new_values, written_slots
from .shapes.sig import Sig
from .views import COMPUTED

if TYPE_CHECKING:
    from .tracer import Trace

aten = torch.ops.aten


class Shown:
    """The memory that a value shows.

    ``of`` is None for memory of its own, which was made with ``ref``. Else the value is result
    ``index`` of a view of ``of`` by ``call``, ``(op, args, kwargs, results)``; the op may change
    its argument's shape in place. ``cut``: made under no_grad. ``apart``: detached and then
    written where autograd sees it, so that it has a derivative of its own. ``passed``: given to a
    Function that returns it, with a derivative of its own too."""

    __slots__ = ("apart", "call", "cut", "index", "of", "passed", "ref")

    def __init__(
        self,
        ref: int,
        of: Shown | None = None,
        call: Any = None,
        index: Any = None,
        cut: bool = False,
    ):
        self.ref, self.of, self.call, self.index, self.cut = ref, of, call, index, cut
        self.apart = self.passed = False

    @property
    def root(self) -> int:
        """Return the value that the memory was made with."""
        return self.path[0].ref

    @property
    def path(self) -> list[Shown]:
        """Return the path from the memory to this value. Of values that Functions passed on, the
        last one has all of the derivative."""
        found, step = [self], self.of
        while step is not None:
            if not (step.passed and any(s.passed for s in found)):
                found.append(step)
            step = step.of
        return found[::-1]


def final_views(trace: Trace) -> dict[int, Shown]:
    """Find the memory that each value shows in the end; unlisted ones have their own."""
    found: dict[int, Shown] = {}

    def of(ref: int) -> Shown:
        return found.setdefault(ref, Shown(ref))

    number = len(trace.inputs)
    for instr, refs, grad, *_ in trace.records:
        made = range(number, number + n_new_values(instr))
        number = made.stop
        op, facts = instr_op(instr), instr.facts
        if op is None:
            for ref, seen in zip(made, instr.views(), strict=False):
                if seen is not None:
                    slot, calls = seen
                    found[ref] = of(refs[slot])
                    for call, index in calls:
                        found[ref] = Shown(ref, found[ref], call, index, not grad)
            given = {of(r).root for r in instr.handed(refs)}
            for ref, raw, sig in zip(made, refs, instr.outs, strict=False) if given else ():
                if of(raw).root in given:
                    found[ref] = Shown(
                        ref, of(raw), (aten.detach.default, (None,), {}, sig), cut=not grad
                    )
                    found[ref].apart = found[ref].passed = grad
        elif facts.view_of is not None and refs and op not in COMPUTED:
            call = (op, instr.args, instr.kwargs, instr.outs)
            several = instr.outs.__class__ is not Sig
            for i, (ref, sig) in enumerate(zip(made, flat_tensors(instr.outs), strict=True)):
                found[ref] = Shown(
                    ref, of(refs[0]), call, i if several else None, not grad and sig.differentiable
                )
        elif not facts.reshapes:
            for slot in written_slots(instr) if grad else ():
                if (
                    seen := found.get(refs[slot])
                ) is not None and not trace.autograd.active().isdisjoint(refs):
                    for step in [s for s in seen.path[1:] if s.call[0] is aten.detach.default][
                        -1:
                    ]:
                        step.apart = True
        else:
            found[refs[0]] = Shown(
                refs[0], of(refs[0]), (op, instr.args, instr.kwargs, instr.outs), cut=not grad
            )
    return found

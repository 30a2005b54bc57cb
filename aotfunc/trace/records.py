"""The steps of a recording: what one makes, what it writes, and running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..debug import Line
from .shapes import Instr, Sig, Slot, fill

aten = torch.ops.aten

# A record is (instr, refs of its tensors, grad enabled?, region, line). `instr` is a shapes.Instr for an op, or an
# object of another layer with the same duty: `facts` and `lower(functionalizer, record)`, see functionalize.Step.
Record = tuple[Any, tuple[int, ...], bool, Any, Line | None]


def instr_run(instr: Any, values: list[Tensor]) -> list[Tensor]:
    """Run one recorded step; its new results, flat."""
    if not isinstance(instr, Instr):
        return instr.run(values)
    if instr.op is aten.view_as_real.default:
        values = [v.resolve_conj() for v in values]
    outs = instr.op(*fill(instr.args, values), **{k: fill(v, values) for k, v in instr.kwargs.items()})
    facts = instr.facts
    if facts.writes:
        return [
            x
            for o, same in zip(outs if isinstance(outs, tuple | list) else (outs,), facts.same, strict=False)
            if same is None
            for x in flat(o)
        ]
    return flat(outs)


def flat(outs: Any) -> list:
    if isinstance(outs, list | tuple):
        return [x for o in outs for x in flat(o)]
    return [outs] if isinstance(outs, Tensor | Sig) else []


def result_sigs(instr: Any) -> list:
    """The signatures of the new values that a step makes."""
    if not instr.facts.writes:
        return flat(instr.outs)
    outs = instr.outs if isinstance(instr.outs, tuple) else (instr.outs,)
    return [sig for o, same in zip(outs, instr.facts.same, strict=False) if same is None for sig in flat(o)]


def results_of(instr: Any) -> int:
    """How many new values a step makes."""
    return len(result_sigs(instr))


def instr_op(instr: Any) -> Any:
    return getattr(instr, "op", None)


def written_slots(instr: Any) -> list[int]:
    """Which of a step's tensors it writes."""
    if not instr.facts.writes:
        return []
    if not isinstance(instr, Instr):
        return list(instr.facts.writes)
    found = []
    for i in instr.facts.writes:
        a = instr.args[i] if i < len(instr.args) else instr.kwargs.get(instr.facts.names[i])
        found += [int(s) for s in (a if isinstance(a, list | tuple) else [a]) if isinstance(s, Slot)]
    return found

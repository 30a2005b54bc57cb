"""Which op makes each result of a recording, and which results nothing else reads."""

from __future__ import annotations

from collections.abc import Sequence

from ..trace.records import instr_op, n_new_values, written_slots
from ..trace.tracer import Trace
from .calls import CallStep, CompiledStep
from .makers import made_in, op_name


def makers_of(trace: Trace, refs: Sequence[int]) -> tuple[str, ...]:
    """Return the op that made each of these values, by name: the last that wrote to it."""
    made = dict[int, str]()
    end = len(trace.inputs)
    for instr, given, *_ in trace.records:
        for s in written_slots(instr):
            made[given[s]] = op_name(instr_op(instr))
        nested: Sequence[str] = ()
        if isinstance(instr, CompiledStep):
            nested = instr.call.made
        elif isinstance(instr, CallStep):
            nested = made_in(instr.program)
        for i in range(n_new_values(instr)):
            made[end] = nested[i] if i < len(nested) else op_name(instr_op(instr))
            end += 1
    return tuple([made.get(r, "") for r in refs])


def unread(trace: Trace, refs: Sequence[int]) -> frozenset[int]:
    """Return the places of those of these values that no op reads."""
    read = {r for _, given, *_ in trace.records for r in given}
    return frozenset([k for k, r in enumerate(refs) if r not in read and refs.count(r) == 1])

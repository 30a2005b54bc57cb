"""Cut a recording down to the steps that a gradient taken inside it looks back at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..trace.records import Record, result_sigs
from ..trace.scalars import FIRST
from ..trace.shapes.sig import Sig
from ..trace.tracer import Trace


def path_from(
    trace: Trace, records: list[Record], refs: Sequence[int], count: int
) -> tuple[Trace, tuple[int, ...], list[int]]:
    """Return the part of ``records``, the first ones of the recording, after the last ``count`` of
    ``refs``, the differentiated values, as a recording of its own, the numbers of ``refs`` in it,
    and the numbers that its inputs have in ``trace``."""
    wanted, n_inputs = refs[len(refs) - count :], len(trace.inputs)
    reach, leaves, given_sigs = trace.autograd.reach(), trace.autograd.leaves, trace.signatures()
    on = set().union(*(reach.of(r, records, leaves) for r in wanted))
    start = min(reach.maker(r) + 1 if r >= n_inputs else 0 for r in wanted)

    def first_of(k: int) -> int:
        return reach.ends[k - 1] if k else n_inputs

    def sig(ref: int) -> Sig:
        if ref < n_inputs:
            return given_sigs[ref if ref >= 0 else n_inputs - 1 - ref]
        k = reach.maker(ref)
        return result_sigs(records[k][0])[ref - first_of(k)]

    taken: list[Record] = []
    own: list[int] = []
    for k in range(start, len(records)):
        made = range(first_of(k), reach.ends[k])
        if not on.isdisjoint(made):
            taken.append(records[k])
            own += made
    known = {*own}
    read = dict.fromkeys([r for _, given, *_ in taken for r in given] + [*refs])
    outside = [r for r in read if r not in known and r > FIRST]
    numbers = [r for r in read if r <= FIRST]
    place: dict[int, Any] = {r: i for i, r in enumerate((*outside, *own))}
    place |= {r: FIRST - i for i, r in enumerate(numbers)}
    part = Trace()
    part.inputs += map(sig, outside)
    part.numbers += [trace.numbers[FIRST - r] for r in numbers]
    part.records += [
        (instr, tuple([place[r] for r in given]), grad, None, None)
        for instr, given, grad, *_ in taken
    ]
    return part, tuple([place[r] for r in refs]), outside

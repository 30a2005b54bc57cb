"""Refuse writes to memory that a DTensor shares with a part of it, where both are used afterwards.

In eager mode ``x.to_local()`` shows the memory of ``x``, and ``DTensor.from_local(part)`` that of
the part. In a graph the two are values of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..debug import at
from ..errors import CaptureError
from .dtensors import mesh_and_placements
from .kinds import dtensor_class
from .records import instr_op, n_new_values, written_slots

if TYPE_CHECKING:
    from .tracer import Trace


def check_shared_parts(trace: Trace, returned: Sequence[int]) -> None:
    """Raise CaptureError for a used value that a write to another would have changed."""
    if not dtensor_class():
        return
    of, number = trace.roots().of, len(trace.inputs)
    together: dict[int, set[int]] = {}  # by what each value was made with
    stale: dict[int, Any] = {}  # and the line of the write
    for instr, refs, *_, line in trace.records:
        check_current(stale, [of.get(r, r) for r in refs])
        for slot in written_slots(instr):
            root = of.get(refs[slot], refs[slot])
            others = together.get(root, {root}) - {root}
            stale.update(dict.fromkeys(others, line))
            check_current(stale, [r for r in others if r < len(trace.inputs)])
        if shares(instr):
            root = of.get(refs[0], refs[0])
            group = together.setdefault(root, {root})
            group.add(number)
            together[number] = group
        number += n_new_values(instr)
    check_current(stale, [of.get(r, r) for r in returned])


def check_current(stale: dict[int, Any], roots: Sequence[int]) -> None:
    for root in roots:
        if root in stale:
            raise CaptureError(
                f"the memory of a DTensor or of its part is written{at(stale[root])}, and the "
                "other one is used afterwards: clone() one of them before"
            )


def shares(instr: Any) -> bool:
    """Return whether the result of an op between DTensors and parts shows its argument."""
    op, layouts = instr_op(instr), torch.ops.aotfunc_layout
    if op is not layouts.redistribute.default:
        return op in (layouts.to_local.default, layouts.from_local.default)
    there, here = (mesh_and_placements(text)[1] for text in instr.args[1:])
    return all(b.is_replicate() or a == b for a, b in zip(there, here, strict=True))

"""What a backward reads when autograd calls it: hooks, the contexts of Functions and checkpoints do
so unguarded. A compiled one has the values as they were, and refuses once they were written to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..capture.deferred import unguarded
from ..errors import AotfuncError
from ..graph import Program
from ..trace.memory import version

#: tensors, with their versions after the call
Versions = list[tuple[Tensor, int]]


def late_reads(program: Program) -> tuple[list[int], list[int]]:
    """The inputs and results of a program that its backward reads in eager mode without a guard of
    autograd's."""
    backwards, checkpoints = unguarded(program), unguarded(program, again=True)
    inputs, results = ({*a, *b} for a, b in zip(backwards, checkpoints, strict=True))
    return sorted(inputs), sorted(results)


def versions(
    reads: tuple[list[int], list[int]], tensors: Sequence[Tensor], outs: Sequence[Tensor]
) -> Versions:
    """What of a call may not be written to until its backward."""
    inputs, results = reads
    found = [tensors[i] for i in inputs] + [outs[i] for i in results]
    # a result, and what was written, know the backward that is to know them
    return [(t.detach(), version(t)) for t in found]


def check_unwritten(known: Versions, name: str) -> None:
    for t, before in known:
        if version(t) != before:
            raise AotfuncError(
                f"a tensor of shape {list(t.shape)} that the backward of {name} reads, in a hook, "
                "a Function or a checkpoint, was modified by an inplace operation after the call, "
                "which eager would see: let it read a clone()"
            )

"""Reads of a backward when autograd calls it: hooks, contexts of Functions and checkpoints read
unguarded. A compiled backward has the values of its call, and refuses if they were written to, or
if ``.data = `` gave a tensor other memory, which no version tells."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from ..capture.deferred import unguarded
from ..errors import AotfuncError
from ..graph import Program
from ..trace.memory import version

#: tensors, each as it was after the call, and its version
Versions = list[tuple[weakref.ref[Tensor], Tensor, int]]


def late_reads(program: Program) -> tuple[list[int], list[int]]:
    """Return what a backward reads in eager without a guard of autograd's."""
    backwards, checkpoints = unguarded(program), unguarded(program, again=True)
    inputs, results = ({*a, *b} for a, b in zip(backwards, checkpoints, strict=True))
    return sorted(inputs), sorted(results)


def versions(
    reads: tuple[list[int], list[int]], tensors: Sequence[Tensor], outs: Sequence[Tensor]
) -> Versions:
    """Return the tensors of a call that may not be written to until its backward."""
    inputs, results = reads
    found = [tensors[i] for i in inputs] + [outs[i] for i in results]
    # results and written tensors know the backward that reads them
    return [(weakref.ref(t), t.detach(), version(t)) for t in found]


def check_unwritten(known: Versions, name: str) -> None:
    """Raise AotfuncError if a tensor that a backward reads was written to after the call."""
    for ref, t, before in known:
        if (now := ref()) is not None:
            check_memory([now], [t.untyped_storage()], name)
        if version(t) != before:
            raise AotfuncError(
                f"a tensor of shape {list(t.shape)} that the backward of {name} reads, in a hook, "
                "a Function or a checkpoint, was modified by an inplace operation after the call, "
                "which eager would see: let it read a clone()"
            )


storage = Tensor.untyped_storage


def storages(tensors: Sequence[Tensor]) -> list[torch.UntypedStorage]:
    """Return the storages of the tensors; none of torch.func's wrappers, which tell no memory."""
    try:
        return [*map(storage, tensors)]
    except (RuntimeError, NotImplementedError):
        return []


def check_memory(
    tensors: Sequence[Tensor], before: Sequence[torch.UntypedStorage], name: str
) -> None:
    """Refuse a backward that depends on tensors with other memory than at the call: eager would
    read saved values there, and computed ones here."""
    if all(map(is_, before, map(storage, tensors))):
        return
    for t, memory in zip(tensors, before, strict=False):
        if t.untyped_storage()._cdata != memory._cdata:
            raise other_memory(t, name)


def other_memory(t: Tensor, name: str) -> AotfuncError:
    """Return the error for a tensor that has other memory than at the call."""
    return AotfuncError(
        f"`.data = ` gave a tensor of shape {list(t.shape)} other memory after the call of "
        f"{name}, whose backward depends on it: assign after the backward, or write to the memory "
        "that it has, with torch.no_grad(): x.copy_(value)"
    )

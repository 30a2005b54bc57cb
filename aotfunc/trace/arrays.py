"""Tensors that a function makes of an array's memory (``torch.from_numpy``), or of a buffer's.

Each is a constant: what the memory held when the tensor was made. Refused is what would show the
difference: NumPy sees no write to the tensor while the function is recorded, and the recording
none of NumPy's.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..debug import at, user_line
from ..errors import CaptureError
from .memory import PROCESS, Span, extent, meeting_pairs, memory_of, overlaps_itself
from .shapes.instr import env_key, intern, interned
from .shapes.sig import Slot, sig_of
from .traced import Traced, quiet, under_way

if TYPE_CHECKING:
    from .tracer import Trace

aten = torch.ops.aten
COPY = "make the tensor of a copy (torch.tensor(array)), or outside of the function"


class OfArray(NamedTuple):
    """The tensor on the array's memory, what that held then, the number of its value, the record
    that made it, and the array or buffer that has the memory, if it is known."""

    tensor: Tensor
    copy: Tensor
    ref: int
    record: int
    owner: Any

    @property
    def is_shared(self) -> bool:
        """Return whether anything but this tensor holds the array."""
        return self.owner is None or sys.getrefcount(self.owner) > HELD

    @property
    def has_changed(self) -> bool:
        """Return whether the memory holds something else now."""
        with quiet():
            both = [t.clone(memory_format=torch.contiguous_format) for t in self[:2]]
            return not torch.equal(*[t.reshape(-1).view(torch.uint8) for t in both])


#: the references to an array that its tensor, the tuple above and the question make
HELD = 3


def lift_array(trace: Trace, x: Tensor) -> Tensor:
    """Return the value of a tensor on the memory of an array."""
    with quiet():
        if overlaps_itself(sig_of(x)):
            copy = x.clone()
        else:
            copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
    ref, sig = trace.ref_of(copy)
    key = (aten.lift_fresh.default, sig, env_key())
    instr = interned(key) or intern(key, aten.lift_fresh.default, (Slot(0),), {}, (sig,))
    y: Traced = trace.note(instr, (ref,))
    trace.autograd.made += (weakref.ref(y),)
    owner = owner_of(trace.buffer)
    trace.arrays += (OfArray(x, copy, y.ref, len(trace.records) - 1, owner),)
    return y


def owner_of(array: Any) -> Any:
    """Return the array whose memory a view of it shows."""
    while isinstance(array, np.ndarray) and isinstance(array.base, np.ndarray):
        array = array.base
    return array


def check_array_write(trace: Trace, refs: Iterable[int]) -> None:
    """Refuse a write to one of these values if it shows the memory of an array that NumPy may read
    in the function."""
    roots = {trace.root(r) for r in refs}
    if any(a.ref in roots and a.is_shared for a in trace.arrays):
        raise CaptureError(
            "the function writes to a tensor that it makes of the memory of an array, or of a "
            f"buffer, which would not show it before the function is over{at(user_line(3))}: "
            f"{COPY}"
        )


def check_arrays(trace: Trace) -> None:
    """Refuse the recording if NumPy has written to memory of which a tensor was made before, and
    which it reads by another op than the next one."""
    of = trace.roots().of
    for a in trace.arrays:
        if a.has_changed:
            reads = [k for k, record in enumerate(trace.records) if a.ref in record[1]]
            lines = [trace.records[k][-1] for k in (a.record, *reads)]
            same = len({x and (x.code, x.number) for x in lines}) == 1
            at_once = same and reads in ([], [a.record + 1])
            viewed = any(root == a.ref and ref != root for ref, root in of.items())
            if viewed or not at_once:
                raise CaptureError(
                    "the function writes to an array after it has made a tensor of its memory"
                    f"{at(lines[0])}, which a recording does not see: {COPY}"
                )


def as_returned(trace: Trace, leaf: Any) -> Any:
    """Return a leaf of the result; a tensor on the array's memory, if the leaf is one and the
    array lives on."""
    if leaf.__class__ is not Traced or leaf.tracer is not trace or leaf.requires_grad:
        return leaf
    root = trace.root(leaf.ref)
    for a in trace.arrays:
        if a.ref == root and a.is_shared and root not in trace.roots().written:
            for each in under_way.traces:
                each.runs_always = True  # the next call's array may be another one
            with quiet():
                x = a.tensor.view(leaf.dtype) if leaf.dtype is not a.tensor.dtype else a.tensor
                start = x.storage_offset() + leaf.sig.offset
                return x.as_strided(leaf.sig.shape, leaf.sig.stride, start)
    return leaf


def check_outside_arrays(trace: Trace, arrays: Sequence[tuple[np.ndarray, bytes]]) -> None:
    """Refuse a recording that reads or writes the memory of arrays which the function reads, too,
    if it writes there, or NumPy has; what NumPy wrote is undone. ``arrays``: each with its content
    before the recording."""
    tensors = [*trace.origins, *trace.lifted]
    bounds = [bounds_of(a) for a, _ in arrays]
    spans = [*map(memory_of, tensors), *(Span(PROCESS, start) for start, _ in bounds)]
    extents = [*map(extent, tensors), *(size for _, size in bounds)]
    places, written = trace.layout(), trace.roots().written
    groups = {places[trace.position(r)].group for r in written if r < len(trace.inputs)}
    for i, k in map(sorted, meeting_pairs(spans, extents)):
        if i < len(tensors) <= k:
            array, before = arrays[k - len(tensors)]
            changed = array.tobytes() != before
            if changed:
                array[...] = np.frombuffer(before, array.dtype).reshape(array.shape)
            if changed or places[i].group in groups:
                raise CaptureError(
                    f"the function reads an array of shape {list(array.shape)}, and a tensor of "
                    f"shape {list(tensors[i].shape)} that shows its memory, and writes to one of "
                    f"them, which the other one would not show before the function is over: {COPY}"
                )


def bounds_of(array: np.ndarray) -> tuple[int, int]:
    """Return the address of the first byte of an array, and the bytes to its last."""
    steps = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    start = array.__array_interface__["data"][0] + sum(s for s in steps if s < 0)
    return start, sum(map(abs, steps)) + array.itemsize if array.size else 0

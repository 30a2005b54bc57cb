"""Tensors that a function makes of an array's memory (``torch.from_numpy``), or of a buffer's.

Each is a constant: what the memory held when the tensor was made. Refused is what would show the
difference: NumPy sees no write to the tensor while the function is recorded, and the recording
none of NumPy's.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..debug import at, user_line
from ..errors import CaptureError
from .memory import PROCESS, Span, extent, meeting_pairs, memory_at, memory_of, overlaps_itself
from .shapes.instr import env_key, intern, interned
from .shapes.sig import Sig, Slot, sig_of
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
        return self.owner is None or self.references > HELD

    @property
    def references(self) -> int:
        return sys.getrefcount(self.owner)

    @property
    def has_changed(self) -> bool:
        """Return whether the memory holds something else now."""
        with quiet():
            both = [t.clone(memory_format=torch.contiguous_format) for t in self[:2]]
            return not torch.equal(*[t.reshape(-1).view(torch.uint8) for t in both])


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
    """Return the array that owns the memory which an array shows; None for other buffers."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array if isinstance(array, np.ndarray | bytearray) else None


def lone_array() -> OfArray:
    """Return the tensor of an array that nothing else holds."""
    array = np.zeros(1)
    return OfArray(torch.from_numpy(array), torch.zeros(1), 0, 0, array)


#: the references to an array that its tensor, the tuple and the question make
HELD = lone_array().references


def check_array_write(trace: Trace, written: Iterable[tuple[int, Sig]]) -> None:
    """Refuse a write to memory that NumPy may read in the function: of which it has an array, or
    of which the function makes a tensor."""
    for ref, sig in written:
        root = trace.root(ref)
        if any(a.ref == root and a.is_shared for a in trace.arrays):
            raise CaptureError(
                "the function writes to a tensor that it makes of the memory of an array, or of a "
                f"buffer, which would not show it before the function is over{at(user_line(3))}: "
                f"{COPY}"
            )
        alive = [(span, size) for array, span, size in trace.shown if array() is not None]
        spans = [memory_at(trace, ref, sig), *(span for span, _ in alive)]
        pairs = meeting_pairs(spans, [extent(sig.proto), *(size for _, size in alive)])
        if any(0 in pair for pair in pairs):
            raise CaptureError(
                "the function writes to a tensor of whose memory it has an array (x.numpy()), "
                f"which would not show it{at(user_line(3))}: take a copy (x.numpy().copy())"
            )


def shown_array(t: Tensor, array: np.ndarray) -> np.ndarray:
    """Return the array of a tensor's values, read-only: no recording would see writes to it."""
    array.flags.writeable = False
    if under_way.traces and array.size:
        shown = weakref.ref(array), memory_of(t), extent(t)
        for each in under_way.traces:
            each.shown += (shown,)
    return array


@contextmanager
def without_warning(trace: Trace, data: Any) -> Iterator[None]:
    """Silence torch's warning of an array that is read-only as :func:`shown_array` made it."""
    if all(array() is not data for array, *_ in trace.shown):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    root, sig = trace.root(leaf.ref), leaf.sig
    if root in trace.roots().written or trace.conjugated(leaf.ref):
        return leaf
    for a in trace.arrays:
        if a.ref == root and a.is_shared:
            for each in under_way.traces:
                each.runs_always = True  # the next call's array may be another one
            with quiet():
                memory = a.tensor.untyped_storage()
                return torch.empty(0, dtype=sig.dtype).set_(
                    memory, sig.offset, sig.shape, sig.stride
                )
    return leaf


def check_outside_arrays(trace: Trace, arrays: Sequence[tuple[np.ndarray, bytes]]) -> None:
    """Refuse a recording that reads or writes the memory of arrays which the function reads, too,
    if it writes there, or NumPy has. ``arrays``: each with its content before the recording."""
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

"""Tell which tensors overlap in memory, and where each begins: a write to one is seen through the
others.

The memory of a tensor is that of the process, where it has an address: two storages may share it
(two ``torch.from_numpy`` of one array). That of a recording's value is its root. So parts of one
buffer are told apart even if they are samples of a batch, although the signature of each begins at
0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import lcm
from operator import add, le
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .aliases import final_views
from .shapes.sig import Sig, contiguous_stride, reach
from .traced import Traced

if TYPE_CHECKING:
    from .tracer import Trace

aten = torch.ops.aten


class MemoryPlace(NamedTuple):
    """``group`` is the same for tensors that overlap, directly or through others. ``start``, from
    the first one of the group, and ``step`` (between samples, if the tensor is a batch) are in
    bytes. ``kin`` is the same for those of a group that autograd knows as views of one tensor: a
    detached one is not."""

    group: int
    start: int
    step: int | None
    kin: int = 0


class Span(NamedTuple):
    """The memory of a tensor, and the byte of it at which the tensor begins."""

    memory: Any
    start: int


def places_of(
    tensors: Sequence[Tensor], dims: Sequence[int | None] | None = None
) -> tuple[MemoryPlace, ...]:
    """Return the place of each tensor. ``dims``: the dimensions along which they are batches."""
    if plainly_apart(tensors):
        return separate_places(len(tensors))
    spans = [memory_of(t) for t in tensors]
    groups = list(range(len(tensors)))
    for i, k in meeting_pairs(spans, [*map(extent, tensors)]):
        if groups[k] != groups[i] and overlap(
            tensors[k], spans[k].start, tensors[i], spans[i].start
        ):
            old, new = max(groups[i], groups[k]), min(groups[i], groups[k])
            groups = [new if g == old else g for g in groups]
    first: dict[int, list[int]] = {}
    for g, span in zip(groups, spans, strict=True):
        first.setdefault(g, []).append(span.start)
    if len(first) == len(groups):
        return separate_places(len(groups))
    kins: dict[Any, int] = {}
    return tuple(
        MemoryPlace(g, 0, None)
        if len(first[g]) == 1
        else MemoryPlace(
            g,
            span.start - min(first[g]),
            batch_step(t, dims[i] if dims else None),
            kins.setdefault(view_key(t), len(kins)),
        )
        for i, (g, t, span) in enumerate(zip(groups, tensors, spans, strict=True))
    )


def plainly_apart(tensors: Sequence[Tensor]) -> bool:
    """Return whether the tensors have storages that share no memory; False if that is not easily
    told."""
    if not _PLAIN.issuperset(map(type, tensors)):
        return False
    try:
        storages = [*map(_untyped_storage, tensors)]
    except (RuntimeError, NotImplementedError):
        return False
    starts = [*map(_address, storages)]
    # if none ends after the next one begins, the storages that begin and end are the same ones
    ends = sorted(map(add, starts, map(_nbytes, storages)))
    starts.sort()
    return bool(not starts or starts[0]) and all(map(le, ends, starts[1:]))


_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_untyped_storage = torch._C.TensorBase.untyped_storage
_address, _nbytes = torch.UntypedStorage.data_ptr, torch.UntypedStorage.nbytes


def meeting_pairs(spans: Sequence[Span], extents: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of positions whose bytes meet, the one that begins first in front."""
    memories: dict[Any, list[tuple[int, int]]] = {}
    for i, (memory, start) in enumerate(spans):
        memories.setdefault(memory, []).append((start, i))
    for starts in memories.values():
        before: list[tuple[int, int]] = []  # where each ends
        for start, i in sorted(starts):
            if before:
                before = [x for x in before if x[0] > start]
                yield from [(k, i) for _, k in before]
            before.append((start + extents[i], i))


def storage_groups(tensors: Sequence[Tensor]) -> list[int]:
    """Return a number for each tensor, the same for those whose storages share memory."""
    spans, found = [storage_span(t) for t in tensors], [0] * len(tensors)
    group, memory, end = -1, None, 0
    for i in sorted(range(len(spans)), key=spans.__getitem__):
        now, start, stop = spans[i]
        if now != memory or start >= end:
            group, memory, end = group + 1, now, stop
        found[i], end = group, max(end, stop)
    return found


def storage_span(t: Tensor) -> tuple[int, int, int]:
    """Return the identity of the memory of a tensor's storage, and its first and last byte."""
    storage = t.untyped_storage()
    start = address_of_storage(storage)
    return (PROCESS, start, start + storage.nbytes()) if start else (storage._cdata, 0, 1)


@functools.cache
def separate_places(count: int) -> tuple[MemoryPlace, ...]:
    """Return the places of so many tensors that share no memory."""
    return tuple([MemoryPlace(i, 0, None) for i in range(count)])


def whereabouts(tensors: Sequence[Tensor]) -> tuple:
    """Return all that a program may depend on of where tensors lie."""
    return places_of(tensors), tuple([torch._C.TensorBase.storage_offset(t) for t in tensors])


def batch_step(t: Tensor, dim: int | None) -> int | None:
    return None if dim is None else t.stride(dim) * t.element_size()


def view_key(t: Tensor) -> Any:
    """Return the identity of the tensor that autograd knows ``t`` as a view of."""
    if t.__class__ is not Traced:
        return id(t if t._base is None else t._base)
    trace, seen = t.tracer, final_views(t.tracer).get(t.ref)
    path = [] if seen is None else seen.path
    ref = next(
        (s.ref for s in reversed(path[1:]) if s.call[0] is aten.detach.default),
        path[0].ref if path else t.ref,
    )
    if 0 <= ref < len(trace.origins):
        return view_key(trace.origins[ref])
    return view_key(trace.lifted[-ref - 1]) if ref < 0 else (id(trace), ref)


def memory_of(t: Tensor) -> Span:
    """Return the identity of ``t``'s memory, and the byte of it at which ``t`` begins."""
    if t.__class__ is Traced:
        return memory_at(t.tracer, t.ref, t.sig)
    try:
        storage, offset = t.untyped_storage(), t.storage_offset() * t.element_size()
    except (RuntimeError, NotImplementedError):
        return Span(id(t), 0)
    address = address_of_storage(storage)
    return Span(PROCESS, address + offset) if address else Span(storage._cdata, offset)


def address_of_storage(storage: torch.UntypedStorage) -> int:
    """Return where a storage begins, 0 if it has no memory; fake tensors warn if asked."""
    try:
        return 0 if storage.device.type == "meta" else storage.data_ptr()
    except RuntimeError:  # of a tensor of tensors
        return 0


#: the identity of all memory that has addresses
PROCESS = 0


def memory_at(trace: Trace, ref: int, sig: Sig) -> Span:
    """Return the identity of a value's memory, and the byte of it where the value begins."""
    root = trace.root(ref)
    real = outside_root(trace, root)
    if real is None:
        return Span((id(trace), root), sig.offset * sig.dtype.itemsize)
    base = trace.inputs[root].offset if root >= 0 else real.storage_offset()
    memory, start = memory_of(real)
    return Span(memory, start + (sig.offset - base) * sig.dtype.itemsize)


def storage_of(t: Tensor) -> Any:
    """Return the identity of the storage of ``t``, or of the value that it is a view of."""
    if t.__class__ is not Traced:
        return t.untyped_storage()._cdata
    root = t.tracer.root(t.ref)
    real = outside_root(t.tracer, root)
    return (id(t.tracer), root) if real is None else storage_of(real)


def outside_root(trace: Trace, root: int) -> Tensor | None:
    """Return the tensor from outside that a root is; None if it was made in the recording."""
    count = len(trace.inputs)
    if root >= count or (root >= 0 and len(trace.origins) != count):
        return None
    return trace.origins[root] if root >= 0 else trace.lifted[-root - 1]


def version(t: Tensor) -> int:
    """Return how often a tensor has been written to, 0 for one of inference mode."""
    if t.__class__ is Traced:
        return 0 if t.is_inference() else t._version
    try:  # asking first takes longer
        return t._version
    except RuntimeError:
        return 0


def overlap(a: Tensor, a_start: int, b: Tensor, b_start: int) -> bool:
    """Return whether two tensors of one memory share an element; True if that is hard to tell."""
    if a_start >= b_start + extent(b) or b_start >= a_start + extent(a):
        return False
    try:
        x, y = _block(a, a_start), _block(b, b_start)
        return np.shares_memory(x, y, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def extent(t: Tensor) -> int:
    """Return the bytes from the first element of ``t`` to the end of its last."""
    if t.is_contiguous():
        return t.nbytes
    return reach(t.shape, t.stride()) * t.element_size()


def offset_inside(base: Sig, at: MemoryPlace, sig: Sig, place: MemoryPlace) -> int | None:
    """Return the element of ``base`` where ``sig`` begins; None unless wholly inside."""
    size = base.dtype.itemsize
    start, odd = divmod(place.start - at.start, size)
    dense = base.stride == contiguous_stride(base.shape) and (
        at.step is None or abs(at.step) >= base.numel * size
    )
    inside = start >= 0 and start + sig.extent - sig.offset <= base.numel
    return (
        start
        if dense and inside and not odd and sig.dtype is base.dtype and place.step == at.step
        else None
    )


def overlaps_itself(sig: Sig) -> bool:
    """Return whether steps along one dimension, or along two, lead to the same memory.
    Combinations of three are not tested."""
    if 0 in sig.shape:
        return False
    steps = [(s, n) for s, n in zip(sig.stride, sig.shape, strict=True) if n > 1]
    if any(s == 0 for s, _ in steps):
        return True
    return any(lcm(s, t) < min(s * n, t * m) for (s, n), (t, m) in combinations(steps, 2))


def _block(t: Tensor, start: int) -> np.ndarray:
    """Return an array that lies where ``t`` does, relative to others; it is never read."""

    class Block:
        __array_interface__ = {
            "data": ((1 << 20) + start, True),
            "shape": tuple(t.shape),
            "strides": tuple([s * t.element_size() for s in t.stride()]),
            "typestr": f"|V{t.element_size()}",
            "version": 3,
        }

    return np.asarray(Block())

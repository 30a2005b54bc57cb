"""Tell which tensors overlap in memory, and where each begins: a write to one is seen through the
others.

The memory of a tensor is its storage; that of a recording's value is its root. So parts of one
buffer are told apart even if they are samples of a batch, although the signature of each begins at
0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import combinations
from math import lcm
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
    """``group`` is the same for tensors that overlap, directly or through others. ``start`` and
    ``step`` (between samples, if the tensor is a batch) are in bytes. ``kin`` is the same for
    those of a group that autograd knows as views of one tensor: a detached one is not."""

    group: int
    start: int
    step: int | None
    kin: int = 0


def places_of(
    tensors: Sequence[Tensor], dims: Sequence[int | None] | None = None
) -> tuple[MemoryPlace, ...]:
    """Return the place of each tensor. ``dims``: the dimensions along which they are batches."""
    known = [memory_of(t) for t in tensors]
    if len({memory for memory, _ in known}) == len(known):
        return separate_places(len(known))
    groups = list(range(len(tensors)))
    beside: dict[Any, list[int]] = {}
    for i, (memory, _) in enumerate(known):
        others = beside.setdefault(memory, [])
        for k in others:
            if groups[k] != groups[i] and overlap(
                tensors[k], known[k][1], tensors[i], known[i][1]
            ):
                old, new = max(groups[i], groups[k]), min(groups[i], groups[k])
                groups = [new if g == old else g for g in groups]
        others.append(i)
    alone = (
        {g for g in groups if groups.count(g) == 1}
        if any(len(x) > 1 for x in beside.values())
        else set(groups)
    )
    kins: dict[Any, int] = {}
    return tuple(
        MemoryPlace(g, 0, None)
        if g in alone
        else MemoryPlace(
            g,
            start,
            batch_step(t, dims[i] if dims else None),
            kins.setdefault(view_key(t), len(kins)),
        )
        for i, (g, t, (_, start)) in enumerate(zip(groups, tensors, known, strict=True))
    )


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


def memory_of(t: Tensor) -> tuple[Any, int]:
    """Return the identity of ``t``'s memory, and the byte of it at which ``t`` begins."""
    if t.__class__ is Traced:
        return memory_at(t.tracer, t.ref, t.sig)
    try:
        return t.untyped_storage()._cdata, t.storage_offset() * t.element_size()
    except (RuntimeError, NotImplementedError):
        return id(t), 0


def memory_at(trace: Trace, ref: int, sig: Sig) -> tuple[Any, int]:
    """Return the identity of a value's memory, and the byte of it where the value begins."""
    root, count = trace.root(ref), len(trace.inputs)
    if root >= count or (root >= 0 and len(trace.origins) != count):
        return (id(trace), root), sig.offset * sig.dtype.itemsize
    real = trace.origins[root] if root >= 0 else trace.lifted[-root - 1]
    base = trace.inputs[root].offset if root >= 0 else real.storage_offset()
    memory, start = memory_of(real)
    return memory, start + (sig.offset - base) * sig.dtype.itemsize


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

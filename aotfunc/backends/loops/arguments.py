"""What a kernel's function is called with: how many rows, which sizes, and which memory."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch

from .ir import Const, Kernel, walk

#: types of vectors, by how many lanes they have
VECTORS = {
    "FLOATS": {torch.float32: "floats", torch.int32: "ints", torch.bool: "ints"},
    "DOUBLES": {torch.float64: "doubles", torch.int64: "longs", torch.bool: "longs"},
}

#: points of a cross axis that are computed together
BLOCK = 16


def lanes_of(kernel: Kernel) -> str:
    """How many points are computed at a time, as the text says it."""
    values = walk(kernel.values)
    dtypes = {e.dtype for e in values} | {kernel.accesses[s.access].dtype for s in kernel.stores}
    fits = [w for w, types in VECTORS.items() if dtypes <= set(types)]
    return fits[0] if fits and kernel.extents else "1"


def sizes(kernel: Kernel) -> tuple[int, ...]:
    """The numbers that a kernel's function gets: extents, strides, the bits of doubles."""
    steps = [kernel.accesses[i].strides[k] for i, k in strides(kernel)]
    numbers = [struct.unpack("q", struct.pack("d", c.value))[0] for c in given(kernel)]
    return (*kernel.extents, *steps, *numbers)


def given(kernel: Kernel) -> list[Const]:
    """The numbers that are arguments."""
    return [e for e in walk(kernel.values) if isinstance(e, Const) and e.given]


def strides(kernel: Kernel) -> Iterator[tuple[int, int]]:
    """(access, axis) of each stride that is an argument."""
    for i, a in enumerate(kernel.accesses):
        for k, s in enumerate(a.strides):
            if s and not (s == 1 and k == kernel.vector):
                yield i, k


def rows(kernel: Kernel) -> int:
    """How many rows a kernel's function divides its work into: the points of the outer axes, but
    for the vector axis if there is another one; blocks of the cross axis."""
    outer = list(kernel.extents[: kernel.outer])
    if kernel.cross >= 0:
        outer[kernel.cross] = -(-outer[kernel.cross] // BLOCK)
    if 0 <= kernel.vector < kernel.outer > 1:
        del outer[kernel.vector]
    return math.prod(outer)

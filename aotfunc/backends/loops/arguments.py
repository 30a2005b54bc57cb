"""The arguments of a kernel's function: how many rows, which sizes, and which memory."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch

from .blocks import ROWS
from .ir import Access, Const, Kernel, Ramp, Reduce, walk

#: number of lanes -> type of vector
VECTORS = {
    "FLOATS": {torch.float32: "floats", torch.int32: "ints", torch.bool: "ints"},
    "DOUBLES": {torch.float64: "doubles", torch.int64: "longs", torch.bool: "longs"},
}

#: points of a cross axis that are computed together
BLOCK = 16


def lanes_of(kernel: Kernel) -> str:
    """Return how many points are computed at a time, as C++ text."""
    k = kernel.vector
    vectors = [e for e in walk(kernel.values) if k in kernel.axes(e) or isinstance(e, Reduce)]
    stores = [s for s in kernel.stores if kernel.extents and kernel.accesses[s.access].strides[k]]
    stores += kernel.scatters
    dtypes = {e.dtype for e in vectors} | {s.value.dtype for s in stores}
    fits = [w for w, types in VECTORS.items() if dtypes <= set(types)]
    return fits[0] if fits and kernel.extents else "1"


def sizes(kernel: Kernel) -> tuple[int, ...]:
    """List the numbers that a kernel takes: :func:`named_sizes`, then bits of doubles."""
    numbers = [struct.unpack("q", struct.pack("d", c.value))[0] for c in given(kernel)]
    return (*[n for _, n in named_sizes(kernel)], *numbers)


def given(kernel: Kernel) -> list[Const]:
    """List the numbers of the graph that are arguments."""
    return [e for e in walk(kernel.values) if isinstance(e, Const) and e.given]


def named_sizes(kernel: Kernel) -> Iterator[tuple[str, int]]:
    """Yield names and values of extents, steps and starts other than 0 and 1."""
    for k, n in enumerate(kernel.extents):
        yield f"n{k}", n
    walked: list[tuple[str, Access | Ramp]] = [(f"s{i}", a) for i, a in enumerate(kernel.accesses)]
    walked += [(f"r{i}", r) for i, r in enumerate(kernel.ramps)]
    for name, w in walked:
        for k, step in enumerate(w.strides):
            if step and not (step == 1 and k == kernel.vector):
                yield f"{name}_{k}", step
        if w.start:
            yield f"{name}_start", w.start
    for s in kernel.scatters:
        yield f"s{s.access}_size", s.size


def count_rows(kernel: Kernel) -> int:
    """Return how many rows a kernel's function divides its work into: the points of the outer
    axes, without the vector axis if there is another one; blocks of the cross axis, or of rows;
    one if several rows may be added to one place."""
    outer = list(kernel.extents[: kernel.outer])
    if kernel.scatters:
        return 1
    if kernel.blocks:
        return -(-math.prod(outer) // ROWS)
    if kernel.cross >= 0:
        outer[kernel.cross] = -(-outer[kernel.cross] // BLOCK)
    if 0 <= kernel.vector < kernel.outer > 1:
        del outer[kernel.vector]
    return math.prod(outer)

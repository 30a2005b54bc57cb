"""Order a kernel's axes, merge those that run as one, and choose the one to compute in vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .ir import Access, Kernel, Ramp

#: fewest points of an axis that is computed in vectors
SHORT = 8


def schedule_kernel(kernel: Kernel) -> Kernel:
    """Return the kernel with its axes ordered as its memory is, neighbours merged if every access
    allows it, and its vector axis chosen."""
    kernel = merged(order_axes(kernel))
    kernel = replace(kernel, vector=vector_axis(kernel))
    return replace(kernel, cross=cross_axis(kernel))


def rearranged(
    kernel: Kernel, extents: list[int], reduced: int, strides: Callable[[tuple], tuple]
) -> Kernel:
    def moved(walked: Sequence) -> tuple:
        return tuple([replace(w, strides=strides(w.strides)) for w in walked])

    return replace(
        kernel,
        extents=tuple(extents),
        reduced=reduced,
        accesses=moved(kernel.accesses),
        ramps=moved(kernel.ramps),
        axes_of={},
    )


def widest(kernel: Kernel) -> list[int]:
    """Return the accesses that decide the order: outputs, then inputs, most axes first."""
    stores = [s.access for s in kernel.stores]
    rest = [i for i in range(len(kernel.accesses)) if i not in stores]
    return sorted(stores + rest, key=lambda i: kernel.accesses[i].strides.count(0))


def order_axes(kernel: Kernel) -> Kernel:
    """Return the kernel with axes ordered by their steps, larger ones first; an access that does
    not vary along two axes leaves their order to the next."""
    columns = [kernel.accesses[i].strides for i in widest(kernel)]

    def steps(k: int) -> tuple:
        return tuple([-s[k] for s in columns])

    outer, rank = kernel.outer, len(kernel.extents)
    order = sorted(range(outer), key=steps) + sorted(range(outer, rank), key=steps)
    return rearranged(
        kernel,
        [kernel.extents[k] for k in order],
        kernel.reduced,
        lambda s: tuple([s[k] for k in order]),
    )


def merged(kernel: Kernel) -> Kernel:
    """Return the kernel with neighbouring axes merged if all accesses take equal steps."""
    groups: list[list[int]] = []
    for k in range(len(kernel.extents)):
        if groups and k != kernel.outer and can_merge(kernel, groups[-1][-1], k):
            groups[-1].append(k)
        else:
            groups.append([k])
    extents = []
    for group in groups:
        n = 1
        for k in group:
            n *= kernel.extents[k]
        extents.append(n)
    reduced = sum(g[0] >= kernel.outer for g in groups)
    return rearranged(kernel, extents, reduced, lambda s: tuple([s[g[-1]] for g in groups]))


def can_merge(kernel: Kernel, k: int, inner: int) -> bool:
    n = kernel.extents[inner]
    walked: list[Access | Ramp] = [*kernel.accesses, *kernel.ramps]
    return all(w.strides[k] == n * w.strides[inner] for w in walked)


def vector_axis(kernel: Kernel) -> int:
    """Return the axis along which most of the largest accesses are contiguous: the last of all
    axes, or an outer one. One shorter than a vector is passed over."""
    last = len(kernel.extents) - 1
    choices = {last} if kernel.blocks else {*range(kernel.outer), last} - {-1}
    if not choices:
        return -1
    every = kernel.accesses
    inner = [a for a in every if any(a.strides[kernel.outer :])] or every

    rank = [len(a.strides) - a.strides.count(0) for a in inner]
    widest = [a for a, n in zip(inner, rank, strict=True) if n == max(rank)]

    def worth(k: int) -> tuple:
        contiguous = [sum(side_by_side(a, k) for a in some) for some in (widest, inner)]
        return kernel.extents[k] >= SHORT, *contiguous, k in (kernel.outer - 1, last), k

    return max(choices, key=worth)


def side_by_side(a: Access, k: int) -> bool:
    """Return whether neighbours along an axis are neighbours in memory."""
    return a.strides[k] == (1 if a.part is None else 2)


def cross_axis(kernel: Kernel) -> int:
    """Return an outer axis along which a tensor is contiguous that takes large steps along the
    vector axis, as a transposed one does; -1 if there is none."""
    if kernel.reduced:
        return -1
    for a in kernel.accesses:
        if a.strides and a.strides[kernel.vector] and not side_by_side(a, kernel.vector):
            for k, n in enumerate(kernel.extents):
                if side_by_side(a, k) and n >= SHORT:
                    return k
    return -1

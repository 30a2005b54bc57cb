"""Ops whose results depend on windows of their images: convolutions, pooling, resizing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse
from torch.fx import Node

from .pattern import Pattern, joined
from .products import Dependence, aten, indexed, kron, pattern_of


def spread(d: Dependence, a: Node, windows: list[Pattern]) -> Pattern:
    """Return the pattern of a result each plane of which depends on that of ``a``, by windows."""
    each = functools.reduce(kron, windows)
    planes = a.meta["val"].numel // each.shape[1] if each.shape[1] else 0
    return kron(sparse.eye_array(planes, dtype=bool), each) @ d.of(a)


def image_shape(n: Node, rank: int) -> list[int]:
    return list(n.meta["val"].shape[-rank:])


def window(size: int, places: np.ndarray) -> Pattern:
    """Return the pattern of rows that read these places, if within ``size`` elements."""
    row, tap = np.nonzero((places >= 0) & (places < size))
    found = (np.ones(len(row), bool), (row, places[row, tap]))
    return sparse.csr_array(found, (len(places), size))


def per(given: Any, rank: int) -> list[int]:
    """Return one value for each of the last dimensions."""
    return list(given) * (rank if len(given) == 1 else 1)


# ----- convolutions ------------------------------------------------------------------------------


def taps(
    d: Dependence,
    x: Node,
    out: Node,
    w: Node,
    stride: Any,
    padding: Any,
    gaps: Any,
    transposed: bool,
    _: Any,
    groups: int,
) -> Pattern:
    """Return the pattern of a convolution by its images: the union of those of the weight's taps.
    A transposed one is that of the convolution the other way."""
    if transposed:
        x, out = out, x
    nonzero = d.nonzero(w)
    rank = nonzero.ndim - 2
    sizes = image_shape(x, rank), image_shape(out, rank)
    how = [*zip(*sizes, *(per(v, rank) for v in (stride, padding, gaps)), strict=True)]
    shape = out.meta["val"].numel, x.meta["val"].numel
    found, batch = [], sparse.eye_array(x.meta["val"].shape[0], dtype=bool)
    for tap in np.argwhere(nonzero.any((0, 1))):
        channels = sparse.block_diag(np.split(nonzero[:, :, *tap], groups))
        each = [
            window(size, np.arange(count)[:, None] * s - pad + gap * t)
            for t, (size, count, s, pad, gap) in zip(tap, how, strict=True)
        ]
        found.append(functools.reduce(kron, [batch, channels, *each]))
    whole = joined([sparse.csr_array(shape, dtype=bool), *found])
    return whole.T.tocsr() if transposed else whole


@pattern_of(aten.convolution.default)
def convolution(d: Dependence, n: Node, x: Node, w: Node, bias: Any, *how: Any) -> Pattern:
    rest = "*" * (n.meta["val"].ndim - 2)
    channels = "c*" if not how[3] else "*c" if how[-1] == 1 else "**"  # the last: groups
    return joined(
        [
            taps(d, x, n, w, *how) @ d.of(x),
            indexed(d, n, "*c" + rest, (w, channels + rest), (bias, "c")),
        ]
    )


@pattern_of(aten.convolution_backward.default)
def convolution_backward(
    d: Dependence, n: Node, g: Node, x: Node, w: Node, sizes: Any, *how: Any
) -> Pattern:
    """Return the pattern of the cotangent of the images, the weight or the bias."""
    *how, _ = how  # type: ignore[assignment]
    rest, whole = "*" * (g.meta["val"].ndim - 2), how[-1] == 1
    which = n.args[1]
    if which == 0:
        channels = "**" if not whole else "c*" if how[3] else "*c"
        return joined(
            [
                taps(d, n, g, w, *how).T.tocsr() @ d.of(g),
                indexed(d, n, "*c" + rest, (w, channels + rest)),
            ]
        )
    if which == 1:
        channels = ("io" if how[3] else "oi") if whole else ("**" if how[3] else "o*")
        return indexed(d, n, channels + rest, (g, "*o" + rest), (x, "*i" + rest))
    return indexed(d, n, "o", (g, "*o" + rest))


# ----- pooling -----------------------------------------------------------------------------------


#: makes the windows of each of the last ``rank`` dimensions: ``(rank, images, result, *args)``
Windows = Callable[..., list[Pattern]]


def windowed(name: str, rank: int, make: Windows) -> None:
    """Register a pooling ``(x, *args)``, and its backward ``(g, x, *args)``."""

    @pattern_of(getattr(aten, name).default)
    def forward(d: Dependence, n: Node, x: Node, *args: Any) -> Pattern:
        return spread(d, x, make(rank, x, n, *args))

    @pattern_of(getattr(aten, f"{name}_backward").default)
    def backward(d: Dependence, n: Node, g: Node, x: Node, *args: Any) -> Pattern:
        return spread(d, g, [w.T for w in make(rank, n, g, *args)])


def pooling_pattern(
    rank: int, x: Node, out: Node, kernel: Any, stride: Any, padding: Any, gaps: Any, *_: Any
) -> list[Pattern]:
    how = [per(v, rank) for v in (kernel, stride or kernel, padding, gaps)]
    return [
        window(size, np.arange(count)[:, None] * s - pad + gap * np.arange(k))
        for size, count, k, s, pad, gap in zip(
            image_shape(x, rank), image_shape(out, rank), *how, strict=True
        )
    ]


def averaged(
    rank: int, x: Node, out: Node, kernel: Any, stride: Any, padding: Any, *_: Any
) -> list[Pattern]:
    return pooling_pattern(rank, x, out, kernel, stride, padding, [1])


def adaptive_windows(rank: int, x: Node, out: Node, *_: Any) -> list[Pattern]:
    def one(size: int, count: int) -> Pattern:
        i = np.arange(count)[:, None]
        first, end = i * size // count, -(-(i + 1) * size // count)
        places = first + np.arange(np.max(end - first, initial=0))
        return window(size, np.where(places < end, places, -1))

    return [
        one(*sizes) for sizes in zip(image_shape(x, rank), image_shape(out, rank), strict=True)
    ]


for rank in (2, 3):
    windowed(f"max_pool{rank}d_with_indices", rank, pooling_pattern)
    windowed(f"avg_pool{rank}d", rank, averaged)
    windowed(f"adaptive_max_pool{rank}d", rank, adaptive_windows)
    windowed(f"_adaptive_avg_pool{rank}d", rank, adaptive_windows)


# ----- resizing ----------------------------------------------------------------------------------

#: op -> dimensions, and how far a result reads on each side of its place
RESIZED = {
    "upsample_linear1d": (1, 1),
    "upsample_bilinear2d": (2, 1),
    "upsample_trilinear3d": (3, 1),
    "upsample_bicubic2d": (2, 2),
    "_upsample_bilinear2d_aa": (2, 1),
    "_upsample_bicubic2d_aa": (2, 2),
}


def resized(name: str, rank: int, reach: int) -> None:
    """Register ``(x, size, corners, *scales)`` and ``(g, size, size of x, corners, *scales)``."""

    def make(x: Node, out: Node, align: bool, *scales: float | None) -> list[Pattern]:
        def one(size: int, count: int, scale: float | None) -> Pattern:
            i = np.arange(count)[:, None]
            if align:
                step = (size - 1) / max(count - 1, 1)
                at = i * step
            else:
                step = 1 / scale if scale else size / count
                at = (i + 0.5) * step - 0.5
            far = reach * max(step, 1.0) + 0.5 if name.endswith("aa") else reach
            first = np.ceil(at - far - 1e-4)  # kernels round
            places = first + np.arange(2 * int(far + 1) + 1)
            places = np.where(places <= at + far + 1e-4, places, first)
            return window(size, places.astype(np.int64).clip(0, size - 1))

        sizes = image_shape(x, rank), image_shape(out, rank)
        return [one(*how) for how in zip(*sizes, scales, strict=True)]

    @pattern_of(getattr(aten, name).default)
    def forward(d: Dependence, n: Node, x: Node, size: Any, *how: Any) -> Pattern:
        return spread(d, x, make(x, n, *how))

    @pattern_of(getattr(aten, name + "_backward").default)
    def backward(d: Dependence, n: Node, g: Node, size: Any, given: Any, *how: Any) -> Pattern:
        return spread(d, g, [w.T for w in make(n, g, *how)])


for name, (rank, reach) in RESIZED.items():
    resized(name, rank, reach)

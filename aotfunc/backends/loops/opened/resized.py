"""Open up the resizing of images, one dimension at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..resized import most_made
from .pooling import dense_floats

#: most summands of a gradient's element: with more PyTorch is as fast
MOST = 12


def scales_of(
    before: Sequence[int], after: Sequence[int], corners: bool, given: Sequence[float | None]
) -> list[float]:
    """Return, for each dimension, the distance of two results in elements of the image."""
    scales = [*given, *[None] * len(before)]
    if corners:
        return [(n - 1) / (m - 1) if m > 1 else 0.0 for n, m in zip(before, after, strict=True)]
    return [1 / s if s else n / m for n, m, s in zip(before, after, scales, strict=False)]


def in_turn(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """List the dimensions in the order that reads few elements beside others in a row: shrinking
    ones first, and the last dimension before the others that grow."""
    dims = range(len(before))
    growing = [d for d in dims if after[d] > before[d]]
    return [d for d in dims if d not in growing] + growing[::-1]


def quick(x: Tensor, cubic: bool) -> bool:
    """Return whether kernels interpolate faster than PyTorch."""
    return dense_floats(x) and (cubic or x.dtype is torch.float32)


def resizing(cubic: bool) -> Callable:
    def body(x: Tensor, after: Sequence[int], corners: bool, *given: float | None) -> Any:
        if not quick(x, cubic):
            return NotImplemented
        before = x.shape[2:]
        scales = scales_of(before, after, corners, given)
        for d in in_turn(before, after):
            x = torch.ops.aotfunc.resized(x, d + 2, after[d], scales[d], corners, cubic)
        return x

    return body


def resizing_backward(cubic: bool) -> Callable:
    def body(
        g: Tensor, after: Sequence[int], shape: Sequence[int], corners: bool, *given: float | None
    ) -> Any:
        """Compute the gradient of an image that became larger."""
        before = shape[2:]
        scales = scales_of(before, after, corners, given)
        made = [most_made(m, s, cubic) for m, s in zip(after, scales, strict=True)]
        beyond = any([m * s > n + 0.5 for n, m, s in zip(before, after, scales, strict=True)])
        smaller = any([n > m for n, m in zip(before, after, strict=True)])
        if not quick(g, cubic) or smaller or beyond or max(made) > MOST:
            return NotImplemented
        for d in in_turn(after, before):
            g = torch.ops.aotfunc.resized_backward(g, d + 2, before[d], scales[d], corners, cubic)
        return g

    return body

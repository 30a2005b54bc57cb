"""Open up pooling over windows of few elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: fewest elements whose padding is worth a kernel
MANY = 1 << 16


def max_pool(
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    """Return the maximum of each window of few elements, NaN first, and its position."""
    (kh, kw), (sh, sw), (ph, pw) = pair(size), pair(stride or size), pair(padding)
    if pair(dilation) != (1, 1) or ceil_mode or kh * kw > 9:
        return NotImplemented
    if x.dtype not in (torch.float32, torch.float64) or not (x.is_contiguous() and x.numel()):
        return NotImplemented
    h, w = x.shape[-2:]
    places = torch.arange(h * w, dtype=torch.int32).view(h, w)
    if ph or pw:  # repeat elements at the edges, which these windows contain anyway
        if x.dtype is not torch.float32 or x.numel() < MANY:
            return NotImplemented
        rows, columns = (
            torch.arange(-p, n + p, dtype=torch.int32).clamp(0, n - 1)
            for n, p in ((h, ph), (w, pw))
        )
        places = rows[:, None] * w + columns
        x = torch.ops.aten.replication_pad2d(x, (pw, pw, ph, ph))
    windows = window_slices(x, (kh, kw), (sh, sw))
    value = x[windows[0]].contiguous()
    place = places[windows[0]].expand(value.shape)
    for window in windows[1:]:
        here = x[window]
        later = (here > value) | here.isnan()
        value, place = torch.where(later, here, value), torch.where(later, places[window], place)
    return value, place.long()


def pair(n: Sequence[int]) -> tuple[int, int]:
    return n[0], n[-1]


def window_slices(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> list[tuple]:
    """List, for each place in a window, that element of all windows."""
    (h, w), (kh, kw), (sh, sw) = x.shape[-2:], size, stride
    return [
        (..., slice(i, h - kh + i + 1, sh), slice(j, w - kw + j + 1, sw))
        for i in range(kh)
        for j in range(kw)
    ]


def avg_pool(
    x, size, stride=(), padding=(0, 0), ceil_mode=False, count_include_pad=True, divisor=None
) -> Any:
    """Return the mean of each window of few elements; PyTorch is as fast for large ones."""
    (kh, kw), (sh, sw), (ph, pw) = pair(size), pair(stride or size), pair(padding)
    most = 9 if sw == 1 else 4
    if ceil_mode or kh * kw > most or not dense_floats(x):
        return NotImplemented
    if ph or pw:
        if sw != 1 or not (count_include_pad or divisor) or x.numel() < MANY:
            return NotImplemented
        x = torch.constant_pad_nd(x, (pw, pw, ph, ph))
    first, *windows = window_slices(x, (kh, kw), (sh, sw))
    total = x[first] + 0.0  # a sum of negative zeros is 0
    for window in windows:
        total = total + x[window]
    return (total / (divisor or kh * kw)).contiguous()


def dense_floats(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64) and x.is_contiguous() and x.numel() > 0


def avg_pool_backward(g, x, size, stride, padding, ceil_mode, count_include_pad, divisor) -> Any:
    """Compute the gradient of windows that lie beside each other."""
    kh, kw = pair(size)
    if pair(padding) != (0, 0) or ceil_mode or pair(stride or size) != (kh, kw):
        return NotImplemented
    if not (dense_floats(x) and dense_floats(g)):
        return NotImplemented
    *rest, oh, ow = g.shape
    g = (g / (divisor or kh * kw)).view(*rest, oh, 1, ow, 1)
    gx = g.expand(*rest, oh, kh, ow, kw).reshape(*rest, oh * kh, ow * kw)
    (h, w) = x.shape[-2:]
    missing = (0, w - ow * kw, 0, h - oh * kh)
    return torch.constant_pad_nd(gx, missing) if any(missing) else gx


def adaptive_avg_pool(x: Tensor, size: Sequence[int]) -> Any:
    """Compute as average pooling if all windows have one size."""
    window = window_size(x, size)
    return NotImplemented if window is None else avg_pool(x, window)


def adaptive_backward(g: Tensor, x: Tensor) -> Any:
    window = window_size(x, g.shape[-2:])
    if window is None:
        return NotImplemented
    return avg_pool_backward(g, x, window, window, (0, 0), False, True, None)


def window_size(x: Tensor, size: Sequence[int]) -> tuple[int, int] | None:
    (h, w), (oh, ow) = x.shape[-2:], size
    even = oh and ow and not (h % oh or w % ow)
    return (h // oh, w // ow) if even else None

"""Windows of few elements into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def max_pool(
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    """The greatest of each window of few elements, NaN before all, and where it is."""
    (kh, kw), (sh, sw) = pair(size), pair(stride or size)
    if pair(padding) != (0, 0) or pair(dilation) != (1, 1) or ceil_mode or kh * kw > 9:
        return NotImplemented
    if x.dtype not in (torch.float32, torch.float64) or not (x.is_contiguous() and x.numel()):
        return NotImplemented
    h, w = x.shape[-2:]
    places = torch.arange(h * w, dtype=torch.int32).view(h, w)
    windows = [
        (..., slice(i, h - kh + i + 1, sh), slice(j, w - kw + j + 1, sw))
        for i in range(kh)
        for j in range(kw)
    ]
    value = x[windows[0]].contiguous()
    place = places[windows[0]].expand(value.shape)
    for window in windows[1:]:
        here = x[window]
        later = (here > value) | here.isnan()
        value, place = torch.where(later, here, value), torch.where(later, places[window], place)
    return value, place.long()


def pair(n: Sequence[int]) -> tuple[int, int]:
    return n[0], n[-1]

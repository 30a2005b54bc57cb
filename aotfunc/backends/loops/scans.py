"""Describe ops that combine all elements up to each one along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

aten = torch.ops.aten

_library = torch.library.Library("aotfunc", "FRAGMENT")
_library.define("running_max(Tensor x, int dim) -> Tensor")
_library.define("running_min(Tensor x, int dim) -> Tensor")
_library.impl("running_max", lambda x, dim: x.cummax(dim).values, "CPU")
_library.impl("running_min", lambda x, dim: x.cummin(dim).values, "CPU")
for _name in ("running_max", "running_min"):
    _library.impl(_name, lambda x, dim: x.clone(memory_format=torch.contiguous_format), "Meta")
running_max = torch.ops.aotfunc.running_max.default
running_min = torch.ops.aotfunc.running_min.default

#: op of a tensor and a dimension -> the function that it accumulates
SCANS: dict[Any, str] = {
    aten.cumsum.default: "sum",
    aten.cumprod.default: "prod",
    aten.logcumsumexp.default: "logsumexp",
    running_max: "max",
    running_min: "min",
}


def reversed_walk(
    strides: tuple[int, ...], start: int, axis: int, extents: Sequence[int]
) -> tuple[tuple[int, ...], int]:
    """Return steps and start of a walk along an axis from its end to its beginning."""
    step = strides[axis]
    back = (*strides[:axis], -step, *strides[axis + 1 :])
    return back, start + step * (extents[axis] - 1)

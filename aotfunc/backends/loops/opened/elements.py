"""Open up ops of several results, or with numbers that depend on the dtype, element by element.

bfloat16 and float16 are computed with floats if PyTorch's kernels do so.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ir import ROUNDED
from .norms import as_floats


def log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm, and the buffer of its gradient."""
    wide = as_floats(x)
    falling = (-wide.abs()).exp()
    return wide.clamp_max(0) - falling.log1p(), falling


def glu(x: Tensor, dim: int = -1) -> Tensor:
    a, b = as_floats(x).chunk(2, dim)
    return a * b.sigmoid()


def glu_backward(g: Tensor, x: Tensor, dim: int) -> Tensor:
    a, b = as_floats(x).chunk(2, dim)
    s = b.sigmoid()
    ga = as_floats(g) * s
    return torch.cat([ga, ga * (1 - s) * a], dim)


def prelu_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(x > 0, g, weight * g), torch.where(x > 0, 0, x * g)


def nan_to_num(x: Tensor, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Any:
    if not x.is_floating_point():
        return NotImplemented
    info = torch.finfo(x.dtype)
    most, least = info.max if posinf is None else posinf, info.min if neginf is None else neginf
    finite = torch.where(x == math.inf, most, torch.where(x == -math.inf, least, x))
    return torch.where(x.isnan(), nan or 0.0, finite)


def dropout_backward(g: Tensor, kept: Tensor, scale: float) -> Any:
    return (
        g * (kept.to(g.dtype) * scale)
        if g.dtype in (*ROUNDED, torch.float32)
        else g * kept * scale
    )


def logit(x: Tensor, eps: float | None = None) -> Any:
    """Clamp before the logarithm if ``eps`` is given; of bfloat16 and float16 the clamp rounds."""
    if eps is None or eps > 0.5 or x.dtype in ROUNDED:  # bounds that cross are PyTorch's
        return NotImplemented
    return x.clamp(eps, 1 - eps).logit()

"""Open up layers that centre and scale, their gradients, and variances.

bfloat16 and float16 are computed with floats and the results rounded, as in eager mode. Variances
are sums of squares of centred values, corrected: more exact than Welford's, and in vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir import ROUNDED


def moments(
    x: Tensor, dims: list[int], count: float, keepdim: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the sum of squares divided by ``count``, and the centred values.

    The mean that is subtracted first is a rounded one; what it leaves corrects all three (Chan,
    Golub and LeVeque, "Algorithms for computing the sample variance", 1983)."""
    size = math.prod([x.shape[d] for d in dims])
    off = x - x.mean(dims, keepdim=True)
    total = off.sum(dims, keepdim)
    left = total / size
    finite = (total * left).clamp_max(torch.finfo(x.dtype).max)  # an infinity less it stays one
    squares = ((off * off).sum(dims, keepdim) - finite).clamp_min(0)
    mean = x.mean(dims, keepdim)
    mean = torch.where(left.abs() < math.inf, mean + left, mean)  # an infinite one leaves NaN
    return mean, squares / count, off - off.sum(dims, keepdim=True) / size


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    x = as_floats(x)
    mean, var, centred = moments(x, dims, math.prod(shape))
    rstd = (var + eps).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias), mean, rstd


def layer_norm_backward(
    g, x, shape, mean, rstd, weight, bias, wanted
) -> tuple[Tensor | None, ...]:
    rank = x.dim() - len(shape)
    dims, rows = list(range(rank, x.dim())), list(range(rank))
    x, g = as_floats(x), as_floats(g)
    normal = (x - mean) * rstd
    gx = gw = gb = None
    if wanted[0]:
        h = g if weight is None else g * weight
        along = h.mean(dims, keepdim=True) + normal * (h * normal).mean(dims, keepdim=True)
        gx = (h - along) * rstd
    if wanted[1] and weight is not None:
        gw = (g * normal).sum(rows) if rows else g * normal
    if wanted[2] and bias is not None:
        gb = g.sum(rows) if rows else g.clone()
    return gx, gw, gb


def var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False
) -> Any:
    dims = [d % x.dim() for d in dim or range(x.dim())]
    count = math.prod([x.shape[d] for d in dims]) - (1 if correction is None else correction)
    if count <= 0:
        return NotImplemented
    x = as_floats(x)
    mean, var, _ = moments(x, dims, count, keepdim)
    return var, mean


def var(x: Tensor, dim: Any = None, **options: Any) -> Any:
    found = var_mean(x, dim, **options)
    return found if found is NotImplemented else found[0]


def std(x: Tensor, dim: Any = None, **options: Any) -> Any:
    found = var_mean(x, dim, **options)
    return found if found is NotImplemented else found[0].sqrt()


def channels(x: Tensor) -> tuple[list[int], tuple[int, ...]]:
    """Return the dimensions that batch norm sums over, and the shape of one value per channel."""
    rest = range(2, x.dim())
    return [0, *rest], (1, -1, *[1 for _ in rest])


def as_floats(x: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32 to compute with."""
    return x.float() if x.dtype in ROUNDED else x


def is_slower(x: Tensor, running: bool = False) -> bool:
    """Return whether PyTorch's batch norm is faster: in low precision with running statistics."""
    return x.dtype in ROUNDED and (running or not x.is_contiguous())


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    if not training or is_slower(x):
        return NotImplemented
    y, mean, rstd, _ = of_batch(x, weight, bias, eps)
    return y, mean, rstd


def of_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dims, shape = channels(x)
    x = as_floats(x)
    mean, var, centred = moments(x, dims, x.numel() // x.shape[1])
    rstd = (var + eps).rsqrt()
    y = affine(centred * rstd, weight, bias, shape)
    return y, mean.view(-1), rstd.view(-1), var.view(-1)


def batch_norm_functional(
    x, weight, bias, running_mean, running_var, training, momentum, eps
) -> Any:
    count = x.numel() // x.shape[1]
    if not training or count == 1 or is_slower(x):
        return NotImplemented
    y, mean, rstd, var = of_batch(x, weight, bias, eps)
    unbiased = var * (count / (count - 1))
    new_mean = momentum * mean + (1 - momentum) * as_floats(running_mean)
    new_var = momentum * unbiased + (1 - momentum) * as_floats(running_var)
    return y, mean, rstd, new_mean, new_var


def batch_norm_inference(
    x, weight, bias, mean, var, momentum, eps
) -> tuple[Tensor, Tensor, Tensor]:
    _, shape = channels(x)
    y = (x - mean.view(shape)) * (as_floats(var) + eps).rsqrt().view(shape)
    none = x.new_empty(0)
    return affine(y, weight, bias, shape), none, none.clone()


def batch_norm_backward(
    g, x, weight, running_mean, running_var, save_mean, save_rstd, training, eps, wanted
) -> Any:
    dims, shape = channels(x)
    if training:
        mean, rstd = save_mean, save_rstd
    else:
        mean = running_mean
        rstd = None if running_var is None else (as_floats(running_var) + eps).rsqrt()
    # a gradient of another layout is copied first, as PyTorch does
    if mean is None or rstd is None or g.stride() != x.stride() or is_slower(x, not training):
        return NotImplemented
    x, g, rstd = as_floats(x), as_floats(g), rstd.view(shape)
    normal = (x - mean.view(shape)) * rstd
    gb, gw = g.sum(dims, keepdim=True), (g * normal).sum(dims, keepdim=True)
    gx = g
    if training:
        count = x.numel() // x.shape[1]
        gx = g - (gb / count + normal * (gw / count))
    gx = affine(gx * rstd, weight, None, shape)
    gradients = (gx, gw.view(-1), gb.view(-1))
    return tuple([y if asked else None for y, asked in zip(gradients, wanted, strict=True)])


def group_norm(x, weight, bias, n, c, size, groups, eps) -> Any:
    if not x.is_contiguous() or x.dtype is torch.bfloat16:
        return NotImplemented
    in_groups = x.view(n, groups, -1)
    y, mean, rstd = layer_norm(in_groups, in_groups.shape[2:], None, None, eps)
    shape = (1, c, 1)
    y = affine(y.view(n, c, size), weight, bias, shape)
    return y.view(x.shape), mean.view(n, groups), rstd.view(n, groups)


def group_norm_backward(g, x, mean, rstd, weight, n, c, size, groups, wanted) -> Any:
    """Compute the gradients from sums over each channel of each element of the batch."""
    if not (x.is_contiguous() and g.is_contiguous()):
        return NotImplemented
    shape = (n, groups, c // groups, size)
    rstd = rstd.view(n, groups, 1, 1)
    normal = (x.view(shape) - mean.view(n, groups, 1, 1)) * rstd
    g = g.view(shape)
    of_g, of_both = g.sum(3, keepdim=True), (g * normal).sum(3, keepdim=True)
    scale = 1 if weight is None else weight.view(1, groups, -1, 1)
    count = size * c // groups
    along = (scale * of_g).sum(2, keepdim=True) / count
    across = (scale * of_both).sum(2, keepdim=True) / count
    gx = (scale * g - along - normal * across) * rstd
    gw, gb = [s.view(n, c).sum(0) for s in (of_both, of_g)]
    gradients = (gx.view(x.shape), gw, gb)
    return tuple([y if asked else None for y, asked in zip(gradients, wanted, strict=True)])

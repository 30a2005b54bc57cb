"""Ops that are opened up into reductions and pointwise ones before kernels are formed.

A body that answers NotImplemented leaves its op as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .classes import class_of

aten = torch.ops.aten


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    x = x - x.amax(dim, keepdim=True)
    return x - x.exp().sum(dim, keepdim=True).log()


def softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    g = g * y
    return g - y * g.sum(dim, keepdim=True)


def log_softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return g - y.exp() * g.sum(dim, keepdim=True)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    rstd = ((centred * centred).mean(dims, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias), mean, rstd


def layer_norm_backward(
    g: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    rank = x.dim() - len(shape)
    dims, rows = list(range(rank, x.dim())), list(range(rank))
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
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().sum(dims, keepdim=keepdim) / count
    return var, (mean if keepdim else x.mean(dims))


def var(x: Tensor, dim: Any = None, **options: Any) -> Any:
    found = var_mean(x, dim, **options)
    return found if found is NotImplemented else found[0]


def std(x: Tensor, dim: Any = None, **options: Any) -> Any:
    found = var_mean(x, dim, **options)
    return found if found is NotImplemented else found[0].sqrt()


def reduced(x: Tensor, reduction: int) -> Tensor:
    """By a loss's number: nothing, the mean, the sum."""
    return (x, x.mean(), x.sum())[reduction] if reduction else x


def mse_loss(x: Tensor, y: Tensor, reduction: int = 1) -> Tensor:
    d = x - y
    return reduced(d * d, reduction)


def mse_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    return (x - y) * ((2 / x.numel() if reduction == 1 else 2) * g)


def nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> Any:
    if not fits_nll(x, target, weight):
        return NotImplemented
    known = class_of(target, x.shape[1], ignore_index)
    kept = (target != ignore_index).to(x.dtype)
    each = kept if weight is None else kept * weight[known]
    loss = torch.where(target != ignore_index, x.gather(1, known[:, None])[:, 0] * -each, 0)
    total = each.sum()
    if reduction == 0:
        return loss, x.new_zeros(())
    return (loss.sum() / total if reduction == 1 else loss.sum()), total


def nll_loss_backward(
    g: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total: Tensor,
) -> Any:
    if not fits_nll(x, target, weight):
        return NotImplemented
    known = class_of(target, x.shape[1], ignore_index)
    each = -g / total if reduction == 1 else -g
    if weight is not None:
        each = each * weight[known]
    each = torch.where(target != ignore_index, each, 0)
    classes = torch.arange(x.shape[1], dtype=torch.int32)
    return torch.where(classes == known.int()[:, None], each[:, None], 0)


def fits_nll(x: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    return (
        x.dim() == 2
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.float64)
        and target.dtype is torch.int64
        and (weight is None or weight.dtype is x.dtype)
    )


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


def outer_product(x: Tensor, y: Tensor) -> Any:
    """A product of matrices that sums nothing."""
    if x.shape[-1] != 1 or x.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    return (x * y).contiguous()


def in_these(body: Callable) -> Callable:
    """A body for the dtypes that kernels compute in, of tensors that are not empty."""

    def opened(*args: Any, **options: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        one = len({t.dtype for t in tensors}) == 1 and all([t.numel() for t in tensors])
        fit = one and tensors[0].dtype in (torch.float32, torch.float64)
        return (
            body(*args, **options) if fit and max([t.dim() for t in tensors]) else NotImplemented
        )

    return opened


#: op -> what it is then
OPENED: dict[Any, Callable] = {
    aten.mm.default: outer_product,
    aten.bmm.default: outer_product,
    aten._softmax.default: in_these(softmax),
    aten._log_softmax.default: in_these(log_softmax),
    aten._softmax_backward_data.default: in_these(softmax_backward),
    aten._log_softmax_backward_data.default: in_these(log_softmax_backward),
    aten.mse_loss.default: in_these(mse_loss),
    aten.mse_loss_backward.default: in_these(mse_loss_backward),
    aten.nll_loss_forward.default: nll_loss,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten.max_pool2d_with_indices.default: max_pool,
    aten.var.correction: in_these(var),
    aten.std.correction: in_these(std),
    aten.var_mean.correction: in_these(var_mean),
    aten.native_layer_norm.default: in_these(layer_norm),
    aten.native_layer_norm_backward.default: in_these(layer_norm_backward),
}

"""Open up losses and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..classes import class_of


def by_reduction(x: Tensor, reduction: int) -> Tensor:
    """Reduce by a loss's number: not at all, to the mean, or to the sum."""
    return (x, x.mean(), x.sum())[reduction] if reduction else x


def mse_loss(x: Tensor, y: Tensor, reduction: int = 1) -> Tensor:
    d = x - y
    return by_reduction(d * d, reduction)


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


def nll_loss_backward(g, x, target, weight, reduction, ignore_index, total) -> Any:
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


def huber_loss(x: Tensor, y: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    d = (x - y).abs()
    return by_reduction(torch.where(d <= delta, d * d * 0.5, delta * (d - 0.5 * delta)), reduction)


def huber_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int, delta: float) -> Tensor:
    return (x - y).clamp(-delta, delta) * (g / x.numel() if reduction == 1 else g)


def smooth_l1_loss(x: Tensor, y: Tensor, reduction: int = 1, beta: float = 1.0) -> Any:
    if not beta:
        return NotImplemented
    d = (x - y).abs()
    return by_reduction(torch.where(d < beta, d * d * (0.5 / beta), d - 0.5 * beta), reduction)


def smooth_l1_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int, beta: float) -> Any:
    if not beta:
        return NotImplemented
    return ((x - y) / beta).clamp(-1, 1) * (g / x.numel() if reduction == 1 else g)


def soft_margin_loss(x: Tensor, y: Tensor, reduction: int = 1) -> Tensor:
    return by_reduction((-y * x).exp().log1p(), reduction)


def soft_margin_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    z = (-y * x).exp()
    return -y * (z / (z + 1)) * (g / x.numel() if reduction == 1 else g)


def cross_entropy_of_logits(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    positive: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """Return the binary cross entropy with weighted positives."""
    log_sigmoid = x.clamp_max(0) - (-x.abs()).exp().log1p()
    if positive is not None:
        log_sigmoid = ((positive - 1) * y + 1) * log_sigmoid
    loss = (1 - y) * x - log_sigmoid
    return by_reduction(loss if weight is None else loss * weight, reduction)

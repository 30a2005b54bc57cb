"""The losses with a margin: their batch, which is folded into ``N`` and reduced by hand, and the
derivatives of their gradients.

``x`` is ``(C,)`` or ``(N, C)``, the target ``()`` or ``(N,)`` for one class and shaped like ``x``
for several. Each loss is computed unreduced; a class weight that differs between samples is a
factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batching import all_batched, with_batch
from .loss import MEAN, NONE, reduce
from .schema import aten
from .table import decompose_as, linear, vmap_of


def classes(x: Tensor) -> Tensor:
    """Return a batch of ``(N, C)``, ``(C,)`` or ``()`` as rows of classes."""
    return x.reshape(-1, x.shape[-1] if x.dim() > 1 else 1)


def per_row(x: Tensor, g: Tensor, carries: bool, reduction: int) -> Tensor:
    """Return each row's cotangent from that of each sample's reduced loss in ``x``."""
    shape = x.shape[:-1] if x.dim() > 1 else x.shape
    g = with_batch(g, carries, x.shape[0])
    if reduction == NONE:
        return g.flatten()
    if reduction == MEAN:
        g = g / math.prod(shape[1:])
    return g.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).flatten()


def reduced_losses(loss: Tensor, x: Tensor, reduction: int) -> Tensor:
    """Return the rows' losses, reduced for each sample of the batch ``x``, or unreduced."""
    if reduction == NONE:
        return loss
    return reduce(loss.reshape(x.shape[:-1] if x.dim() > 1 else x.shape), reduction, kept=1)


def weighing(
    weight: Tensor | None, carries: bool, target: Tensor, size: Any
) -> tuple[Tensor | None, Callable]:
    """Return the kernel's weight, and a function that weighs rows where it does not."""
    if weight is None or not carries:
        return weight, lambda loss: loss
    each = weight.gather(1, target.reshape(size, -1)).flatten()
    return None, lambda loss: loss * each


@vmap_of(aten.multi_margin_loss)
def _(x, target, p, margin, weight, reduction, *, batched, size, shape):
    x, target = with_batch(x, batched[0], size), with_batch(target, batched[1], size)
    weight, weighed = weighing(weight, batched[2], target, size)
    loss = aten.multi_margin_loss(classes(x), target.flatten(), p, margin, weight, NONE)
    return reduced_losses(weighed(loss), x, reduction).reshape(size, *shape)


@vmap_of(aten.multi_margin_loss_backward)
def _(g, x, target, p, margin, weight, reduction, *, batched, size):
    x, target = with_batch(x, batched[1], size), with_batch(target, batched[2], size)
    weight, weighed = weighing(weight, batched[3], target, size)
    g = weighed(per_row(x, g, batched[0], reduction))
    return aten.multi_margin_loss_backward(
        g, classes(x), target.flatten(), p, margin, weight, NONE
    ).reshape(x.shape)


@vmap_of(aten.multilabel_margin_loss_forward)
def _(
    x: Tensor, target: Tensor, reduction: int, *, size: Any, shape: Any
) -> tuple[Tensor, Tensor]:
    loss, is_target = aten.multilabel_margin_loss_forward(classes(x), classes(target), NONE)
    return reduced_losses(loss, x, reduction).reshape(size, *shape[0]), is_target.reshape(
        target.shape
    )


@vmap_of(aten.multilabel_margin_loss_backward)
def _(g, x, target, reduction, is_target, *, batched, size):
    x, target, is_target = all_batched((x, target, is_target), batched[1:], size)
    g = per_row(x, g, batched[0], reduction)
    out = aten.multilabel_margin_loss_backward(
        g, classes(x), classes(target), NONE, classes(is_target)
    )
    return out.reshape(x.shape)


# ----- second derivatives ------------------------------------------------------------------------


def row_cotangents(g: Tensor, rows: int, reduction: int) -> Tensor:
    """Return the cotangents of the rows' losses, ``(rows, 1)``, from that of the reduced loss."""
    g = g / rows if reduction == MEAN else g
    return g.reshape(-1, 1)


def multi_margin_gradient(g, x, target, p, margin, weight=None, reduction=MEAN):
    """Return the gradient of ``sum_j w_y max(0, margin - x_y + x_j)^p / C`` over the other classes
    ``j``, by ops that have derivatives."""
    rows, y = x.reshape(-1, x.shape[-1] if x.dim() else 1), target.reshape(-1, 1)
    gap = margin - rows.gather(1, y) + rows
    others = (gap > 0).scatter(1, y, False)
    slope = (gap * 2 if p == 2 else torch.ones_like(gap)).where(others, 0) / rows.shape[1]
    if weight is not None:
        slope = slope * weight.gather(0, target.reshape(-1)).reshape(-1, 1)
    slope = slope.scatter_add(1, y, -slope.sum(1, keepdim=True))
    return (slope * row_cotangents(g, rows.shape[0], reduction)).reshape(x.shape)


decompose_as(aten.multi_margin_loss_backward, multi_margin_gradient)


def multilabel_margin_transposed(
    g: Tensor, gy: Tensor, x: Tensor, target: Tensor, reduction: int, is_target: Tensor
):
    """Differentiate the gradient: piecewise constant in ``x`` and linear in ``gy``."""
    ones = x.new_ones(x.shape[:-1])
    slope = aten.multilabel_margin_loss_backward(ones, x, target, NONE, is_target)
    loss = (g * slope).sum(-1)
    return loss if reduction == NONE else loss.mean() if reduction == MEAN else loss.sum()


linear(aten.multilabel_margin_loss_backward, multilabel_margin_transposed, None, None, None)

"""Batching of the losses with a margin: the batch is folded into their ``N``, and what they reduce is reduced by hand.

``x`` is ``(C,)`` or ``(N, C)``, the target ``()`` or ``(N,)`` for one class and shaped like ``x`` for several. Each
loss is taken unreduced; the weight of its class, where that differs between samples, is a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .batching import with_batch
from .loss import MEAN, NONE, reduce
from .table import aten, vmap_of


def classes(x: Tensor) -> Tensor:
    """A batch of ``(N, C)``, ``(C,)`` or ``()`` as rows of classes."""
    return x.reshape(-1, x.shape[-1] if x.dim() > 1 else 1)


def per_row(x: Tensor, g: Tensor, carries: bool, reduction: int) -> Tensor:
    """The cotangent of each row's loss, from that of the reduced loss of each sample of the batch ``x``."""
    shape = x.shape[:-1] if x.dim() > 1 else x.shape
    g = with_batch(g, carries, x.shape[0])
    if reduction == NONE:
        return g.flatten()
    if reduction == MEAN:
        g = g / math.prod(shape[1:])
    return g.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).flatten()


def reduced(loss: Tensor, x: Tensor, reduction: int) -> Tensor:
    """Losses of the rows, reduced for each sample of the batch ``x``; unreduced ones as they are."""
    if reduction == NONE:
        return loss
    return reduce(loss.reshape(x.shape[:-1] if x.dim() > 1 else x.shape), reduction, kept=1)


def weighing(weight: Tensor | None, carries: bool, target: Tensor, size: Any) -> tuple[Tensor | None, Callable]:
    """The weight as the kernel can take it, and what remains to be done to each row's loss."""
    if weight is None or not carries:
        return weight, lambda loss: loss
    each = weight.gather(1, target.reshape(size, -1)).flatten()
    return None, lambda loss: loss * each


@vmap_of(aten.multi_margin_loss)
def _(x, target, p, margin, weight, reduction, *, batched, size, shape):
    x, target = with_batch(x, batched[0], size), with_batch(target, batched[1], size)
    weight, weighed = weighing(weight, batched[2], target, size)
    loss = aten.multi_margin_loss(classes(x), target.flatten(), p, margin, weight, NONE)
    return reduced(weighed(loss), x, reduction).reshape(size, *shape)


@vmap_of(aten.multi_margin_loss_backward)
def _(g, x, target, p, margin, weight, reduction, *, batched, size):
    x, target = with_batch(x, batched[1], size), with_batch(target, batched[2], size)
    weight, weighed = weighing(weight, batched[3], target, size)
    g = weighed(per_row(x, g, batched[0], reduction))
    return aten.multi_margin_loss_backward(g, classes(x), target.flatten(), p, margin, weight, NONE).reshape(x.shape)


@vmap_of(aten.multilabel_margin_loss_forward)
def _(x: Tensor, target: Tensor, reduction: int, *, size: Any, shape: Any) -> tuple[Tensor, Tensor]:
    loss, is_target = aten.multilabel_margin_loss_forward(classes(x), classes(target), NONE)
    return reduced(loss, x, reduction).reshape(size, *shape[0]), is_target.reshape(target.shape)


@vmap_of(aten.multilabel_margin_loss_backward)
def _(g, x, target, reduction, is_target, *, batched, size):
    x, target, is_target = (with_batch(t, b, size) for t, b in zip((x, target, is_target), batched[1:], strict=True))
    g = per_row(x, g, batched[0], reduction)
    out = aten.multilabel_margin_loss_backward(g, classes(x), classes(target), NONE, classes(is_target))
    return out.reshape(x.shape)

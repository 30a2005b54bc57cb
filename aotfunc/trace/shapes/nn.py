"""Shape rules of neural network layers: softmax, losses, attention, norms. See :mod:`.rules`."""

from __future__ import annotations

import math
from typing import Any

import torch

from .algebra import like, same_dtype
from .rules import (
    axis,
    broadcast_shape,
    new,
    ordered_strides,
    result_strides,
    shape_rule,
    sure,
    sure_in_order,
)
from .sig import Sig

aten = torch.ops.aten

#: dtype -> the dtype that its sums are accumulated in
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


# ----- softmax and losses ------------------------------------------------------------------------


@shape_rule(aten._softmax, aten._log_softmax)
def _softmax(x, dim, half_to_float):
    sure(x.dtype.is_floating_point and not half_to_float)
    axis(dim, x.ndim)
    sure_in_order(x)
    return new(x, x.shape)


@shape_rule(aten._safe_softmax)
def _safe_softmax(x, dim, dtype=None):
    sure(dtype in (None, x.dtype))
    return _softmax(x, dim, False)


@shape_rule(aten._softmax_backward_data, aten._log_softmax_backward_data)
def _softmax_backward(g, y, dim, input_dtype):
    sure(g.dtype is y.dtype is input_dtype and g.shape == y.shape)
    axis(dim, g.ndim)
    sure_in_order(g, y)
    return like(g)


@shape_rule(aten.log_sigmoid_forward)
def _log_sigmoid(x):
    sure(x.dtype.is_floating_point)
    sure_in_order(x)
    return like(x), like(x)


@shape_rule(aten._ctc_loss.Tensor)
def _ctc_loss(log_probs, targets, input_lengths, target_lengths, blank=0, zero_infinity=False):
    """Return the signatures of the loss and its buffer, which has room for the maximal target
    length: ``rules/ctc.py`` appends a target of that length."""
    sure(log_probs.dtype.is_floating_point and log_probs.ndim == 3 and targets.ndim == 2)
    steps, n, _ = log_probs.shape
    sure(targets.shape[0] == input_lengths.numel == target_lengths.numel == n)
    return new(log_probs, (n,)), new(log_probs, (n, steps, 2 * targets.shape[1] + 1))


@shape_rule(aten.log_sigmoid_backward)
def _log_sigmoid_backward(g, x, buffer):
    same_dtype(g, x, buffer)
    sure(x.dtype.is_floating_point and g.shape == x.shape == buffer.shape)
    sure_in_order(g, x, buffer)
    return like(x)


MEAN = 1  # the reductions of losses: none, mean, sum


@shape_rule(aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss)
def _loss(x, target, reduction=MEAN, parameter=1.0):
    sure(
        x.dtype is target.dtype
        and x.dtype.is_floating_point
        and parameter > 0
        and reduction in (0, 1, 2)
    )
    sure_in_order(x, target)
    shape = broadcast_shape(x.shape, target.shape)
    return (
        new(x, (), stride=())
        if reduction
        else new(x, shape, stride=result_strides(shape, (x, target)))
    )


@shape_rule(aten.mse_loss_backward, aten.smooth_l1_loss_backward, aten.huber_loss_backward)
def _loss_backward(g, x, target, reduction, *parameter):
    sure(
        g.dtype is x.dtype is target.dtype
        and broadcast_shape(g.shape, x.shape, target.shape) == x.shape == target.shape
    )
    sure_in_order(g, x, target)
    return like(x)


@shape_rule(aten.binary_cross_entropy)
def _bce(x, target, weight=None, reduction=MEAN):
    sure(x.shape == target.shape and x.dtype is target.dtype and x.dtype.is_floating_point)
    sure(weight is None and reduction in (0, 1, 2))
    sure_in_order(x, target)
    return new(x, () if reduction else x.shape)


@shape_rule(aten.binary_cross_entropy_backward)
def _bce_backward(g, x, target, weight=None, reduction=MEAN):
    sure(weight is None)
    return _loss_backward(g, x, target, reduction)


@shape_rule(aten.nll_loss_forward)
def _nll_loss(x, target, weight, reduction, ignore_index):
    sure(
        x.dtype.is_floating_point
        and x.ndim in (1, 2)
        and target.dtype is torch.int64
        and reduction in (0, 1, 2)
    )
    sure(
        target.shape == x.shape[:-1]
        and (weight is None or (weight.dtype is x.dtype and weight.shape == x.shape[-1:]))
    )
    return new(x, target.shape if reduction == 0 else ()), new(x, ())


@shape_rule(aten.nll_loss_backward)
def _nll_loss_backward(g, x, target, weight, reduction, ignore_index, total_weight):
    _nll_loss(x, target, weight, reduction, ignore_index)
    same_dtype(g, x, total_weight)
    sure(total_weight.shape == () and g.shape == (target.shape if reduction == 0 else ()))
    sure_in_order(x)
    return like(x)


# ----- attention ---------------------------------------------------------------------------------


@shape_rule(aten._scaled_dot_product_flash_attention_for_cpu)
def _attention(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    same_dtype(q, k, v)
    sure(q.ndim == 4 and q.dtype.is_floating_point)
    b, h, n, _ = q.shape
    return like(q), new(q, (b, h, n), WIDE.get(q.dtype), ordered_strides((b, h, n), (0, 2, 1)))


@shape_rule(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward(g, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    sure(all(x.ndim == 4 for x in (q, k, v)))
    return tuple(
        [new(x, x.shape, stride=ordered_strides(x.shape, (0, 2, 1, 3))) for x in (q, k, v)]
    )


# ----- norms -------------------------------------------------------------------------------------


@shape_rule(aten.native_layer_norm)
def _layer_norm(x, shape, weight, bias, eps):
    k = len(shape)
    sure(
        0 < k <= x.ndim
        and x.shape[-k:] == tuple(shape)
        and 0 not in x.shape
        and x.dtype.is_floating_point
    )
    sure(
        all(p is None or (p.shape == tuple(shape) and p.dtype is x.dtype) for p in (weight, bias))
    )
    sure_in_order(x, weight, bias)
    moment = new(
        x, (*x.shape[:-k], *[1] * k), None if x.device.type == "cpu" else WIDE.get(x.dtype)
    )
    return like(x), moment, moment


@shape_rule(aten.native_layer_norm_backward)
def _layer_norm_backward(g, x, shape, mean, rstd, weight, bias, mask):
    k = len(shape)
    sure(
        g.shape == x.shape
        and 0 < k <= x.ndim
        and x.shape[-k:] == tuple(shape)
        and 0 not in x.shape
    )
    sure(all(p is None or p.shape == tuple(shape) for p in (weight, bias)))
    sure(all(m.shape == (*x.shape[:-k], *[1] * k) for m in (mean, rstd)))
    sure(
        all(
            s is None or (s.dtype is x.dtype and s.dtype.is_floating_point)
            for s in (g, mean, rstd, weight, bias)
        )
    )
    sure_in_order(g, x, mean, rstd, weight, bias)
    # else the bias's gradient is a clone of g, strides and all
    sure(k < x.ndim or all(n > 1 for n in x.shape))
    return (
        like(x) if mask[0] else None,
        new(x, shape) if mask[1] and weight is not None else None,
        new(x, shape) if mask[2] and bias is not None else None,
    )


@shape_rule(aten.native_group_norm)
def _group_norm(x, weight, bias, n, c, hw, group, eps):
    _group_norm_fits(x, weight, bias, n, c, hw, group)
    moment = new(x, (n, group))
    return like(x), moment, moment


@shape_rule(aten.native_group_norm_backward)
def _group_norm_backward(g, x, mean, rstd, weight, n, c, hw, group, mask):
    _group_norm_fits(x, weight, None, n, c, hw, group)
    same_dtype(g, x, mean, rstd)
    sure(g.shape == x.shape and mean.shape == rstd.shape == (n, group))
    sure_in_order(g, mean, rstd)
    return (
        like(x) if mask[0] else None,
        new(x, (c,)) if mask[1] else None,
        new(x, (c,)) if mask[2] else None,
    )


def _group_norm_fits(x: Sig, weight: Any, bias: Any, n: int, c: int, hw: int, group: int) -> None:
    sure(
        x.dtype in (torch.float32, torch.float64)
        and x.ndim >= 2
        and x.shape[:2] == (n, c)
        and 0 not in x.shape
    )
    sure(math.prod(x.shape[2:]) == hw and group > 0 and c % group == 0)
    sure(all(p is None or (p.dtype is x.dtype and p.shape == (c,)) for p in (weight, bias)))
    sure_in_order(x, weight, bias)


def _batch_norm_fits(x: Sig, *features: Sig | None) -> None:
    """Decline unless there is one of each per channel, all of one ordinary dtype."""
    sure(x.dtype in (torch.float32, torch.float64) and x.ndim >= 2 and 0 not in x.shape)
    sure(all(f is None or (f.dtype is x.dtype and f.shape == x.shape[1:2]) for f in features))
    sure_in_order(x, *features)


@shape_rule(aten._native_batch_norm_legit_functional)
def _batch_norm_functional(x, weight, bias, mean, var, training, momentum, eps):
    _batch_norm_fits(x, weight, bias, mean, var)
    sure(training)
    return (like(x), *[new(x, x.shape[1:2])] * 4)


@shape_rule(aten._native_batch_norm_legit.no_stats)
def _batch_norm(x, weight, bias, training, momentum, eps):
    _batch_norm_fits(x, weight, bias)
    sure(training)
    return (like(x), *[new(x, x.shape[1:2])] * 2)


@shape_rule(aten._native_batch_norm_legit_no_training)
def _batch_norm_inference(x, weight, bias, mean, var, momentum, eps):
    _batch_norm_fits(x, weight, bias, mean, var)
    sure(x.device.type == "cpu")  # other devices may give the unused statistics a shape
    return (like(x), *[new(x, (0,))] * 2)


@shape_rule(aten.native_batch_norm_backward)
def _batch_norm_backward(g, x, weight, mean, var, save_mean, save_rstd, train, eps, mask):
    saved = (save_mean, save_rstd) if train else (mean, var)
    _batch_norm_fits(x, weight, *saved)
    sure(g.shape == x.shape and g.dtype is x.dtype and None not in saved)
    sure_in_order(g)
    sure(len(mask) == 3)
    return like(x), *[new(x, x.shape[1:2]) if m else None for m in mask[1:]]

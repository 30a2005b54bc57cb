"""Shape rules op by op, where the family is not pointwise: likes, factories, reductions, products, norms, windows, lookups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .infer import (
    axis, broadcast, contiguous_stride, formatted, in_order, make_sig, new, ordered_strides, plain, pointwise,
    result_strides, rule, sure,
)  # fmt: skip
from .shapes import Sig

aten = torch.ops.aten


def floating(x: Sig) -> bool:
    return x.dtype.is_floating_point or x.dtype.is_complex


#: what half precision is accumulated in
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


# ----- the same shape -------------------------------------------------------------------------------------------------


def like_strides(x: Sig, memory_format: Any = None) -> tuple:
    """Strides of ``empty_like``."""
    if memory_format in (None, torch.preserve_format):
        return result_strides(x.shape, (x,))
    return formatted(x.shape, memory_format)


def like(x: Sig, dtype: torch.dtype | None = None, memory_format: Any = None) -> Sig:
    return new(x, x.shape, dtype, like_strides(x, memory_format))


@rule(aten.empty_like, aten.zeros_like, aten.ones_like, aten.rand_like, aten.randn_like)
def _like(x, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    sure(layout in (None, torch.strided) and not pin_memory and (device is None or torch.device(device) == x.device))
    return like(x, dtype, memory_format)


@rule(aten.full_like)
def _full_like(x, value, **options):
    return _like(x, **options)


@rule(aten.bernoulli, aten.bernoulli.p)
def _bernoulli(x, p=None, *, generator=None):
    sure(p is None or 0 <= p <= 1)
    plain(x)
    return like(x)


@rule(aten.native_dropout)
def _native_dropout(x, p, train):
    sure(floating(x) and train is not False and 0 < p < 1)
    return like(x), like(x, torch.bool)


@rule(aten.native_dropout_backward)
def _native_dropout_backward(g, mask, scale):
    sure(floating(g) and mask.dtype is torch.bool and g.shape == mask.shape)
    plain(g, mask)
    return like(g)


@rule(aten.where.self)
def _where(condition, x, y):
    sure(condition.dtype is torch.bool)
    return pointwise(aten.where.self, condition, x, y)


@rule(aten.tril, aten.triu)
def _tri(x, diagonal=0):
    sure(x.ndim >= 2)
    plain(x)
    return like(x)


@rule(aten.flip, aten.roll)
def _flip(x, *dims):
    plain(x)
    return like(x)


@rule(aten.cumsum, aten.cumprod)
def _cumulate(x, dim, *, dtype=None):
    axis(dim, x.ndim)
    plain(x)
    return new(x, x.shape, dtype or (x.dtype if floating(x) else torch.int64))


@rule(aten.fill_.Scalar, aten.zero_)
def _filled(x, value=0):
    sure(not isinstance(value, complex) or x.dtype.is_complex)
    return x


@rule(aten.copy_)
def _copy_(x, source, non_blocking=False):
    sure(broadcast(x.shape, source.shape) == x.shape)
    return x


# ----- factories ------------------------------------------------------------------------------------------------------


def created(size: Sequence[int], dtype: Any, layout: Any, device: Any, pin_memory: Any) -> Sig:
    sure(layout in (None, torch.strided) and not pin_memory and all(n >= 0 for n in size))
    where = torch.device(device) if device is not None else torch.device("cpu")
    return make_sig(tuple(size), contiguous_stride(tuple(size)), dtype or torch.get_default_dtype(), where)


@rule(aten.zeros, aten.ones, aten.empty.memory_format, aten.rand, aten.randn)
def _zeros(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    sure(memory_format is None)
    return created(size, dtype, layout, device, pin_memory)


def dtype_of(value: Any) -> torch.dtype | None:
    """The dtype of a tensor full of this number (None: the default)."""
    sure(not isinstance(value, complex))
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else None


@rule(aten.full)
def _full(size, value, *, dtype=None, layout=None, device=None, pin_memory=None):
    return created(size, dtype or dtype_of(value), layout, device, pin_memory)


@rule(aten.scalar_tensor)
def _scalar_tensor(value, *, dtype=None, layout=None, device=None, pin_memory=None):
    return created((), dtype, layout, device, pin_memory)


@rule(aten.new_zeros, aten.new_ones, aten.new_empty)
def _new(x, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return created(size, dtype or x.dtype, layout, device or x.device, pin_memory)


@rule(aten.new_full)
def _new_full(x, size, value, **options):
    return _new(x, size, **options)


@rule(aten.new_empty_strided)
def _new_empty_strided(x, size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    sure(len(size) == len(stride))
    made = created(size, dtype or x.dtype, layout, device or x.device, pin_memory)
    return make_sig(made.shape, tuple(stride), made.dtype, made.device)


@rule(aten.eye, aten.eye.m)
def _eye(n, m=None, *, dtype=None, layout=None, device=None, pin_memory=None):
    return created((n, n if m is None else m), dtype, layout, device, pin_memory)


@rule(aten.arange)
def _arange(end, **options):
    return _arange_step(0, end, **options)


@rule(aten.arange.start, aten.arange.start_step)
def _arange_step(start, end, step=1, *, dtype=None, layout=None, device=None, pin_memory=None):
    whole = all(type(n) is int for n in (start, end, step))
    sure(step and (whole or dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)))
    sure((end - start) * step >= 0 and math.isfinite((end - start) / step))
    length = -((start - end) // step) if whole else math.ceil((end - start) / step)
    return created((length,), dtype or (torch.int64 if whole else None), layout, device, pin_memory)


# ----- reductions -----------------------------------------------------------------------------------------------------


def reduced(x: Sig, dims: Any, keepdim: bool = False) -> tuple:
    """The shape that is left; all dimensions go if none is named."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        gone = set(range(x.ndim))
    else:
        listed = [axis(d, x.ndim) for d in (dims if isinstance(dims, list | tuple) else [dims])]
        gone = set(listed)
        sure(len(gone) == len(listed))
    if keepdim:
        return tuple([1 if d in gone else n for d, n in enumerate(x.shape)])
    return tuple([n for d, n in enumerate(x.shape) if d not in gone])


@rule(aten.sum.dim_IntList, aten.prod.dim_int)
def _sum(x, dim=None, keepdim=False, *, dtype=None):
    sure(0 not in x.shape)
    return new(x, reduced(x, dim, keepdim), dtype or (x.dtype if floating(x) else torch.int64))


@rule(aten.sum, aten.prod)
def _sum_all(x, *, dtype=None):
    return _sum(x, dtype=dtype)


@rule(aten.mean.dim)
def _mean(x, dim=None, keepdim=False, *, dtype=None):
    sure(floating(x) and (dtype is None or dtype.is_floating_point or dtype.is_complex))
    return new(x, reduced(x, dim, keepdim), dtype)


@rule(aten.mean)
def _mean_all(x, *, dtype=None):
    return _mean(x, dtype=dtype)


@rule(aten.amax, aten.amin)
def _amax(x, dim=(), keepdim=False):
    sure(0 not in x.shape and not x.dtype.is_complex)
    return new(x, reduced(x, dim, keepdim))


@rule(aten.max, aten.min)
def _max_all(x):
    return _amax(x)


@rule(aten.max.dim, aten.min.dim)
def _max(x, dim, keepdim=False):
    values = _amax(x, dim, keepdim)
    return values, new(x, values.shape, torch.int64)


@rule(aten.argmax, aten.argmin)
def _argmax(x, dim=None, keepdim=False):
    return new(x, _amax(x, () if dim is None else dim, keepdim).shape, torch.int64)


@rule(aten.any, aten.all)
def _any_all(x):
    return _any(x, None)


@rule(aten.any.dim, aten.all.dim, aten.any.dims, aten.all.dims)
def _any(x, dim=None, keepdim=False):
    sure(dim is None or isinstance(dim, int) or dim)
    return new(x, reduced(x, dim, keepdim), torch.uint8 if x.dtype is torch.uint8 else torch.bool)


@rule(aten.var.correction, aten.std.correction)
def _var(x, dim=None, *, correction=None, keepdim=False):
    sure(x.dtype.is_floating_point)
    return new(x, reduced(x, dim, keepdim))


@rule(aten.var_mean.correction, aten.std_mean.correction)
def _var_mean(x, dim=None, *, correction=None, keepdim=False):
    return (_var(x, dim, correction=correction, keepdim=keepdim),) * 2


@rule(aten.logsumexp)
def _logsumexp(x, dim, keepdim=False):
    sure(x.dtype.is_floating_point)
    return new(x, reduced(x, dim, keepdim))


@rule(aten.linalg_vector_norm)
def _vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    sure(x.dtype.is_floating_point and dtype is None and 0 not in x.shape)
    return new(x, reduced(x, dim, keepdim))


# ----- softmax and losses ---------------------------------------------------------------------------------------------


@rule(aten._softmax, aten._log_softmax)
def _softmax(x, dim, half_to_float):
    sure(x.dtype.is_floating_point and not half_to_float)
    axis(dim, x.ndim)
    return new(x, x.shape)


@rule(aten._softmax_backward_data, aten._log_softmax_backward_data)
def _softmax_backward(g, y, dim, input_dtype):
    sure(g.dtype is y.dtype is input_dtype and g.shape == y.shape)
    axis(dim, g.ndim)
    plain(g, y)
    return like(g)


MEAN = 1  # the reductions of losses: none, mean, sum


@rule(aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss)
def _loss(x, target, reduction=MEAN, parameter=1.0):
    sure(x.dtype is target.dtype and x.dtype.is_floating_point and parameter > 0)
    shape = broadcast(x.shape, target.shape)
    return new(x, (), stride=()) if reduction else new(x, shape, stride=result_strides(shape, (x, target)))


@rule(aten.mse_loss_backward, aten.smooth_l1_loss_backward, aten.huber_loss_backward)
def _loss_backward(g, x, target, reduction, *parameter):
    sure(g.dtype is x.dtype is target.dtype and broadcast(g.shape, x.shape, target.shape) == x.shape == target.shape)
    plain(g, x, target)
    return like(x)


@rule(aten.binary_cross_entropy)
def _bce(x, target, weight=None, reduction=MEAN):
    sure(x.shape == target.shape and x.dtype is target.dtype and x.dtype.is_floating_point and weight is None)
    plain(x, target)
    return new(x, () if reduction else x.shape)


@rule(aten.binary_cross_entropy_backward)
def _bce_backward(g, x, target, weight=None, reduction=MEAN):
    sure(weight is None)
    return _loss_backward(g, x, target, reduction)


@rule(aten.nll_loss_forward)
def _nll_loss(x, target, weight, reduction, ignore_index):
    sure(x.dtype.is_floating_point and x.ndim in (1, 2) and target.ndim == x.ndim - 1 and target.dtype is torch.int64)
    sure(target.shape == x.shape[:-1] and (weight is None or (weight.dtype is x.dtype and weight.shape == x.shape[-1:])))
    return new(x, target.shape if reduction == 0 else ()), new(x, ())


@rule(aten.nll_loss_backward)
def _nll_loss_backward(g, x, target, weight, reduction, ignore_index, total_weight):
    _nll_loss(x, target, weight, reduction, ignore_index)
    sure(g.dtype is x.dtype and total_weight.shape == () and g.shape == (target.shape if reduction == 0 else ()))
    plain(x)
    return like(x)


# ----- products -------------------------------------------------------------------------------------------------------


def same_dtype(*sigs: Sig) -> None:
    sure(all(s.dtype is sigs[0].dtype for s in sigs))


@rule(aten.mm)
def _mm(a, b):
    same_dtype(a, b)
    sure(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0])
    return new(a, (a.shape[0], b.shape[1]))


@rule(aten.bmm)
def _bmm(a, b):
    same_dtype(a, b)
    sure(a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1])
    return new(a, (*a.shape[:2], b.shape[2]))


@rule(aten.mv)
def _mv(a, v):
    same_dtype(a, v)
    sure(a.ndim == 2 and v.ndim == 1 and a.shape[1] == v.shape[0])
    return new(a, a.shape[:1])


@rule(aten.dot)
def _dot(a, b):
    same_dtype(a, b)
    sure(a.ndim == b.ndim == 1 and a.shape == b.shape)
    return new(a, ())


@rule(aten.addmm)
def _addmm(c, a, b, *, beta=1, alpha=1):
    out = _mm(a, b)
    sure(c.dtype is out.dtype and broadcast(c.shape, out.shape) == out.shape)
    return out


@rule(aten.baddbmm)
def _baddbmm(c, a, b, *, beta=1, alpha=1):
    out = _bmm(a, b)
    sure(c.dtype is out.dtype and broadcast(c.shape, out.shape) == out.shape)
    return out


# ----- attention ------------------------------------------------------------------------------------------------------


@rule(aten._scaled_dot_product_flash_attention_for_cpu)
def _attention(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    sure(q.ndim == 4)
    b, h, n, _ = q.shape
    return like(q), new(q, (b, h, n), WIDE.get(q.dtype), ordered_strides((b, h, n), (0, 2, 1)))


@rule(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward(g, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    sure(all(x.ndim == 4 for x in (q, k, v)))
    return tuple([new(x, x.shape, stride=ordered_strides(x.shape, (0, 2, 1, 3))) for x in (q, k, v)])


# ----- norms ----------------------------------------------------------------------------------------------------------


@rule(aten.native_layer_norm)
def _layer_norm(x, shape, weight, bias, eps):
    k = len(shape)
    sure(0 < k <= x.ndim and x.shape[-k:] == tuple(shape) and 0 not in x.shape and x.dtype.is_floating_point)
    sure(all(p is None or (p.shape == tuple(shape) and p.dtype is x.dtype) for p in (weight, bias)))
    plain(x, weight, bias)
    moment = new(x, (*x.shape[:-k], *[1] * k), WIDE.get(x.dtype))
    return like(x), moment, moment


@rule(aten.native_layer_norm_backward)
def _layer_norm_backward(g, x, shape, mean, rstd, weight, bias, mask):
    k = len(shape)
    sure(g.shape == x.shape and 0 < k <= x.ndim and x.shape[-k:] == tuple(shape) and 0 not in x.shape)
    sure(all(p is None or p.shape == tuple(shape) for p in (weight, bias)))
    sure(all(m.shape[: x.ndim - k] == x.shape[:-k] and m.ndim == x.ndim for m in (mean, rstd)))
    sure(all(s is None or (s.dtype is x.dtype and s.dtype.is_floating_point) for s in (g, mean, rstd, weight, bias)))
    plain(g, x, mean, rstd, weight, bias)
    return (
        like(x) if mask[0] else None,
        new(x, shape) if mask[1] and weight is not None else None,
        new(x, shape) if mask[2] and bias is not None else None,
    )


@rule(aten.native_group_norm)
def _group_norm(x, weight, bias, n, c, hw, group, eps):
    _group_norm_fits(x, weight, bias, n, c, hw, group)
    moment = new(x, (n, group))
    return like(x), moment, moment


@rule(aten.native_group_norm_backward)
def _group_norm_backward(g, x, mean, rstd, weight, n, c, hw, group, mask):
    _group_norm_fits(x, weight, None, n, c, hw, group)
    sure(g.shape == x.shape and g.dtype is x.dtype and mean.shape == rstd.shape == (n, group))
    plain(g, mean, rstd)
    return like(x) if mask[0] else None, new(x, (c,)) if mask[1] else None, new(x, (c,)) if mask[2] else None


def _group_norm_fits(x: Sig, weight: Any, bias: Any, n: int, c: int, hw: int, group: int) -> None:
    sure(x.dtype in (torch.float32, torch.float64) and x.ndim >= 2 and x.shape[:2] == (n, c) and 0 not in x.shape)
    sure(math.prod(x.shape[2:]) == hw and group > 0 and c % group == 0)
    sure(all(p is None or (p.dtype is x.dtype and p.shape == (c,)) for p in (weight, bias)))
    plain(x, weight, bias)


def _batch_norm_fits(x: Sig, *features: Sig | None) -> None:
    """One of each per channel, all of one ordinary dtype."""
    sure(x.dtype in (torch.float32, torch.float64) and x.ndim >= 2 and 0 not in x.shape)
    sure(all(f is None or (f.dtype is x.dtype and f.shape == x.shape[1:2]) for f in features))
    plain(x, *features)


@rule(aten._native_batch_norm_legit_functional)
def _batch_norm_functional(x, weight, bias, mean, var, training, momentum, eps):
    _batch_norm_fits(x, weight, bias, mean, var)
    sure(training)
    return (like(x), *[new(x, x.shape[1:2])] * 4)


@rule(aten._native_batch_norm_legit.no_stats)
def _batch_norm(x, weight, bias, training, momentum, eps):
    _batch_norm_fits(x, weight, bias)
    sure(training)
    return (like(x), *[new(x, x.shape[1:2])] * 2)


@rule(aten._native_batch_norm_legit_no_training)
def _batch_norm_inference(x, weight, bias, mean, var, momentum, eps):
    _batch_norm_fits(x, weight, bias, mean, var)
    return (like(x), *[new(x, x.shape[1:2])] * 2)


@rule(aten.native_batch_norm_backward)
def _batch_norm_backward(g, x, weight, mean, var, save_mean, save_rstd, train, eps, mask):
    saved = (save_mean, save_rstd) if train else (mean, var)
    _batch_norm_fits(x, weight, *saved)
    sure(g.shape == x.shape and g.dtype is x.dtype and None not in saved)
    plain(g)
    return like(x) if mask[0] else None, *[new(x, x.shape[1:2]) if m else None for m in mask[1:]]


# ----- windows --------------------------------------------------------------------------------------------------------


def per_dim(values: Sequence[int], n: int) -> list[int]:
    """One value per spatial dimension."""
    sure(len(values) in (1, n))
    return list(values) * (n if len(values) == 1 else 1)


@rule(aten.convolution)
def _convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
    n = x.ndim - 2
    same_dtype(x, w, *([] if bias is None else [bias]))
    sure(n in (1, 2, 3) and w.ndim == x.ndim and groups > 0 and 0 not in x.shape and 0 not in w.shape)
    steps, pads, gaps, extra = (per_dim(v, n) for v in (stride, padding, dilation, output_padding))
    sure(min(steps) > 0 and min(pads) >= 0 and min(gaps) > 0 and min(extra) >= 0)
    reach = [d * (k - 1) for d, k in zip(gaps, w.shape[2:], strict=True)]
    if transposed:
        channels = w.shape[1] * groups
        sure(x.shape[1] == w.shape[0] and w.shape[0] % groups == 0)
        sizes = [(i - 1) * s - 2 * p + r + o + 1 for i, s, p, r, o in zip(x.shape[2:], steps, pads, reach, extra, strict=True)]
    else:
        channels = w.shape[0]
        sure(x.shape[1] == w.shape[1] * groups and channels % groups == 0)
        sizes = [(i + 2 * p - r - 1) // s + 1 for i, s, p, r in zip(x.shape[2:], steps, pads, reach, strict=True)]
    sure(min(sizes) > 0 and (bias is None or bias.shape == (channels,)))
    return new(x, (x.shape[0], channels, *sizes))


@rule(aten.convolution_backward)
def _convolution_backward(g, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask):
    out = _convolution(x, w, None, stride, padding, dilation, transposed, output_padding, groups)
    sure(g.shape == out.shape and g.dtype is x.dtype)
    plain(x, w)
    return new(x, x.shape) if mask[0] else None, new(w, w.shape) if mask[1] else None, new(g, bias_sizes) if mask[2] else None


def pooled(x: Sig, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil: bool) -> tuple:
    """The shape after a two-dimensional pooling."""
    sure(x.ndim in (3, 4) and 0 not in x.shape)
    plain(x)
    sizes = []
    ks, ps, ds = (per_dim(v, 2) for v in (kernel, padding, dilation))
    for i, k, s, p, d in zip(x.shape[-2:], ks, per_dim(stride, 2) if stride else ks, ps, ds, strict=True):
        sure(k > 0 and s > 0 and d > 0 and 0 <= p <= k // 2)
        room = i + 2 * p - d * (k - 1) - 1
        n = (-(-room // s) if ceil else room // s) + 1
        n -= ceil and (n - 1) * s >= i + p  # the last window starts inside the input or its left padding
        sure(n > 0)
        sizes.append(n)
    return (*x.shape[:-2], *sizes)


@rule(aten.max_pool2d_with_indices)
def _max_pool2d(x, kernel, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    shape = pooled(x, kernel, stride, padding, dilation, ceil_mode)
    return new(x, shape), new(x, shape, torch.int64)


@rule(aten.max_pool2d_with_indices_backward)
def _max_pool2d_backward(g, x, kernel, stride, padding, dilation, ceil_mode, indices):
    shape = pooled(x, kernel, stride, padding, dilation, ceil_mode)
    sure(g.shape == indices.shape == shape and g.dtype is x.dtype)
    return new(x, x.shape)


@rule(aten.avg_pool2d)
def _avg_pool2d(x, kernel, stride=(), padding=(0,), ceil_mode=False, count_include_pad=True, divisor=None):
    sure(divisor != 0)
    return new(x, pooled(x, kernel, stride, padding, (1,), ceil_mode))


@rule(aten.avg_pool2d_backward)
def _avg_pool2d_backward(g, x, kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    sure(g.shape == pooled(x, kernel, stride, padding, (1,), ceil_mode) and g.dtype is x.dtype and divisor != 0)
    return new(x, x.shape)


@rule(aten._adaptive_avg_pool2d)
def _adaptive_avg_pool2d(x, size):
    sure(x.ndim in (3, 4) and len(size) == 2 and 0 not in x.shape and 0 not in size)
    plain(x)
    return new(x, (*x.shape[:-2], *size))


@rule(aten._adaptive_avg_pool2d_backward)
def _adaptive_avg_pool2d_backward(g, x):
    sure(g.ndim == x.ndim and g.ndim in (3, 4) and g.dtype is x.dtype and g.shape[:-2] == x.shape[:-2] and 0 not in g.shape)
    plain(g, x)
    return new(x, x.shape)


# ----- joining and looking up -----------------------------------------------------------------------------------------


@rule(aten.cat)
def _cat(tensors, dim=0):
    sure(tensors)
    same_dtype(*tensors)
    first = tensors[0]
    d = axis(dim, first.ndim)
    sure(first.ndim and all(t.shape[:d] + t.shape[d + 1 :] == first.shape[:d] + first.shape[d + 1 :] for t in tensors))
    sure(all(t.ndim == first.ndim for t in tensors) and not (first.ndim == 1 and any(t.shape == (0,) for t in tensors)))
    if first.ndim > 3:
        plain(*tensors)
    return new(first, (*first.shape[:d], sum(t.shape[d] for t in tensors), *first.shape[d + 1 :]))


@rule(aten.stack)
def _stack(tensors, dim=0):
    sure(tensors)
    same_dtype(*tensors)
    plain(*tensors)
    shape = tensors[0].shape
    d = axis(dim, len(shape) + 1)
    sure(all(t.shape == shape for t in tensors))
    return new(tensors[0], (*shape[:d], len(tensors), *shape[d:]))


@rule(aten.gather)
def _gather(x, dim, index, *, sparse_grad=False):
    d = axis(dim, x.ndim)
    sure(index.dtype is torch.int64 and index.ndim == x.ndim > 0 and not sparse_grad)
    sure(all(i == d or n <= m for i, (n, m) in enumerate(zip(index.shape, x.shape, strict=True))))
    return new(x, index.shape)


@rule(aten.index_select)
def _index_select(x, dim, index):
    d = axis(dim, x.ndim)
    sure(x.ndim and index.ndim == 1 and index.dtype in (torch.int32, torch.int64))
    return new(x, (*x.shape[:d], index.shape[0], *x.shape[d + 1 :]))


@rule(aten.embedding)
def _embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    sure(weight.ndim == 2 and indices.dtype in (torch.int32, torch.int64))
    plain(weight)
    return new(weight, (*indices.shape, weight.shape[1]))


@rule(aten.embedding_dense_backward)
def _embedding_backward(g, indices, num_weights, padding_idx, scale_grad_by_freq):
    sure(indices.dtype in (torch.int32, torch.int64) and g.ndim == indices.ndim + 1 and g.shape[:-1] == indices.shape)
    return new(g, (num_weights, g.shape[-1]))


@rule(aten.index.Tensor)
def _index(x, indices):
    sure(indices and len(indices) <= x.ndim and 0 not in x.shape)
    given = [i for i, t in enumerate(indices) if t is not None]
    sure(given and all(indices[i].dtype in (torch.int32, torch.int64) for i in given))
    sure(given[-1] - given[0] == len(given) - 1)
    plain(x)
    found = broadcast(*[indices[i].shape for i in given])
    before, after = x.shape[: given[0]], x.shape[given[-1] + 1 :]
    return new(x, (*before, *found, *after))


@rule(aten.slice_backward)
def _slice_backward(g, sizes, dim, start, end, step):
    axis(dim, len(sizes))
    return new(g, sizes)


@rule(aten.select_backward)
def _select_backward(g, sizes, dim, index):
    axis(dim, len(sizes))
    return new(g, sizes)


@rule(aten.scatter.src, aten.scatter_add, aten.scatter.value)
def _scatter(x, dim, index, source):
    d = axis(dim, x.ndim)
    sure(index.dtype is torch.int64 and index.ndim == x.ndim > 0)
    sure(all(i == d or n <= m for i, (n, m) in enumerate(zip(index.shape, x.shape, strict=True))))
    if source.__class__ is Sig:
        sure(source.dtype is x.dtype and source.ndim == x.ndim)
        sure(all(n <= m for n, m in zip(index.shape, source.shape, strict=True)))
    plain(x)
    return like(x)


@rule(aten.repeat)
def _repeat(x, repeats):
    lead = len(repeats) - x.ndim
    sure(lead >= 0 and all(r >= 0 for r in repeats))
    return new(x, [n * r for n, r in zip((1,) * lead + tuple(x.shape), repeats, strict=True)])

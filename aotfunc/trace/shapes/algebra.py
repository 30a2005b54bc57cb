"""Shape rules of algebra: the same shape, reductions, products, solutions."""

from __future__ import annotations

from typing import Any

import torch

from .rules import (
    axis,
    broadcast_shape,
    formatted,
    new,
    ordered_strides,
    pointwise_shape,
    result_strides,
    shape_rule,
    sure,
    sure_in_order,
)
from .sig import Sig, contiguous_stride

aten = torch.ops.aten


# ----- the same shape ----------------------------------------------------------------------------


def like_strides(x: Sig, memory_format: Any) -> tuple:
    """Return the strides of ``empty_like``."""
    if memory_format in (None, torch.preserve_format):
        sure(1 not in x.shape or x.stride == contiguous_stride(x.shape))
        return result_strides(x.shape, (x,))
    return formatted(x.shape, memory_format)


def like(x: Sig, dtype: torch.dtype | None = None, memory_format: Any = None) -> Sig:
    return new(x, x.shape, dtype, like_strides(x, memory_format))


@shape_rule(aten.empty_like, aten.zeros_like, aten.ones_like)
def _like(x, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    sure(
        layout in (None, torch.strided)
        and not pin_memory
        and (device is None or torch.device(device) == x.device)
    )
    return like(x, dtype, memory_format)


@shape_rule(aten.rand_like, aten.rand_like.generator, aten.randn_like, aten.randn_like.generator)
def _rand_like(x, *, dtype=None, generator=None, **options):
    drawn = dtype or x.dtype
    sure(drawn.is_floating_point or drawn.is_complex)
    return _like(x, dtype=dtype, **options)


@shape_rule(aten._conj_physical)
def _conj_physical(x):
    sure(x.dtype.is_complex)
    return like(x)


@shape_rule(aten.hardtanh)
def _hardtanh(x, min_val=-1, max_val=1):
    sure(min_val <= max_val)
    sure_in_order(x)
    return pointwise_shape(aten.hardtanh.default, x, min_val, max_val)


@shape_rule(aten.normal_)
def _normal_(x, mean=0.0, std=1.0, *, generator=None):
    sure(x.dtype.is_floating_point and std >= 0 and 0 not in x.stride)
    return x


@shape_rule(aten.full_like)
def _full_like(x, value, **options):
    return _like(x, **options)


@shape_rule(aten.bernoulli, aten.bernoulli.p)
def _bernoulli(x, p=None, *, generator=None):
    sure(p is None or 0 <= p <= 1)
    sure_in_order(x)
    return like(x)


@shape_rule(aten.native_dropout)
def _native_dropout(x, p, train):
    sure(x.differentiable and train is not False and 0 < p < 1)
    return like(x), like(x, torch.bool)


@shape_rule(aten.native_dropout_backward)
def _native_dropout_backward(g, mask, scale):
    sure(g.differentiable and mask.dtype is torch.bool and g.shape == mask.shape)
    sure_in_order(g, mask)
    return like(g)


@shape_rule(aten.where.self)
def _where(condition, x, y):
    sure(condition.dtype is torch.bool)
    return pointwise_shape(aten.where.self, condition, x, y)


@shape_rule(aten.pow.Tensor_Scalar)
def _pow(x, exponent):
    sure(exponent != 1 or x.stride == contiguous_stride(x.shape))  # else a clone
    return pointwise_shape(aten.pow.Tensor_Scalar, x, exponent)


@shape_rule(aten.tril, aten.triu)
def _tri(x, diagonal=0):
    sure(x.ndim >= 2)
    sure_in_order(x)
    return like(x)


@shape_rule(aten.roll)
def _roll(x, shifts, dims=()):
    sure(shifts and (len(shifts) == len(dims) or (len(shifts) == 1 and not dims)))
    sure(all(axis(d, x.ndim) < x.ndim for d in dims))
    sure_in_order(x)
    return like(x)


@shape_rule(aten.flip)
def _flip(x, dims):
    sure(len({axis(d, x.ndim) for d in dims}) == len(dims))
    sure_in_order(x)
    return like(x)


@shape_rule(aten.cumsum, aten.cumprod)
def _cumulate(x, dim, *, dtype=None):
    axis(dim, x.ndim)
    sure_in_order(x)
    return new(x, x.shape, dtype or (x.dtype if x.differentiable else torch.int64))


# ----- reductions --------------------------------------------------------------------------------


def reduced_shape(x: Sig, dims: Any, keepdim: bool) -> tuple:
    """Return the shape after a reduction over ``dims``; over all dimensions if none is named."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        gone = set(range(x.ndim))
    else:
        listed = [axis(d, x.ndim) for d in (dims if isinstance(dims, list | tuple) else [dims])]
        gone = set(listed)
        sure(len(gone) == len(listed))
    if keepdim:
        return tuple([1 if d in gone else n for d, n in enumerate(x.shape)])
    return tuple([n for d, n in enumerate(x.shape) if d not in gone])


@shape_rule(aten.sum.dim_IntList, aten.prod.dim_int)
def _sum(x, dim=None, keepdim=False, *, dtype=None):
    sure(0 not in x.shape)
    return new(
        x, reduced_shape(x, dim, keepdim), dtype or (x.dtype if x.differentiable else torch.int64)
    )


@shape_rule(aten.sum, aten.prod)
def _sum_all(x, *, dtype=None):
    return _sum(x, dtype=dtype)


@shape_rule(aten.mean.dim)
def _mean(x, dim=None, keepdim=False, *, dtype=None):
    sure(x.differentiable and (dtype is None or dtype.is_floating_point or dtype.is_complex))
    return new(x, reduced_shape(x, dim, keepdim), dtype)


@shape_rule(aten.mean)
def _mean_all(x, *, dtype=None):
    return _mean(x, dtype=dtype)


@shape_rule(aten.amax, aten.amin)
def _amax(x, dim=(), keepdim=False):
    sure(0 not in x.shape and not x.dtype.is_complex)
    return new(x, reduced_shape(x, dim, keepdim))


@shape_rule(aten.max, aten.min)
def _max_all(x):
    return _amax(x)


@shape_rule(aten.max.dim, aten.min.dim)
def _max(x, dim, keepdim=False):
    values = _amax(x, dim, keepdim)
    return values, new(x, values.shape, torch.int64)


@shape_rule(aten.argmax, aten.argmin)
def _argmax(x, dim=None, keepdim=False):
    return new(x, _amax(x, () if dim is None else dim, keepdim).shape, torch.int64)


@shape_rule(aten.any, aten.all)
def _any_all(x):
    return _any(x, None)


@shape_rule(aten.any.dim, aten.all.dim, aten.any.dims, aten.all.dims)
def _any(x, dim=None, keepdim=False):
    sure(dim is None or isinstance(dim, int) or dim)
    return new(
        x, reduced_shape(x, dim, keepdim), torch.uint8 if x.dtype is torch.uint8 else torch.bool
    )


@shape_rule(aten.var.correction, aten.std.correction)
def _var(x, dim=None, *, correction=None, keepdim=False):
    sure(x.dtype.is_floating_point and 0 not in x.shape)
    return new(x, reduced_shape(x, dim, keepdim))


@shape_rule(aten.var_mean.correction, aten.std_mean.correction)
def _var_mean(x, dim=None, *, correction=None, keepdim=False):
    return (_var(x, dim, correction=correction, keepdim=keepdim),) * 2


@shape_rule(aten.logsumexp)
def _logsumexp(x, dim, keepdim=False):
    sure(x.dtype.is_floating_point and dim)
    return new(x, reduced_shape(x, dim, keepdim))


@shape_rule(aten.linalg_vector_norm)
def _vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    sure(x.dtype.is_floating_point and dtype is None and 0 not in x.shape)
    return new(x, reduced_shape(x, dim, keepdim))


# ----- products ----------------------------------------------------------------------------------


def same_dtype(*sigs: Sig) -> None:
    sure(all(s.dtype is sigs[0].dtype for s in sigs))


@shape_rule(aten.mm)
def _mm(a, b):
    same_dtype(a, b)
    sure(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0])
    return new(a, (a.shape[0], b.shape[1]))


@shape_rule(aten.bmm)
def _bmm(a, b):
    same_dtype(a, b)
    sure(a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1])
    return new(a, (*a.shape[:2], b.shape[2]))


@shape_rule(aten.mv)
def _mv(a, v):
    same_dtype(a, v)
    sure(a.ndim == 2 and v.ndim == 1 and a.shape[1] == v.shape[0])
    return new(a, a.shape[:1])


@shape_rule(aten.dot, aten.vdot)
def _dot(a, b):
    same_dtype(a, b)
    sure(a.ndim == b.ndim == 1 and a.shape == b.shape)
    return new(a, ())


@shape_rule(aten.addmm)
def _addmm(c, a, b, *, beta=1, alpha=1):
    out = _mm(a, b)
    sure(c.dtype is out.dtype and broadcast_shape(c.shape, out.shape) == out.shape)
    return out


@shape_rule(aten.addmv)
def _addmv(c, a, v, *, beta=1, alpha=1):
    out = _mv(a, v)
    sure(c.dtype is out.dtype and c.shape == out.shape and 0 not in a.shape)
    return out


@shape_rule(aten.baddbmm)
def _baddbmm(c, a, b, *, beta=1, alpha=1):
    out = _bmm(a, b)
    sure(c.dtype is out.dtype and broadcast_shape(c.shape, out.shape) == out.shape)
    return out


# ----- solutions ---------------------------------------------------------------------------------


def matrix_strides(shape: tuple, column_major: bool) -> tuple:
    """Return the strides of a batch of matrices that are contiguous by rows, or by columns."""
    batch, rows, columns = range(len(shape) - 2), len(shape) - 2, len(shape) - 1
    return ordered_strides(shape, (*batch, columns, rows) if column_major else range(len(shape)))


@shape_rule(aten.cholesky)
def _cholesky(a, upper=False):
    sure(a.ndim >= 2 and a.shape[-2] == a.shape[-1] and a.differentiable and 0 not in a.shape)
    return new(a, a.shape, stride=matrix_strides(a.shape, column_major=True))


@shape_rule(aten.lu_unpack)
def _lu_unpack(a, pivots, unpack_data=True, unpack_pivots=True):
    sure(a.ndim >= 2 and a.dtype.is_floating_point and pivots.dtype is torch.int32)
    sure(pivots.shape == (*a.shape[:-2], min(a.shape[-2:])))
    *batch, m, n = a.shape
    k = min(m, n)
    shapes = [(*batch, m, m) if unpack_pivots else (0,)]
    shapes += [(*batch, m, k), (*batch, k, n)] if unpack_data else [(0,), (0,)]
    return tuple([new(a, shape) for shape in shapes])


def solved(factors: Sig, pivots: Sig, b: Sig, column_major: bool = True) -> Sig:
    same_dtype(factors, b)
    sure(factors.ndim >= 2 and b.ndim >= 2 and pivots.dtype is torch.int32)
    *batch, m, n = factors.shape
    sure(m == n and pivots.shape == factors.shape[:-1])
    shape = (*broadcast_shape(batch, b.shape[:-2]), *b.shape[-2:])
    return new(b, shape, stride=matrix_strides(shape, column_major))


@shape_rule(aten.linalg_lu_solve)
def _lu_solve(factors, pivots, b, *, left=True, adjoint=False):
    sure(b.shape[-2 if left else -1] == factors.shape[-1])
    return solved(factors, pivots, b, column_major=left)


@shape_rule(aten.linalg_ldl_solve)
def _ldl_solve(factors, pivots, b, *, hermitian=False):
    sure(b.shape[-2] == factors.shape[-1])
    return solved(factors, pivots, b)


@shape_rule(aten.linalg_lstsq)
def _lstsq(a, b, rcond=None, *, driver=None):
    """Infer all results but residuals: these depend on the rank."""
    same_dtype(a, b)
    sure(a.device.type == "cpu" and a.ndim >= 2 and 0 not in a.shape and 0 not in b.shape)
    *batch, m, n = a.shape
    vector = b.shape == a.shape[:-1]
    columns = 1 if vector else b.shape[-1]
    sure(vector or b.shape[:-1] == a.shape[:-1])
    tall, real = max(m, n), a.dtype.to_real()
    strides = [s * tall * columns for s in contiguous_stride(tuple(batch))]
    x = (
        new(a, (*batch, n), stride=(*strides, 1))
        if vector
        else new(a, (*batch, n, columns), stride=(*strides, 1, tall))
    )
    residuals = (*batch, columns) if driver == "gels" and m > n else (0,)
    rank = (0,) if driver == "gels" else batch
    singular = (*batch, min(m, n)) if driver in ("gelsd", "gelss") else (0,)
    return x, new(a, residuals, real), new(a, rank, torch.int64), new(a, singular, real)

"""Open up norms of vectors, and other reductions of several steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .norms import as_floats, var_mean

Dims = int | Sequence[int] | None


def all_dims(x: Tensor, dim: Dims) -> list[int]:
    """List the dimensions: one, several, or all if none is named."""
    dims = [dim] if isinstance(dim, int) else dim
    return [d % x.dim() for d in dims] if dims else list(range(x.dim()))


def vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Any:
    if dtype not in (None, x.dtype):
        return NotImplemented
    dims, x = all_dims(x, dim), as_floats(x)
    if ord == 2:
        return (x * x).sum(dims, keepdim).sqrt()
    size = x.abs()
    if ord == 1:
        return size.sum(dims, keepdim)
    if math.isinf(ord):
        return size.amax(dims, keepdim) if ord > 0 else size.amin(dims, keepdim)
    return NotImplemented


def norm(x: Tensor, p: float | None, dim: Dims, keepdim: bool = False) -> Any:
    return vector_norm(x, 2 if p is None else p, dim, keepdim)


def logsumexp(x: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    dims, x = all_dims(x, dim), as_floats(x)
    most = x.amax(dims, keepdim=True)
    most = torch.where(most.abs() == math.inf, 0, most)
    total = (x - most).exp().sum(dims, keepdim).log()
    return total + (most if keepdim else most.squeeze(dims))


def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Compute a softmax that is 0 in rows of -inf alone."""
    if dtype not in (None, x.dtype):
        return NotImplemented
    most = x.amax(dim, keepdim=True)
    e = (x - most).exp()
    return torch.where(most == -math.inf, 0, e * (1 / e.sum(dim, keepdim=True)))


def nansum(x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if dtype not in (None, x.dtype):
        return NotImplemented
    return torch.where(x.isnan(), 0, x).sum(all_dims(x, dim), keepdim)


def aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    dims = all_dims(x, dim)
    return x.amin(dims, keepdim), x.amax(dims, keepdim)


def std_mean(x: Tensor, dim: Dims = None, **options: Any) -> Any:
    found = var_mean(x, all_dims(x, dim), **options)
    return found if found is NotImplemented else (found[0].sqrt(), found[1])

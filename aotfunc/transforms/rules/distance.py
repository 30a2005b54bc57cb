"""Rules of distances between rows: cdist and pdist, to any order.

The first reverse derivative is PyTorch's kernel; the derivatives of that kernel, of which PyTorch
has none, go through the norm of all differences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batching import align, all_batched
from .reduce import norm_backward
from .schema import aten
from .table import broadcast_shapes, decompose_as, jvp_of, total, vmap_of


def row_differences(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x[i] - y[j]`` for all rows: ``[..., P, R, M]``."""
    return x.unsqueeze(-2) - y.unsqueeze(-3)


def norm_tangent(t: Tensor, norm: Tensor, d: Tensor, p: float) -> Tensor:
    """Return the tangent of the norm of the rows of ``d`` for the tangent ``t`` of ``d``."""
    return (norm_backward(torch.ones_like(norm), norm, d, p, -1) * t).sum(-1)


@jvp_of(aten._cdist_forward)
def _(tangents: Any, out: Tensor, x: Tensor, y: Tensor, p: float) -> Tensor | None:
    tx, ty = tangents
    d = row_differences(x, y)
    return total(
        None if tx is None else norm_tangent(tx.unsqueeze(-2), out, d, p),
        None if ty is None else norm_tangent(-ty.unsqueeze(-3), out, d, p),
    )


def cdist_backward(g: Tensor, x: Tensor, y: Tensor, p: float, out: Tensor) -> Tensor:
    """Return the gradient of ``x`` before it is summed over the batch dimensions of ``y``."""
    if not (out.numel() and x.numel()):
        return torch.zeros_like(x)  # as the kernel
    return norm_backward(g, out, row_differences(x, y), p, -1).sum(-2)


decompose_as(aten._cdist_backward, cdist_backward)


@vmap_of(aten._cdist_backward)
def _(
    g: Tensor, x: Tensor, y: Tensor, p: float, out: Tensor, *, batched: Any, size: Any, shape: Any
) -> Tensor:
    tensors = all_batched((g, x, y, out), batched, size)
    rank = max(t.dim() for t in tensors)
    tensors = [align(t, rank - 1) for t in tensors]
    lead = broadcast_shapes(*(t.shape[:-2] for t in tensors))
    g, x, y, out = (t.expand(*lead, *t.shape[-2:]).contiguous() for t in tensors)
    summed = [size, *[1] * (rank - 1 - len(shape)), *shape]
    return aten._cdist_backward(g, x, y, p, out).sum_to_size(summed).reshape(size, *shape)


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """List the row numbers of all pairs, in pdist's order."""
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device).unbind(0)
    return first, second


@jvp_of(aten._pdist_forward)
def _(tangents: Any, out: Tensor, x: Tensor, p: float) -> Tensor:
    i, j = pairs(x)
    return norm_tangent(tangents[0][i] - tangents[0][j], out, x[i] - x[j], p)


def pdist_backward(g: Tensor, x: Tensor, p: float, out: Tensor) -> Tensor:
    i, j = pairs(x)
    each = norm_backward(g, out, x[i] - x[j], p, -1)
    return torch.zeros_like(x).index_add(0, i, each).index_add(0, j, -each)


decompose_as(aten._pdist_backward, pdist_backward)


@vmap_of(aten._pdist_forward)
def _(x: Tensor, p: float) -> Tensor:
    i, j = pairs(x[0])
    return aten.linalg_vector_norm(x[:, i] - x[:, j], p, [-1])

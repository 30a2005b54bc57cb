"""Softmax and its gradients, of rows or of columns."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e * (1 / e.sum(dim, keepdim=True))  # one division a row


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    x = x - x.amax(dim, keepdim=True)
    return x - x.exp().sum(dim, keepdim=True).log()


def softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    g = g * y
    return g - y * g.sum(dim, keepdim=True)


def log_softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return g - y.exp() * g.sum(dim, keepdim=True)

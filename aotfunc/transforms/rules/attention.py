"""Scaled-dot-product attention in plain ops: its derivatives, first and second.

``P = softmax(scale * q @ k.mT + mask)``, ``out = P @ v``. It forms the attention matrix. The rules
of the fused kernels in ``fused_attention.py`` use it for derivatives that no kernel has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .schema import aten


class Absent:
    """An absent tangent or cotangent: neutral in sums, absorbing in products."""

    @property
    def mT(self) -> Absent:
        return self

    def sum(self, *args: Any, **kwargs: Any) -> Absent:
        return self

    def __add__(self, other: Any) -> Any:
        return other

    def __sub__(self, other: Any) -> Any:
        return -other

    def __mul__(self, other: Any) -> Absent:
        return self

    def __neg__(self) -> Absent:
        return self

    __radd__ = __rsub__ = __add__
    __rmul__ = __matmul__ = __rmatmul__ = __mul__


ABSENT = Absent()


def or_absent(*terms: Tensor | None) -> list[Any]:
    return [ABSENT if t is None else t for t in terms]


def or_none(*terms: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if t is ABSENT else t for t in terms)


def scale_of(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def attention_matrix(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Return the attention matrix ``P``; a fully masked row is zero."""
    scores = (q @ k.mT) * scale
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        )
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return aten._safe_softmax(scores, -1)


def through_softmax(p: Tensor, v: Any) -> Any:
    """Apply the Jacobian of ``P`` with respect to the scores, which is symmetric, to ``v``."""
    return p * (v - (p * v).sum(-1, keepdim=True))


def per_head(x: Any, q: Tensor) -> Any:
    """Repeat keys or values for all query heads that share them."""
    if x is ABSENT or x.shape[-3] == q.shape[-3]:
        return x
    repeats = q.shape[-3] // x.shape[-3]
    return x.unsqueeze(-3).expand(*x.shape[:-2], repeats, *x.shape[-2:]).flatten(-4, -3)


def shared_heads(g: Any, x: Tensor) -> Any:
    """Apply the transpose of :func:`per_head`."""
    if g is ABSENT or g.shape[-3] == x.shape[-3]:
        return g
    return g.unflatten(-3, (x.shape[-3], -1)).sum(-3)


def tangent(tangents: Any, q, k, v, mask, causal, scale) -> Tensor | None:
    """Return the tangent of the output from those of ``(q, k, v, mask)``."""
    tq, tk, tv, t_mask = or_absent(*tangents)
    k, v, tk, tv = (per_head(x, q) for x in (k, v, tk, tv))
    s = scale_of(q, scale)
    p = attention_matrix(q, k, mask, causal, s)
    t_scores = (tq @ k.mT + q @ tk.mT) * s + t_mask
    return or_none(through_softmax(p, t_scores) @ v + p @ tv)[0]


def cotangent(g, q, k, v, mask, causal, scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cotangents of ``(q, k, v, scores)`` as the kernels do; the mask's is scores'."""
    keys, values = per_head(k, q), per_head(v, q)
    s = scale_of(q, scale)
    p = attention_matrix(q, keys, mask, causal, s)
    g_scores = through_softmax(p, g @ values.mT)
    of_k, of_v = shared_heads((g_scores.mT @ q) * s, k), shared_heads(p.mT @ g, v)
    return (g_scores @ keys) * s, of_k, of_v, g_scores


def tangent_of_cotangent(
    tangents: Any, g, q, k, v, mask, causal, scale
) -> tuple[Tensor | None, ...]:
    """Return tangents of :func:`cotangent` from those of ``(g, q, k, v, mask)``."""
    tg, tq, tk, tv, t_mask = or_absent(*tangents)
    keys, values, tk, tv = (per_head(x, q) for x in (k, v, tk, tv))
    s = scale_of(q, scale)
    p = attention_matrix(q, keys, mask, causal, s)
    t_scores = (tq @ keys.mT + q @ tk.mT) * s + t_mask
    g_p = g @ values.mT
    g_scores = through_softmax(p, g_p)
    tg_p = tg @ values.mT + g @ tv.mT
    t_p = through_softmax(p, t_scores)
    tg_scores = (
        t_p * (g_p - (p * g_p).sum(-1, keepdim=True))
        - p * (t_p * g_p).sum(-1, keepdim=True)
        + through_softmax(p, tg_p)
    )
    of_q = (tg_scores @ keys + g_scores @ tk) * s
    of_k = (tg_scores.mT @ q + g_scores.mT @ tq) * s
    of_v = t_p.mT @ g + p.mT @ tg
    return or_none(of_q, shared_heads(of_k, k), shared_heads(of_v, v), tg_scores)


def cotangent_of_cotangent(
    cotangents: Any, g, q, k, v, mask, causal, scale
) -> tuple[Tensor | None, ...]:
    """Return cotangents of ``(g, q, k, v, scores)`` by those of :func:`cotangent`'s results."""
    a, b, c, d = or_absent(*cotangents)
    keys, values, b, c = (per_head(x, q) for x in (k, v, b, c))
    s = scale_of(q, scale)
    p = attention_matrix(q, keys, mask, causal, s)
    g_p = g @ values.mT
    g_scores = through_softmax(p, g_p)
    e = (a @ keys.mT + q @ b.mT) * s + d  # cotangent of g_scores
    of_p = g @ c.mT
    of_g_p = through_softmax(p, e)
    centred = g_p - (p * g_p).sum(-1, keepdim=True)
    of_p = of_p + (e * centred - g_p * (p * e).sum(-1, keepdim=True))
    h = through_softmax(p, of_p)  # cotangent of the scores
    of_g = of_g_p @ values + p @ c
    of_q = (h @ keys + g_scores @ b) * s
    of_k = (h.mT @ q + g_scores.mT @ a) * s
    of_v = of_g_p.mT @ g
    return or_none(of_g, of_q, shared_heads(of_k, k), shared_heads(of_v, v), h)

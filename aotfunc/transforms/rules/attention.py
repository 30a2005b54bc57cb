"""Rules of fused scaled-dot-product attention: the CPU, flash, memory-efficient and cuDNN kernels.

The gradient is each kernel's own backward op. What no kernel offers, tangents and second
derivatives, comes from the one definition in plain ops below, which all kernels share: ``P =
softmax(scale * q @ k.mT + mask)``, ``out = P @ v``. It forms the attention matrix, and it rules
out dropout: no formula can know which entries the kernel dropped."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aotfunc.transforms.rules.batching import with_batch
from aotfunc.transforms.rules.table import aten, jvp_of, total, vjp_of, vmap_of

# ----- the definition in plain ops ---------------------------------------------------------------


def undropped(dropout_p: float) -> None:
    if dropout_p:
        raise NotImplementedError(
            "fused attention with dropout has no forward-mode or second derivative: pass "
            "dropout_p=0, or choose torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )


def scale_of(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def weights_of(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The attention matrix ``P``; a row that may look nowhere is zero."""
    scores = (q @ k.mT) * scale
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        )
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return aten._safe_softmax(scores, -1)


def through_softmax(p: Tensor, v: Tensor) -> Tensor:
    """The symmetric Jacobian of ``P`` by the scores, applied to ``v``."""
    return p * (v - (p * v).sum(-1, keepdim=True))


def per_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values repeated for all the query heads that share them."""
    repeats = q.shape[-3] // x.shape[-3]
    return (
        x
        if repeats == 1
        else x.unsqueeze(-3).expand(*x.shape[:-2], repeats, *x.shape[-2:]).flatten(-4, -3)
    )


def shared_heads(g: Tensor, x: Tensor) -> Tensor:
    """The transpose of :func:`per_head`."""
    return g if g.shape[-3] == x.shape[-3] else g.unflatten(-3, (x.shape[-3], -1)).sum(-3)


def mul(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The matrix product, absent if a factor is."""
    return None if a is None or b is None else a @ b


def plus(*terms: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    return total(t for t in terms if t is not None)


def on(f: Any, x: Tensor | None) -> Any:
    return None if x is None else f(x)


def tangent(tangents: Any, q, k, v, mask, causal, scale) -> Tensor | None:
    """The tangent of the output from those of ``(q, k, v, mask)``."""
    tq, tk, tv, t_mask = tangents
    k, v, tk, tv = (on(lambda x: per_head(x, q), x) for x in (k, v, tk, tv))
    s = scale_of(q, scale)
    p = weights_of(q, k, mask, causal, s)
    t_scores = plus(
        on(lambda x: x * s, plus(mul(tq, k.mT), mul(q, on(lambda x: x.mT, tk)))), t_mask
    )
    return plus(mul(on(lambda x: through_softmax(p, x), t_scores), v), mul(p, tv))


def cotangent(g, q, k, v, mask, causal, scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of ``(q, k, v, scores)``, the last being the mask's: what the kernels' backward
    ops compute."""
    keys, values = per_head(k, q), per_head(v, q)
    s = scale_of(q, scale)
    p = weights_of(q, keys, mask, causal, s)
    g_scores = through_softmax(p, g @ values.mT)
    of_k, of_v = shared_heads((g_scores.mT @ q) * s, k), shared_heads(p.mT @ g, v)
    return (g_scores @ keys) * s, of_k, of_v, g_scores


def tangent_of_cotangent(
    tangents: Any, g, q, k, v, mask, causal, scale
) -> tuple[Tensor | None, ...]:
    """Tangents of :func:`cotangent` from those of ``(g, q, k, v, mask)``."""
    tg, tq, tk, tv, t_mask = tangents
    keys, values, tk, tv = (on(lambda x: per_head(x, q), x) for x in (k, v, tk, tv))
    s = scale_of(q, scale)
    p = weights_of(q, keys, mask, causal, s)
    t_scores = plus(
        on(lambda x: x * s, plus(mul(tq, keys.mT), mul(q, on(lambda x: x.mT, tk)))), t_mask
    )
    g_p = g @ values.mT
    g_scores = through_softmax(p, g_p)
    tg_p = plus(mul(tg, values.mT), mul(g, on(lambda x: x.mT, tv)))
    t_p = tg_scores = None
    if t_scores is not None:
        t_p = through_softmax(p, t_scores)
        tg_scores = t_p * (g_p - (p * g_p).sum(-1, keepdim=True)) - p * (t_p * g_p).sum(
            -1, keepdim=True
        )
    if tg_p is not None:
        tg_scores = plus(tg_scores, through_softmax(p, tg_p))
    of_q = on(lambda x: x * s, plus(mul(tg_scores, keys), mul(g_scores, tk)))
    of_k = on(lambda x: x * s, plus(mul(on(lambda x: x.mT, tg_scores), q), mul(g_scores.mT, tq)))
    of_v = plus(mul(on(lambda x: x.mT, t_p), g), mul(p.mT, tg))
    return (
        of_q,
        on(lambda x: shared_heads(x, k), of_k),
        on(lambda x: shared_heads(x, v), of_v),
        tg_scores,
    )


def cotangent_of_cotangent(
    cotangents: Any, g, q, k, v, mask, causal, scale
) -> tuple[Tensor | None, ...]:
    """Cotangents of ``(g, q, k, v, scores)`` from those of :func:`cotangent`'s ``(q, k, v,
    scores)``."""
    a, b, c, d = cotangents
    keys, values, b, c = (on(lambda x: per_head(x, q), x) for x in (k, v, b, c))
    s = scale_of(q, scale)
    p = weights_of(q, keys, mask, causal, s)
    g_p = g @ values.mT
    g_scores = through_softmax(p, g_p)
    e = plus(
        on(lambda x: x * s, plus(mul(a, keys.mT), mul(q, on(lambda x: x.mT, b)))), d
    )  # cotangent of g_scores
    of_p, of_g_p = mul(g, on(lambda x: x.mT, c)), None
    if e is not None:
        of_g_p = through_softmax(p, e)
        centred = g_p - (p * g_p).sum(-1, keepdim=True)
        of_p = plus(of_p, e * centred - g_p * (p * e).sum(-1, keepdim=True))
    h = on(lambda x: through_softmax(p, x), of_p)  # cotangent of the scores
    of_g = plus(mul(of_g_p, values), mul(p, c))
    of_q = on(lambda x: x * s, plus(mul(h, keys), mul(g_scores, b)))
    of_k = on(lambda x: x * s, plus(mul(on(lambda x: x.mT, h), q), mul(g_scores.mT, a)))
    of_v = mul(on(lambda x: x.mT, of_g_p), g)
    return (
        of_g,
        of_q,
        on(lambda x: shared_heads(x, k), of_k),
        on(lambda x: shared_heads(x, v), of_v),
        h,
    )


# ----- the batch goes into N ---------------------------------------------------------------------


def folded(x: Tensor, carries: bool, size: int) -> Tensor:
    """A batch of ``(N, ...)`` as one of ``(size * N, ...)``."""
    return with_batch(x, carries, size).flatten(0, 1)


def folded_mask(mask: Tensor | None, carries: bool, size: int, n: int) -> Tensor | None:
    """The mask of a folded batch of ``n``: it broadcasts to ``(N, H, L, S)`` from any rank."""
    if mask is None or (not carries and (mask.dim() < 4 or mask.shape[0] == 1)):
        return mask
    mask = with_batch(mask, carries, size)
    mask = mask.reshape(size, *[1] * (5 - mask.dim()), *mask.shape[1:])
    return mask.expand(size, n, *mask.shape[2:]).flatten(0, 1)


def unfolded(x: Any, size: int) -> Any:
    return x.unflatten(0, (size, -1)) if isinstance(x, Tensor) else x


def shared_value(x: Any, size: int) -> Any:
    """A value that all of the batch share, such as the state of the random generator, as a
    batch."""
    return x.expand(size, *x.shape) if isinstance(x, Tensor) else x


def first(x: Any, carries: bool) -> Any:
    """Undo :func:`shared_value`."""
    return x.select(0, 0) if carries else x


def same_dropout(dropout_p: float, randomness: str) -> None:
    if dropout_p and randomness == "same":
        raise NotImplementedError(
            "vmap of fused attention with dropout draws anew for each element: "
            'not randomness="same"'
        )


# ----- the kernels -------------------------------------------------------------------------------

cpu, cpu_backward = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


@vjp_of(cpu, diff_outputs=(0,))
def _(g, out, q, k, v, dropout_p, causal, mask, scale, *, needs):
    grads = cpu_backward(g[0], q, k, v, *out, dropout_p, causal, attn_mask=mask, scale=scale)
    of_mask = None
    if needs[3]:  # the kernel has none
        undropped(dropout_p)
        of_mask = cotangent(g[0], q, k, v, mask, causal, scale)[3]
    return *grads, of_mask


@jvp_of(cpu)
def _(tangents, out, q, k, v, dropout_p, causal, mask, scale):
    undropped(dropout_p)
    return tangent(tangents, q, k, v, mask, causal, scale), None


@vmap_of(cpu)
def _(q, k, v, dropout_p, causal, mask, scale, *, batched, size, randomness):
    same_dropout(dropout_p, randomness)
    q, k, v = (folded(x, b, size) for x, b in zip((q, k, v), batched, strict=False))
    mask = folded_mask(mask, batched[3], size, q.shape[0] // size)
    return tuple(
        unfolded(x, size) for x in cpu(q, k, v, dropout_p, causal, attn_mask=mask, scale=scale)
    )


@vjp_of(cpu_backward)
def _(cotangents, out, g, q, k, v, _o, _l, dropout_p, causal, mask, scale):
    undropped(dropout_p)
    *grads, of_mask = cotangent_of_cotangent((*cotangents, None), g, q, k, v, mask, causal, scale)
    return *grads, None, None, of_mask


@jvp_of(cpu_backward)
def _(tangents, out, g, q, k, v, _o, _l, dropout_p, causal, mask, scale):
    undropped(dropout_p)
    return tangent_of_cotangent((*tangents[:4], tangents[6]), g, q, k, v, mask, causal, scale)[:3]


@vmap_of(cpu_backward)
def _(g, q, k, v, out, lse, dropout_p, causal, mask, scale, *, batched, size):
    saved = [folded(x, b, size) for x, b in zip((g, q, k, v, out, lse), batched, strict=False)]
    mask = folded_mask(mask, batched[6], size, saved[1].shape[0] // size)
    return tuple(
        unfolded(x, size)
        for x in cpu_backward(*saved, dropout_p, causal, attn_mask=mask, scale=scale)
    )


flash, flash_backward = (
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_backward,
)


@vjp_of(flash, diff_outputs=(0,))
def _(g, out, q, k, v, dropout_p, causal, debug, scale):
    o, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = out
    saved = (o, lse, cum_q, cum_k, max_q, max_k, dropout_p, causal, seed, offset)
    return flash_backward(g[0], q, k, v, *saved, scale=scale)


@jvp_of(flash)
def _(tangents, out, q, k, v, dropout_p, causal, debug, scale):
    undropped(dropout_p)
    return tangent((*tangents, None), q, k, v, None, causal, scale), *[None] * 8


@vmap_of(flash)
def _(q, k, v, dropout_p, causal, debug, scale, *, batched, size, randomness):
    same_dropout(dropout_p, randomness)
    q, k, v = (folded(x, b, size) for x, b in zip((q, k, v), batched, strict=True))
    out, lse, *others = flash(q, k, v, dropout_p, causal, debug, scale=scale)
    return unfolded(out, size), unfolded(lse, size), *(shared_value(x, size) for x in others)


@vjp_of(flash_backward)
def _(
    cotangents,
    out,
    g,
    q,
    k,
    v,
    _o,
    _l,
    _cq,
    _ck,
    _mq,
    _mk,
    dropout_p,
    causal,
    _s,
    _f,
    scale,
    *,
    needs,
):
    undropped(dropout_p)
    grads = cotangent_of_cotangent((*cotangents, None), g, q, k, v, None, causal, scale)
    return *grads[:4], *[None] * (len(needs) - 4)


@jvp_of(flash_backward)
def _(tangents, out, g, q, k, v, _o, _l, _cq, _ck, _mq, _mk, dropout_p, causal, _s, _f, scale):
    undropped(dropout_p)
    return tangent_of_cotangent((*tangents[:4], None), g, q, k, v, None, causal, scale)[:3]


@vmap_of(flash_backward)
def _(
    g,
    q,
    k,
    v,
    out,
    lse,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    causal,
    seed,
    offset,
    scale,
    *,
    batched,
    size,
):
    saved = [folded(x, b, size) for x, b in zip((g, q, k, v, out, lse), batched, strict=False)]
    cum_q, cum_k, seed, offset = (
        first(x, b) for x, b in zip((cum_q, cum_k, seed, offset), batched[6:], strict=True)
    )
    grads = flash_backward(
        *saved, cum_q, cum_k, max_q, max_k, dropout_p, causal, seed, offset, scale=scale
    )
    return tuple(unfolded(x, size) for x in grads)


efficient = aten._scaled_dot_product_efficient_attention
efficient_backward = aten._scaled_dot_product_efficient_attention_backward


@vjp_of(efficient, diff_outputs=(0,))
def _(g, out, q, k, v, mask, with_lse, dropout_p, causal, scale, *, needs):
    if not with_lse:  # the forward op kept nothing for its backward op
        undropped(dropout_p)
        return cotangent(g[0], q, k, v, mask, causal, scale)
    which = [bool(n) for n in needs]
    return efficient_backward(g[0], q, k, v, mask, *out, dropout_p, which, causal, scale=scale)


@jvp_of(efficient)
def _(tangents, out, q, k, v, mask, with_lse, dropout_p, causal, scale):
    undropped(dropout_p)
    return tangent(tangents, q, k, v, mask, causal, scale), None, None, None


@vmap_of(efficient)
def _(q, k, v, mask, with_lse, dropout_p, causal, scale, *, batched, size, randomness):
    same_dropout(dropout_p, randomness)
    q, k, v = (folded(x, b, size) for x, b in zip((q, k, v), batched, strict=False))
    mask = folded_mask(mask, batched[3], size, q.shape[0] // size)
    out, lse, *state = efficient(q, k, v, mask, with_lse, dropout_p, causal, scale=scale)
    return unfolded(out, size), unfolded(lse, size), *(shared_value(x, size) for x in state)


@vjp_of(efficient_backward)
def _(cotangents, out, g, q, k, v, mask, _o, _l, _s, _f, dropout_p, which, causal, scale):
    undropped(dropout_p)
    return *cotangent_of_cotangent(cotangents, g, q, k, v, mask, causal, scale), *[None] * 4


@jvp_of(efficient_backward)
def _(tangents, out, g, q, k, v, mask, _o, _l, _s, _f, dropout_p, which, causal, scale):
    undropped(dropout_p)
    *grads, of_scores = tangent_of_cotangent(tangents[:5], g, q, k, v, mask, causal, scale)
    return *grads, of_scores.sum_to_size(mask.shape) if which[
        3
    ] and of_scores is not None else None


@vmap_of(efficient_backward)
def _(g, q, k, v, mask, out, lse, seed, offset, dropout_p, which, causal, scale, *, batched, size):
    saved = [folded(x, b, size) for x, b in zip((g, q, k, v), batched, strict=False)]
    kept = [folded(x, b, size) for x, b in zip((out, lse), batched[5:], strict=False)]
    n = saved[1].shape[0] // size
    whole = folded_mask(mask, batched[4], size, n)
    if which[3]:  # each element's own gradient, of its own mask
        whole = with_batch(mask, batched[4], size)
        whole = whole.reshape(size, *[1] * (5 - whole.dim()), *whole.shape[1:])
        whole = whole.expand(size, n, *saved[1].shape[1:3], saved[2].shape[2]).flatten(0, 1)
    state = (first(x, b) for x, b in zip((seed, offset), batched[7:], strict=True))
    grads = efficient_backward(*saved, whole, *kept, *state, dropout_p, which, causal, scale=scale)
    *grads, of_mask = (unfolded(x, size) for x in grads)
    if which[3]:
        shape = mask.shape[1:] if batched[4] else mask.shape
        of_mask = of_mask.reshape(size, *of_mask.shape[1:]).sum_to_size(
            size, *[1] * (4 - len(shape)), *shape
        )
        of_mask = of_mask.reshape(size, *shape)
    return *grads, of_mask


cudnn, cudnn_backward = (
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_cudnn_attention_backward,
)


@vjp_of(cudnn, diff_outputs=(0,))
def _(g, out, q, k, v, mask, with_lse, dropout_p, causal, debug, scale, *, needs):
    if (
        not with_lse or needs[3]
    ):  # the forward op kept nothing for its backward op, which has no gradient of the mask
        undropped(dropout_p)
        return cotangent(g[0], q, k, v, mask, causal, scale)
    o, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = out
    saved = (o, lse, seed, offset, mask, cum_q, cum_k, max_q, max_k, dropout_p, causal)
    return *cudnn_backward(g[0], q, k, v, *saved, scale=scale), None


@jvp_of(cudnn)
def _(tangents, out, q, k, v, mask, with_lse, dropout_p, causal, debug, scale):
    undropped(dropout_p)
    return tangent(tangents, q, k, v, mask, causal, scale), *[None] * 8


@vmap_of(cudnn)
def _(q, k, v, mask, with_lse, dropout_p, causal, debug, scale, *, batched, size, randomness):
    same_dropout(dropout_p, randomness)
    q, k, v = (folded(x, b, size) for x, b in zip((q, k, v), batched, strict=False))
    mask = folded_mask(mask, batched[3], size, q.shape[0] // size)
    out, lse, *others = cudnn(q, k, v, mask, with_lse, dropout_p, causal, debug, scale=scale)
    return unfolded(out, size), unfolded(lse, size), *(shared_value(x, size) for x in others)


@vjp_of(cudnn_backward)
def _(
    cotangents, out, g, q, k, v, _o, _l, _s, _f, mask, _cq, _ck, _mq, _mk, dropout_p, causal, scale
):
    undropped(dropout_p)
    *grads, of_mask = cotangent_of_cotangent((*cotangents, None), g, q, k, v, mask, causal, scale)
    return *grads, *[None] * 4, of_mask, None, None


@jvp_of(cudnn_backward)
def _(
    tangents, out, g, q, k, v, _o, _l, _s, _f, mask, _cq, _ck, _mq, _mk, dropout_p, causal, scale
):
    undropped(dropout_p)
    return tangent_of_cotangent((*tangents[:4], tangents[8]), g, q, k, v, mask, causal, scale)[:3]


@vmap_of(cudnn_backward)
def _(
    g,
    q,
    k,
    v,
    out,
    lse,
    seed,
    offset,
    mask,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    causal,
    scale,
    *,
    batched,
    size,
):
    saved = [folded(x, b, size) for x, b in zip((g, q, k, v, out, lse), batched, strict=False)]
    seed, offset, cum_q, cum_k = (
        first(x, batched[i]) for x, i in ((seed, 6), (offset, 7), (cum_q, 9), (cum_k, 10))
    )
    mask = folded_mask(mask, batched[8], size, saved[1].shape[0] // size)
    shared = (seed, offset, mask, cum_q, cum_k, max_q, max_k, dropout_p, causal)
    return tuple(unfolded(x, size) for x in cudnn_backward(*saved, *shared, scale=scale))

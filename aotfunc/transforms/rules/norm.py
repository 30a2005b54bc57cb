"""Rules of batch, layer, group and root-mean-square norm, by ``normalized.py``'s formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from .batching import align, all_batched, along_channels, into, out_of, with_batch
from .normalized import (
    NormLayout,
    backward_cotangent,
    backward_tangent,
    forward_tangent,
    of_statistics,
    summed_over,
)
from .schema import aten, call_op, overload, overloads_named
from .table import jvp_of, total, vjp_of, vmap_of, wrong_in_autograd


def itself(x: Tensor) -> Tensor:
    return x


# ----- batch norm --------------------------------------------------------------------------------


def channels_layout(x: Tensor, training: bool) -> NormLayout:
    others = [0, *range(2, x.dim())]
    shape = [1, x.shape[1], *[1] * (x.dim() - 2)]

    def broadcast(v: Tensor) -> Tensor:
        return v.reshape(shape)

    return NormLayout(
        others if training else [], others, x.shape[1:2], itself, itself, broadcast, broadcast
    )


def batch_norm(op: OpOverload | OpOverloadPacket, arguments: str) -> None:
    """Register a variant of batch norm; ``arguments`` are the names of its arguments after ``x
    weight bias``.

    The outputs are ``(out, mean, rstd)`` and in some the new running statistics, which carry no
    derivative."""
    names = arguments.split()

    def known(rest: Sequence[Any]) -> tuple[Any, Any, bool, float]:
        given = dict(zip(names, rest, strict=True))
        return given.get("mean"), given.get("var"), given.get("training", False), given["eps"]

    @vjp_of(op, diff_outputs=(0, 1, 2))
    def _(g, out, x, weight, bias, *rest, needs):
        mean, var, training, eps = known(rest)
        by_mean = (
            of_statistics(channels_layout(x, training), g[1], g[2], x, out[1], out[2])
            if needs[0]
            else None
        )
        grads = (None, None, None)
        if g[0] is not None:
            mask = [bool(n) for n in needs[:3]]
            # in training they are not read, and must not be kept: the forward writes to them
            stats = (None, None) if training else (mean, var)
            grads = aten.native_batch_norm_backward(
                g[0], x, weight, *stats, out[1], out[2], training, eps, mask
            )
        of_x = total(grads[0], by_mean)
        return [of_x, *grads[1:], *[None] * (len(needs) - 3)]

    @jvp_of(op)
    def _(tangents, out, x, weight, bias, *rest):
        mean, var, training, eps = known(rest)
        saved = (out[1], out[2]) if training else (mean, (var + eps).rsqrt())
        moved = forward_tangent(channels_layout(x, training), tangents[:3], x, weight, *saved)
        return (*(moved if training else (moved[0], None, None)), *[None] * (len(out) - 3))

    @vmap_of(op)
    def _(x, weight, bias, *rest, batched, size, shape):
        _, _, training, _ = known(rest)
        rest = list(rest)
        stats = [i for i, name in enumerate(names) if name in ("mean", "var")]
        if not training and batched[0] and not any(batched[1:]):
            out, _, _, *others = call_op(overload(op), [x.flatten(0, 1), weight, bias, *rest])
            out, alone = (
                out.unflatten(0, (size, -1)),
                (x.new_zeros(shape[1]), x.new_zeros(shape[2]), *others),
            )
            return (out, *(t.expand(size, *t.shape) for t in alone))
        x, *vectors = (
            None if t is None else into(with_batch(t, b, size), d)
            for t, b, d in zip(
                (x, weight, bias, *(rest[i] for i in stats)),
                batched,
                (1, 0, 0, 0, 0),
                strict=False,
            )
        )
        for i, v in zip(stats, vectors[2:], strict=True):
            rest[i] = v
        out, *vectors = call_op(overload(op), [x, *vectors[:2], *rest])
        # no rule reads the statistics, and some kernels return none
        if not training:
            vectors = [x.new_zeros(size, *s) for s in shape[1:3]] + [
                out_of(v, 0, size) for v in vectors[2:]
            ]
            return (out_of(out, 1, size), *vectors)
        return (
            out_of(out, 1, size),
            *(v.expand(size, 0) if v.numel() == 0 else out_of(v, 0, size) for v in vectors),
        )


batch_norm(aten.native_batch_norm, "mean var training momentum eps")
batch_norm(aten._native_batch_norm_legit, "mean var training momentum eps")
batch_norm(aten._native_batch_norm_legit_functional, "mean var training momentum eps")
batch_norm(aten._native_batch_norm_legit_no_training, "mean var momentum eps")
batch_norm(aten._native_batch_norm_legit.no_stats, "training momentum eps")


@vjp_of(aten.native_batch_norm_backward)
def _(
    cotangents, out, g, x, weight, mean, var, save_mean, save_rstd, training, eps, mask, *, needs
):
    saved = (save_mean, save_rstd) if training else (mean, (var + eps).rsqrt())
    at = channels_layout(x, training)
    return [
        *backward_cotangent(at, cotangents, g, x, weight, *saved, needs),
        None,
        None,
        None,
        None,
    ]


@jvp_of(aten.native_batch_norm_backward)
def _(tangents, out, g, x, weight, mean, var, save_mean, save_rstd, training, eps, mask):
    saved = (save_mean, save_rstd) if training else (mean, (var + eps).rsqrt())
    return backward_tangent(channels_layout(x, training), tangents[:3], mask, g, x, weight, *saved)


@vmap_of(aten.native_batch_norm_backward)
def _(g, x, *rest, batched, size):
    *vectors, training, eps, mask = rest
    g, x = (into(t, 1) for t in all_batched((g, x), batched, size))
    vectors = all_batched(vectors, batched[2:], size)
    vectors = [None if v is None else into(v, 0) for v in vectors]
    of_x, *others = aten.native_batch_norm_backward(g, x, *vectors, training, eps, mask)
    of_x = None if of_x is None else out_of(of_x, 1, size)
    return (of_x, *(None if v is None else out_of(v, 0, size) for v in others))


# ----- layer norm --------------------------------------------------------------------------------


def trailing_layout(x: Tensor, shape: Sequence[int], centred: bool = True) -> NormLayout:
    over = [d - len(shape) for d in range(len(shape))]
    return NormLayout(
        over, list(range(x.dim() - len(shape))), shape, itself, itself, itself, itself, centred
    )


@vjp_of(aten.native_layer_norm)
def _(g, out, x, shape, weight, bias, *, needs):
    by_mean = (
        of_statistics(trailing_layout(x, shape), g[1], g[2], x, out[1], out[2])
        if needs[0]
        else None
    )
    grads = (None, None, None)
    if g[0] is not None:
        mask = [bool(n) for n in needs]
        grads = aten.native_layer_norm_backward(g[0], x, shape, out[1], out[2], weight, bias, mask)
    return total(grads[0], by_mean), *grads[1:]


@jvp_of(aten.native_layer_norm)
def _(tangents, out, x, shape, weight, bias):
    return forward_tangent(trailing_layout(x, shape), tangents, x, weight, out[1], out[2])


@vmap_of(aten.native_layer_norm)
def _(x, shape, weight, bias, eps, *, batched, size):
    x = with_batch(x, batched[0], size)
    if not any(batched[1:]):
        return aten.native_layer_norm(x, shape, weight, bias, eps)
    out, mean, rstd = aten.native_layer_norm(x, shape, None, None, eps)
    if weight is not None:
        out = out * (align(weight, x.dim() - 1) if batched[1] else weight)
    if bias is not None:
        out = out + (align(bias, x.dim() - 1) if batched[2] else bias)
    return out, mean, rstd


@vjp_of(aten.native_layer_norm_backward)
def _(cotangents, out, g, x, shape, mean, rstd, weight, bias, *, needs):
    which = needs[0], needs[1], needs[4]
    of_g, of_x, of_w = backward_cotangent(
        trailing_layout(x, shape), cotangents, g, x, weight, mean, rstd, which
    )
    return of_g, of_x, None, None, of_w, None


@jvp_of(aten.native_layer_norm_backward)
def _(tangents, out, g, x, shape, mean, rstd, weight, bias, mask):
    tg, tx, _, _, tw, _ = tangents
    return backward_tangent(
        trailing_layout(x, shape), (tg, tx, tw), mask, g, x, weight, mean, rstd
    )


@vmap_of(aten.native_layer_norm_backward)
def _(g, x, shape, mean, rstd, weight, bias, mask, *, batched, size):
    g, x, mean, rstd = all_batched((g, x, mean, rstd), batched, size)
    of_x = of_w = of_b = None
    if mask[0]:
        apart = batched[4]
        gh, w = (g * align(weight, x.dim() - 1), None) if apart else (g, weight)
        of_x = aten.native_layer_norm_backward(
            gh, x, shape, mean, rstd, w, None, [True, False, False]
        )[0]
    shared = list(range(1, x.dim() - len(shape)))
    if mask[1]:
        each = g * ((x - mean) * rstd)
        of_w = each.sum(shared) if shared else each
    if mask[2]:
        of_b = g.sum(shared) if shared else g
    return of_x, of_w, of_b


# ----- root-mean-square norm ---------------------------------------------------------------------


@vjp_of(aten._fused_rms_norm)
def _(g, out, x, shape, weight, *, needs):
    by_rstd = (
        of_statistics(trailing_layout(x, shape, False), None, g[1], x, None, out[1])
        if needs[0]
        else None
    )
    grads = (None, None)
    if g[0] is not None:
        grads = aten._fused_rms_norm_backward(
            g[0], x, shape, out[1], weight, [bool(n) for n in needs]
        )
    return total(grads[0], by_rstd), grads[1]


@jvp_of(aten._fused_rms_norm)
def _(tangents, out, x, shape, weight):
    at = trailing_layout(x, shape, False)
    moved, _, of_rstd = forward_tangent(at, (*tangents, None), x, weight, None, out[1])
    return moved, of_rstd


@vmap_of(aten._fused_rms_norm)
def _(x, shape, weight, eps, *, batched, size):
    x = with_batch(x, batched[0], size)
    if not batched[1]:
        return aten._fused_rms_norm(x, shape, weight, eps)
    out, rstd = aten._fused_rms_norm(x, shape, None, eps)
    return out * align(weight, x.dim() - 1), rstd


@vjp_of(aten._fused_rms_norm_backward)
def _(cotangents, out, g, x, shape, rstd, weight, *, needs):
    at, which = trailing_layout(x, shape, False), (needs[0], needs[1], needs[3])
    of_g, of_x, of_w = backward_cotangent(at, (*cotangents, None), g, x, weight, None, rstd, which)
    return of_g, of_x, None, of_w


@jvp_of(aten._fused_rms_norm_backward)
def _(tangents, out, g, x, shape, rstd, weight, mask):
    tg, tx, _, tw = tangents
    return backward_tangent(
        trailing_layout(x, shape, False), (tg, tx, tw), mask, g, x, weight, None, rstd
    )[:2]


@vmap_of(aten._fused_rms_norm_backward)
def _(g, x, shape, rstd, weight, mask, *, batched, size):
    g, x, rstd = all_batched((g, x, rstd), batched, size)
    of_x = of_w = None
    if mask[0]:
        gh, w = (g * align(weight, x.dim() - 1), None) if batched[3] else (g, weight)
        of_x = aten._fused_rms_norm_backward(gh, x, shape, rstd, w, [True, False])[0]
    if mask[1]:
        shared = list(range(1, x.dim() - len(shape)))
        each = g * (x * rstd)
        of_w = each.sum(shared) if shared else each
    return of_x, of_w


# ----- group norm --------------------------------------------------------------------------------


def groups_layout(x: Tensor, n: int, c: int, pixels: int, groups: int) -> NormLayout:
    return NormLayout(
        over=[2, 3],
        shared=[0, 3],
        shape=[c],
        image=lambda v: v.reshape(n, groups, c // groups, pixels),
        back=lambda v: v.reshape(x.shape),
        affine=lambda v: v.reshape(1, groups, c // groups, 1),
        stat=lambda v: v.reshape(n, groups, 1, 1),
    )


@vjp_of(aten.native_group_norm)
def _(g, out, x, weight, bias, n, c, pixels, groups, *, needs):
    at = groups_layout(x, n, c, pixels, groups)
    by_mean = of_statistics(at, g[1], g[2], x, out[1], out[2]) if needs[0] else None
    grads = (None, None, None)
    if g[0] is not None:
        mask = [bool(needs[0]), bool(needs[1]), bool(needs[2]) and weight is not None]
        grads = aten.native_group_norm_backward(
            g[0], x, out[1], out[2], weight, n, c, pixels, groups, mask
        )
        if needs[2] and weight is None:  # the kernel does not take this case
            grads = (*grads[:2], summed_over(at.image(g[0]), at))
    return total(grads[0], by_mean), *grads[1:]


@jvp_of(aten.native_group_norm)
def _(tangents, out, x, weight, bias, n, c, pixels, groups):
    return forward_tangent(
        groups_layout(x, n, c, pixels, groups), tangents, x, weight, out[1], out[2]
    )


@vmap_of(aten.native_group_norm)
def _(x, weight, bias, n, c, pixels, groups, eps, *, batched, size):
    x = with_batch(x, batched[0], size).flatten(0, 1)
    apart = any(batched[1:])
    affine = (None, None) if apart else (weight, bias)
    outs = aten.native_group_norm(x, *affine, n * size, c, pixels, groups, eps)
    out, mean, rstd = (t.unflatten(0, (size, -1)) for t in outs)
    if apart and weight is not None:
        out = out * along_channels(weight, x.dim() - 2)
    if apart and bias is not None:
        out = out + along_channels(bias, x.dim() - 2)
    return out, mean, rstd


@vjp_of(aten.native_group_norm_backward)
def _(cotangents, out, g, x, mean, rstd, weight, n, c, pixels, groups, *, needs):
    at, which = groups_layout(x, n, c, pixels, groups), (needs[0], needs[1], needs[4])
    of_g, of_x, of_w = backward_cotangent(at, cotangents, g, x, weight, mean, rstd, which)
    return of_g, of_x, None, None, of_w


@jvp_of(aten.native_group_norm_backward)
def _(tangents, out, g, x, mean, rstd, weight, n, c, pixels, groups, mask):
    tg, tx, _, _, tw = tangents
    at = groups_layout(x, n, c, pixels, groups)
    return backward_tangent(at, (tg, tx, tw), mask, g, x, weight, mean, rstd)


@vmap_of(aten.native_group_norm_backward)
def _(g, x, mean, rstd, weight, n, c, pixels, groups, mask, *, batched, size):
    g, x, mean, rstd = all_batched((g, x, mean, rstd), batched, size)
    of_x = of_w = of_b = None
    if mask[0]:
        gh, w = (g * along_channels(weight, g.dim() - 3), None) if batched[4] else (g, weight)
        flat = [t.flatten(0, 1) for t in (gh, x, mean, rstd)]
        flat = aten.native_group_norm_backward(
            *flat, w, n * size, c, pixels, groups, [True, False, False]
        )[0]
        of_x = flat.unflatten(0, (size, -1))
    if mask[1]:
        at = groups_layout(x, n * size, c, pixels, groups)
        each = (at.image(g) * at.hat(x, mean, rstd)).reshape(size, n, c, pixels)
        of_w = each.sum([1, 3])
    if mask[2]:
        of_b = g.reshape(size, n, c, pixels).sum([1, 3])
    return of_x, of_w, of_b


# ----- mean and deviation ------------------------------------------------------------------------

wrong_in_autograd(
    "statistics",
    *overloads_named(
        *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "_weight_norm_interface"),
        *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"),
        *("_native_batch_norm_legit", "_native_batch_norm_legit.no_stats"),
        *("_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training"),
        *("_batch_norm_with_update", "_batch_norm_with_update_functional"),
        "_batch_norm_no_update",
    ),
)

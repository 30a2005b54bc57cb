"""Rules of the softmax family and of the losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from .batching import align, all_batched, past_batch, with_batch
from .schema import Formula, aten, call_op, overload, tensor_args
from .table import along_dims, broadcast_shapes, jvp_of, linear, vjp_of, vmap_of

# ----- softmax -----------------------------------------------------------------------------------


def along_dim(op: OpOverload | OpOverloadPacket) -> Formula:
    """Return the vmap rule of an op with a ``dim`` on tensors, one or more, of one shape."""
    op = overload(op)
    dim_at = [a.name for a in op._schema.arguments].index("dim")

    def batch(*args: Any, batched: tuple[bool, ...], size: int) -> Tensor:
        full = list(args)
        for i, b in zip(tensor_args(op), batched, strict=True):
            x = with_batch(args[i], b, size)
            full[i] = x.unsqueeze(1) if x.dim() == 1 else x
            full[dim_at] = past_batch(args[dim_at], max(x.dim() - 1, 1))
        out = call_op(op, full)
        return out.squeeze(1) if x.dim() == 1 else out

    return batch


for op in (aten._softmax, aten._log_softmax, aten._safe_softmax):
    vmap_of(op)(along_dim(op))
    along_dims(op)
for op in (aten._softmax_backward_data, aten._log_softmax_backward_data):
    vmap_of(op)(along_dim(op))


@vjp_of(aten._softmax)
def _(g, out, x, dim):
    return [aten._softmax_backward_data(g, out, dim, x.dtype)]


@jvp_of(aten._softmax, aten._safe_softmax)
def _(tangents, out, x, dim):
    # the Jacobian is symmetric
    return aten._softmax_backward_data(tangents[0].to(out.dtype), out, dim, out.dtype)


@vjp_of(aten._safe_softmax)
def _(g, out, x, dim):
    return [aten._softmax_backward_data(g, out, dim, out.dtype)]


@vjp_of(aten._softmax_backward_data)
def _(a, out, g, p, dim, *, needs):
    of_g = of_p = None
    if needs[0]:
        of_g = aten._softmax_backward_data(a, p, dim, g.dtype)
    if needs[1]:
        of_p = a * (g - (g * p).sum(dim, keepdim=True)) - g * (a * p).sum(dim, keepdim=True)
    return of_g, of_p


@vjp_of(aten._log_softmax)
def _(g, out, x, dim):
    return [aten._log_softmax_backward_data(g, out, dim, x.dtype)]


@jvp_of(aten._log_softmax)
def _(tangents, out, x, dim):
    return tangents[0] - (out.exp() * tangents[0]).sum(dim, keepdim=True)


@vjp_of(aten._log_softmax_backward_data)
def _(a, out, g, logp, dim, *, needs):
    weighted = a * logp.exp()
    of_g = a - weighted.sum(dim, keepdim=True) if needs[0] else None
    return of_g, -weighted * g.sum(dim, keepdim=True) if needs[1] else None


# ----- losses that act on each element -----------------------------------------------------------

NONE, MEAN, SUM = 0, 1, 2  # values of the argument `reduction`


def reduce(loss: Tensor, reduction: int, kept: int = 0) -> Tensor:
    """Return ``loss`` reduced over all but its first ``kept`` dimensions."""
    if reduction == NONE or loss.dim() == kept:
        return loss
    dims = list(range(kept, loss.dim()))
    return loss.mean(dims) if reduction == MEAN else loss.sum(dims)


def per_element(g: Tensor, reduction: int, count: int) -> Tensor:
    """Return each element's cotangent, to broadcast, from that of ``count`` reduced ones."""
    return g / count if reduction == MEAN else g


def expanded_args(
    op: OpOverload, args: Sequence[Any], batched: Sequence[bool], size: int, skip: int = 0
) -> tuple[list[Any], torch.Size]:
    """Return the arguments with all tensors expanded to one shape behind the batch, which no
    kernel does, and that shape.

    The first ``skip`` tensors are expanded with the others but do not count for the shape."""
    full = list(args)
    given = [
        (i, args[i], b)
        for i, b in zip(tensor_args(op), batched, strict=True)
        if args[i] is not None
    ]
    shape = broadcast_shapes(*(x.shape[1:] if b else x.shape for _, x, b in given[skip:]))
    for i, x, b in given:
        if b:
            x = align(x, len(shape))
        full[i] = x.expand(size, *shape)
    return full, shape


def batch_loss(op: OpOverload | OpOverloadPacket, at: int) -> Formula:
    """Return the vmap rule of an elementwise loss: reduce, as argument ``at`` says, samples."""
    op = overload(op)

    def batch(*args: Any, batched: tuple[bool, ...], size: int) -> Tensor:
        full, _ = expanded_args(op, args, batched, size)
        full[at] = NONE
        return reduce(call_op(op, full), args[at], kept=1)

    return batch


def batch_loss_backward(op: OpOverload | OpOverloadPacket, at: int) -> Formula:
    """Return the vmap rule of the backward op of an elementwise loss."""
    op = overload(op)

    def batch(*args: Any, batched: tuple[bool, ...], size: int) -> Tensor:
        full, shape = expanded_args(op, args, batched, size, skip=1)
        full[0], full[at] = per_element(full[0], args[at], shape.numel()), NONE
        return call_op(op, full)

    return batch


def elementwise_loss(
    op: OpOverloadPacket,
    backward: OpOverloadPacket,
    of_target: Callable[..., Tensor],
    curvature: Callable[..., tuple[Tensor | float, Tensor | float]],
) -> None:
    """Register a loss ``(x, y, ..., reduction, ...)`` and its backward op, which takes the
    cotangent before these.

    ``of_target(gx, g, x, y, *weight)`` is the cotangent of ``y``; ``gx`` is that of ``x`` and
    ``g`` that of each element's loss. ``curvature(x, y, *rest)`` are the second derivatives ``(by
    x and x, by x and y)``."""
    at = [a.name for a in overload(op)._schema.arguments].index("reduction")
    vmap_of(op)(batch_loss(op, at))
    vmap_of(backward)(batch_loss_backward(backward, at + 1))

    @vjp_of(op)
    def _(g, out, *args, needs):
        unweighted(needs[2:], op)
        x, y, *weight = args[:at]
        gx = backward(g, *args)
        count = broadcast_shapes(x.shape, y.shape).numel()
        gy = of_target(gx, per_element(g, args[at], count), x, y, *weight) if needs[1] else None
        return gx, gy, *[None] * len(weight)

    @vjp_of(backward)
    def _(a, out, g, *args, needs):
        unweighted(needs[3:], op)
        x, y, *rest = args
        reduction = args[at]
        of_g = (
            reduce(backward(a, *args[:at], NONE, *args[at + 1 :]), reduction) if needs[0] else None
        )
        of_x = of_y = None
        if needs[1] or needs[2]:
            xx, xy = curvature(x, y, *rest)
            ag = a * per_element(g, reduction, a.numel())
            of_x, of_y = ag * xx if needs[1] else None, ag * xy if needs[2] else None
        return of_g, of_x, of_y, *[None] * len(needs[3:])


def unweighted(needs: tuple[bool, ...], op: OpOverloadPacket) -> None:
    """Refuse a derivative that is not written."""
    if any(needs):
        raise NotImplementedError(
            f"{op} has no derivative with respect to its weight; detach the weight"
        )


def opposite(gx: Tensor, *rest: Any) -> Tensor:
    """Return the target's cotangent where the loss depends on the difference only."""
    return -gx


def smooth_l1_curvature(x, y, reduction, beta):
    inside = ((x - y).abs() < beta).to(x.dtype) / beta if beta > 0 else 0.0
    return inside, -inside


def huber_curvature(x, y, reduction, delta):
    inside = ((x - y).abs() < delta).to(x.dtype)
    return inside, -inside


def soft_margin_curvature(x, y, reduction):
    p = torch.sigmoid(-x * y)
    return y * y * p * (1 - p), p * (x * y * (1 - p) - 1)


def cross_entropy_curvature(x, y, weight, reduction):
    q = (x * (1 - x)).clamp_min(1e-12)
    xx, xy = (1 - (x - y) * (1 - 2 * x) / q) / q, -1 / q
    return (xx, xy) if weight is None else (weight * xx, weight * xy)


def cross_entropy_target(gx, g, x, y, weight):
    loss = torch.log1p(-x).clamp_min(-100) - x.log().clamp_min(-100)
    return g * loss if weight is None else g * loss * weight


def soft_margin_target(gx, g, x, y):
    return aten.soft_margin_loss_backward(g.expand(x.shape), y, x, NONE)  # the loss is symmetric


elementwise_loss(
    aten.mse_loss, aten.mse_loss_backward, opposite, lambda x, y, reduction: (2.0, -2.0)
)
elementwise_loss(aten.smooth_l1_loss, aten.smooth_l1_loss_backward, opposite, smooth_l1_curvature)
elementwise_loss(aten.huber_loss, aten.huber_loss_backward, opposite, huber_curvature)
elementwise_loss(
    aten.soft_margin_loss,
    aten.soft_margin_loss_backward,
    soft_margin_target,
    soft_margin_curvature,
)
elementwise_loss(
    aten.binary_cross_entropy,
    aten.binary_cross_entropy_backward,
    cross_entropy_target,
    cross_entropy_curvature,
)

vmap_of(aten.binary_cross_entropy_with_logits)(
    batch_loss(aten.binary_cross_entropy_with_logits, 4)
)


@vjp_of(aten.binary_cross_entropy_with_logits)
def _(g, out, x, y, weight, pos_weight, reduction, *, needs):
    shape = broadcast_shapes(*(t.shape for t in (x, y, weight, pos_weight) if t is not None))
    raw = per_element(g, reduction, shape.numel()).expand(shape)
    g = raw if weight is None else raw * weight
    of_x = of_y = of_weight = of_pos = None
    if needs[0]:
        p = torch.sigmoid(x)
        of_x = g * (p - y if pos_weight is None else (1 - y) * p - pos_weight * y * (1 - p))
    if needs[1]:
        of_y = g * (-x if pos_weight is None else F.softplus(-x) * (pos_weight - 1) - x)
    if needs[2]:
        of_weight = raw * aten.binary_cross_entropy_with_logits(x, y, None, pos_weight, NONE)
    if needs[3]:
        of_pos = g * y * F.softplus(-x)
    return of_x, of_y, of_weight, of_pos


# ----- negative log-likelihood -------------------------------------------------------------------
#
# x is (C,) or (N, C) or (N, C, H, W), the target the same without C. A batch is folded into N
# for the loss of each element, which is then reduced by hand with the weights of the targets.


def picked_weights(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore: int, weight_batched: bool
) -> Tensor:
    """Return the weight of each target, zero for those to be ignored."""
    counts = target != ignore
    if weight is None:
        return counts.to(x.dtype)
    known = target.masked_fill(~counts, 0).reshape(target.shape[0], -1)
    each = weight.gather(1, known) if weight_batched else weight[known]
    return each.reshape(target.shape) * counts


def nll(op: OpOverloadPacket, backward: OpOverloadPacket) -> None:
    """Register a negative log-likelihood, ``(loss, total_weight)``, and its backward op."""

    @vjp_of(op, diff_outputs=(0,))
    def _(g, out, x, target, weight, reduction, ignore, *, needs):
        unweighted(needs[2:], op)
        x = x.contiguous()  # the kernel for images takes no other layout
        return backward(g[0], x, target, weight, reduction, ignore, out[1]), None, None

    @jvp_of(op)
    def _(tangents, out, x, target, weight, reduction, ignore):
        unweighted((tangents[2] is not None,), op)
        return op(tangents[0], target, weight, reduction, ignore)[0], None

    @vmap_of(op)
    def _(x, target, weight, reduction, ignore, *, batched, size):
        x, target = with_batch(x, batched[0], size), with_batch(target, batched[1], size)
        flat = (x.flatten(0, 1), target.flatten(0, 1)) if x.dim() > 2 else (x, target)
        loss, none = op(*flat, None if batched[2] else weight, NONE, ignore)
        loss = loss.reshape(target.shape)
        each = picked_weights(x, target, weight, ignore, batched[2])
        loss = loss * each if batched[2] else loss
        if reduction == NONE and x.dim() > 2:
            return loss, none.expand(size)
        loss, total_weight = reduce(loss, SUM, kept=1), reduce(each, SUM, kept=1)
        return loss / total_weight if reduction == MEAN else loss, total_weight

    def transpose(a, g, x, target, weight, reduction, ignore, total_weight):
        return op(a, target, weight, reduction, ignore)[0]

    linear(backward, transpose, None, None, None, None)

    @vmap_of(backward)
    def _(g, x, target, weight, reduction, ignore, total_weight, *, batched, size):
        g, x, target = all_batched((g, x, target), batched, size)
        if reduction == MEAN:
            g = g / total_weight
        if reduction != NONE:
            g = g.reshape(size, *[1] * (target.dim() - 1)).expand(target.shape)
        if batched[3]:
            g, weight = g * picked_weights(x, target, weight, ignore, True), None
        flat = (
            [t.flatten(0, 1).contiguous() for t in (g, x, target)]
            if x.dim() > 2
            else [g, x, target]
        )
        # This kernel does not check targets before it writes; the forward kernel does.
        none = op(*flat[1:], weight, NONE, ignore)[1]
        return backward(*flat, weight, NONE, ignore, none).reshape(x.shape)


nll(aten.nll_loss_forward, aten.nll_loss_backward)
nll(aten.nll_loss2d_forward, aten.nll_loss2d_backward)

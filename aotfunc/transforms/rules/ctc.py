"""The connectionist temporal classification loss: a form that can be recorded, its gradient, and
its batch, which is folded into ``N``.

Log-probabilities are ``(T, N, C)``, targets ``(N, S)`` or all of them in one vector. The reverse
kernel reads a buffer of the forward kernel, whose shape depends on the longest target. The rule
computes it again from the folded arguments, and the graph merges that with the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batching import all_batched, into, with_batch
from .schema import aten
from .table import vjp_of, vmap_of


def recordable(
    ctc_loss, log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity
) -> Tensor:
    """Return ``F.ctc_loss`` with buffers of a known size: append one dummy example whose target
    has maximal length. (C++ fills a tensor of lengths, and makes a buffer as long as the longest,
    which a recording cannot see.)"""

    def each(*args: Any) -> Tensor:
        return ctc_loss(*args, blank, "none", zero_infinity)

    if (
        isinstance(target_lengths, Tensor)
        and isinstance(input_lengths, Tensor)
        and targets.numel()
    ):
        loss = among_longest(
            each, log_probs, targets, input_lengths, target_lengths, int(blank == 0)
        )
    else:
        loss = each(log_probs, targets, input_lengths, target_lengths)
    if reduction == "mean":
        many = (
            target_lengths if isinstance(target_lengths, Tensor) else torch.tensor(target_lengths)
        )
        return (loss / many.to(loss).clamp_min(1)).mean()
    return loss.sum() if reduction == "sum" else loss


def target_rows(targets: Tensor, lengths: Tensor) -> Tensor:
    """Return targets as ``(N, S)``. Rows of targets in one vector run on into the next ones."""
    if targets.dim() == 2:
        return targets
    begin = (lengths.cumsum(0) - lengths).unsqueeze(1)
    at = begin + torch.arange(targets.shape[0], device=targets.device)
    return targets[at.clamp_max(targets.shape[0] - 1)]


def among_longest(
    each: Callable[..., Tensor],
    log_probs: Tensor,
    targets: Tensor,
    of_input: Tensor,
    of_target: Tensor,
    label: int,
) -> Tensor:
    """Return the losses of a call with one more example of maximal length, of ``label``."""
    single = log_probs.dim() == 2
    if single:
        log_probs, targets = log_probs.unsqueeze(1), targets.reshape(1, -1)
    lengths = (of_input.reshape(-1), of_target.reshape(-1))
    targets = target_rows(targets, lengths[1].to(targets.device))
    (steps, n, _), most = log_probs.shape, targets.shape[1]
    longest = [
        aten.constant_pad_nd(x, (0, 1), m) for x, m in zip(lengths, (steps, most), strict=True)
    ]
    log_probs = aten.constant_pad_nd(log_probs, (0, 0, 0, 1))
    loss = each(log_probs, aten.constant_pad_nd(targets, (0, 0, 0, 1), label), *longest)
    return loss[0] if single else loss[:n]


def folded(
    log_probs: Tensor, targets: Tensor, lengths: tuple, batched: tuple[bool, ...], size: Any
) -> tuple[Tensor, Tensor, Any, Any]:
    """Return the arguments with the batch in front of ``N``; lengths may be lists."""
    log_probs, targets = all_batched((log_probs, targets), batched, size)
    if isinstance(lengths[0], Tensor):
        of_input, of_target = (n.flatten() for n in all_batched(lengths, batched[2:], size))
    else:
        of_input, of_target = (list(n) * size for n in lengths)
    return into(log_probs, 1), targets.flatten(0, 1), of_input, of_target


@vjp_of(aten._ctc_loss.default, aten._ctc_loss.Tensor, diff_outputs=(0,))
def _(g, out, log_probs, targets, input_lengths, target_lengths, blank, zero_infinity):
    """Keep the cotangent outside of the kernel: only second derivatives open that up."""
    g = g[0]
    how = (targets, input_lengths, target_lengths, *out, blank, zero_infinity)
    return aten._ctc_loss_backward(torch.ones_like(g), log_probs, *how) * (
        g.unsqueeze(-1) if g.dim() else g
    )


@vmap_of(aten._ctc_loss.default, aten._ctc_loss.Tensor)
def _(
    log_probs,
    targets,
    input_lengths,
    target_lengths,
    blank,
    zero_infinity,
    *,
    batched,
    size,
    shape,
) -> tuple[Tensor, Tensor]:
    where = folded(log_probs, targets, (input_lengths, target_lengths), batched, size)
    loss, _ = aten._ctc_loss(*where, blank, zero_infinity)
    return loss.reshape(size, *shape[0]), loss.new_empty(size, *shape[1])


@vmap_of(aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor)
def _(
    g,
    log_probs,
    targets,
    input_lengths,
    target_lengths,
    loss,
    log_alpha,
    blank,
    zero_infinity,
    *,
    batched,
    size,
) -> Tensor:
    where = folded(log_probs, targets, (input_lengths, target_lengths), batched[1:-2], size)
    n = log_probs.shape[-2]
    out = aten._ctc_loss_backward(
        with_batch(g, batched[0], size).flatten(),
        *where,
        *aten._ctc_loss(*where, blank, zero_infinity),
        blank,
        zero_infinity,
    )
    return out.unflatten(1, (size, n)).movedim(1, 0)

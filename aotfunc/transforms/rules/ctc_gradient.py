"""The gradient of the connectionist temporal classification loss in ops that have derivatives, for
its second derivative.

It is the kernel's formula, with the recursions over time written out: some thirty ops a step. Only
a derivative of the gradient opens it up; the gradient itself stays one call of the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ctc import target_rows
from .schema import aten
from .table import decompose_as

NEVER = -1e30  # the logarithm of a probability of zero; -inf would have no derivative


def column(lengths: Any, like: Tensor) -> Tensor:
    """Return lengths (numbers or a tensor) as ``(N, 1)``."""
    if isinstance(lengths, Tensor):
        return lengths.to(like.device).reshape(-1, 1)
    return torch.cat([like.new_full((1, 1), n, dtype=torch.int64) for n in lengths])


def states_of(targets: Tensor, of_target: Tensor, blank: int, classes: Any) -> Tensor:
    """Return targets as ``(N, 2 S + 1)`` with blanks between, before and after."""
    targets = target_rows(targets, of_target)
    blanks = torch.full_like(targets, blank)
    pairs = torch.stack([blanks, targets], -1).flatten(1)
    return torch.cat([pairs, blanks[:, :1]], 1).clamp(0, classes - 1)


def shift(x: Tensor, by: int, fill: Any) -> Tensor:
    """Return ``x`` shifted along its last dimension (back if ``by`` < 0), with ``fill``."""
    gap = x.new_full((*x.shape[:-1], min(abs(by), x.shape[-1])), fill)
    kept = x.shape[-1] - gap.shape[-1]
    return (
        torch.cat([gap, x[..., :kept]], -1)
        if by > 0
        else torch.cat([x[..., x.shape[-1] - kept :], gap], -1)
    )


def one_step_on(x: Tensor, skip: Tensor, by: int) -> Tensor:
    """Return the log-probabilities after one step: from the same state, from the one before and,
    where ``skip`` holds, from the one before that."""
    before = [x, shift(x, by, NEVER), torch.where(skip, shift(x, 2 * by, NEVER), NEVER)]
    return torch.stack(before).logsumexp(0)


def ctc_gradient(
    g,
    log_probs,
    targets,
    input_lengths,
    target_lengths,
    loss,
    log_alpha,
    blank,
    zero_infinity=False,
) -> Tensor:
    single = log_probs.dim() == 2
    if single:
        log_probs, targets = log_probs.unsqueeze(1), targets.reshape(1, -1)
        g, loss = g.reshape(1), loss.reshape(1)
    steps, _, classes = log_probs.shape
    of_input, of_target = (column(n, targets) for n in (input_lengths, target_lengths))
    states = states_of(targets, of_target.flatten(), blank, classes)
    number = torch.arange(states.shape[1], device=states.device)
    valid = number <= 2 * of_target
    last = (number == 2 * of_target) | (number == 2 * of_target - 1)
    skip = (states != blank) & (states != shift(states, 2, blank))
    index = states.expand(steps, *states.shape)
    emitted = log_probs.gather(2, index)

    ahead = torch.where(valid & (number < 2), emitted[0], NEVER)
    forth = [ahead]
    for t in range(1, steps):
        ahead = torch.where(valid, one_step_on(ahead, skip, 1) + emitted[t], NEVER)
        forth.append(ahead)
    behind = torch.full_like(ahead, NEVER)
    back: list[Tensor] = []
    for t in reversed(range(steps)):
        going = one_step_on(behind, shift(skip, -2, False), -1) + emitted[t]
        now = torch.where(of_input == t + 1, torch.where(last, emitted[t], NEVER), going)
        behind = torch.where(valid & (of_input > t), now, NEVER)
        back.insert(0, behind)

    alpha, beta = torch.stack(forth), torch.stack(back)
    at_end = alpha.gather(0, (of_input - 1).clamp_min(0).expand(1, *states.shape))[0]
    total = torch.where(last, at_end, NEVER).logsumexp(1).reshape(1, -1, 1)
    both = alpha + beta
    share = torch.where(both > NEVER / 2, both - total - emitted, NEVER).exp()
    out = (
        log_probs.exp() - torch.zeros_like(log_probs).scatter_add(2, index, share)
    ) * g.unsqueeze(-1)
    time = torch.arange(steps, device=states.device).reshape(-1, 1, 1)
    out = torch.where(time < of_input, out, 0)
    if zero_infinity:
        out = torch.where((loss == torch.inf).unsqueeze(-1), 0, out)
    return out.squeeze(1) if single else out


decompose_as(aten._ctc_loss_backward.default, ctc_gradient)
decompose_as(aten._ctc_loss_backward.Tensor, ctc_gradient)

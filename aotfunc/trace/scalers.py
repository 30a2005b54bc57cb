"""Record ``torch.amp.GradScaler``: a step that infinite gradients skip, and its own ops by simpler
ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..debug import at, user_line
from .decisions import both_branches
from .traced import is_frozen

aten = torch.ops.aten


def skipping(step: Callable) -> Callable:
    """Return the scaler's method that takes an optimizer's step, or none."""

    @functools.wraps(step)
    def method(self: Any, optimizer: Optimizer, state: dict, *args: Any, **kwargs: Any) -> Any:
        take = lambda: step(self, optimizer, state, *args, **kwargs)
        if not is_frozen():
            return take()
        tensors = stepped(optimizer)
        result = both_branches(take, tensors)
        if len(stepped(optimizer)) > len(tensors):
            torch._assert_async(
                sum(state["found_inf_per_device"].values()) == 0,
                f"GradScaler skips the first step of {type(optimizer).__name__}, which would make "
                f"its state{at(user_line())}: take that step outside of the compiled function",
            )
        return result

    return method


def stepped(optimizer: Optimizer) -> list[Tensor]:
    """Return what an optimizer writes to."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [x for state in optimizer.state.values() for x in state.values()]
    return params + [x for x in states if isinstance(x, Tensor)]


def clearing(update: Callable) -> Callable:
    """Return the method that ends a scaler's iteration, which empties its dictionary in place: a
    call does not repeat the binding of another one."""

    @functools.wraps(update)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        states = self._per_optimizer_states
        update(self, *args, **kwargs)
        if is_frozen():
            states.clear()
            self._per_optimizer_states = states

    return method


SCALER = {
    (GradScaler, "_maybe_opt_step"): skipping(GradScaler._maybe_opt_step),
    (GradScaler, "update"): clearing(GradScaler.update),
}


def unscale(trace: Any, grads: Sequence[Tensor], found: Tensor, factor: Tensor) -> None:
    """Multiply gradients, and note whether one is not finite."""
    with trace:
        for g in grads:
            found.copy_(torch.where(g.isfinite().all(), found, 1.0))
            g.mul_(factor)


def update_scale(
    trace: Any, scale: Tensor, tracker: Tensor, found: Tensor, up: float, down: float, every: int
) -> Tensor:
    """Scale down after infinite gradients, and up after a number of steps without any."""
    with trace:
        bad, count, wide = found != 0, tracker + 1, scale.double()
        grows, larger = count == every, (wide * up).to(scale.dtype)
        grown = torch.where(grows & larger.isfinite(), larger, scale)
        scale.copy_(torch.where(bad, (wide * down).to(scale.dtype), grown))
        tracker.copy_(torch.where(bad | grows, 0, count))
        return scale


OPENED: dict[Any, Callable] = {
    aten._amp_foreach_non_finite_check_and_unscale_.default: unscale,
    aten._amp_update_scale_.default: update_scale,
}

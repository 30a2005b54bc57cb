"""Give outside tensors that a recording writes to the autograd history of eager mode while it
records, so that they answer for themselves; take it away at the end, since the program has not run
yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..debug import at, user_line
from ..errors import CaptureError
from .autograd import requires_grad
from .traced import Traced, quiet, under_way

if TYPE_CHECKING:
    from .tape import Tape
    from .tracer import Trace


class GiveHistory(Function):
    """Give a tensor a history without touching its values."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, _: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(t)
        return t


def keep_off(trace: Trace, facts: Any, args: Sequence[Tensor], written: Sequence[Any]) -> None:
    """Keep autograd's record of a write, which C++ makes for parameters, off outside tensors: take
    it back in the end. Refuse a write to a tensor with an older one."""
    tracked = [t for t in args if requires_grad(t)]
    if not tracked:
        follow_writes(trace, written)
        return
    trace.autograd.reach()  # mark what was read before the write
    for t in written:
        owner = t._base if t._is_view() else t
        if owner.__class__ is Traced or has_history(owner):
            continue
        if not (owner.requires_grad or is_part(t, owner)):
            trace.rewritten.append(owner)
        elif not facts.accumulates or len(tracked) > 1 or tracked[0] is not t:
            # (x += a, with x the one differentiated operand, has derivative 1)
            raise CaptureError(
                "a tensor from outside that requires grad is written to, and autograd is to see it"
                f"{at(user_line(4))}: pass it as an argument, or write to it under no_grad"
            )


def follow_writes(trace: Trace, written: Sequence[Any]) -> None:
    """Let outside tensors that were just written require grad if the written value does."""
    for t in written:
        owner = t._base if t._is_view() else t
        if (
            owner.__class__ is Traced
            or is_part(t, owner)
            or owner.requires_grad
            or owner.is_inference()
        ):
            continue
        if trace.seen_as(owner) in trace.autograd.active():
            trace.rewritten.append(owner)
            with quiet():
                # torch's own apply, as Function's is redirected to the recording
                super(Function, GiveHistory).apply(owner, torch.empty(0, requires_grad=True))
                # asking a view for its grad_fn updates it
                _ = torch._C.TensorBase.grad_fn.__get__(t)


def has_history(t: Tensor) -> bool:
    """Return whether ``t`` was given a history for the time of a recording."""
    return any(t is r for trace in under_way.traces for r in trace.rewritten)


def is_part(t: Tensor, owner: Tensor) -> bool:
    """Return whether ``t`` is a view made outside, whose history could not be taken back."""
    return owner is not t and t.__class__ is not Traced


def take_back(trace: Tape) -> None:
    """Reset histories and version counters: PyTorch has counted writes that were only recorded."""
    if not (trace.versions or trace.rewritten):
        return
    written = [(t, version) for t, version in trace.versions if t._version != version]
    trace.versions.clear()
    if not (written or trace.rewritten):
        return
    with quiet():
        for t in trace.rewritten:
            torch._C.TensorBase.detach_(t)
        # tensors that share memory share a counter: the first of them has the value from before
        for t, version in reversed(written):
            torch._C._autograd._unsafe_set_version_counter((t,), (version,))

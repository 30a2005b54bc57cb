"""What PyTorch's autograd knows of tensors from outside that a recording writes to: meanwhile what
it would know in eager mode, so that they answer for themselves; afterwards nothing, for the
program is yet to run."""

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
    """Gives a tensor a history, and does not touch its values."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, _: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(t)
        return t


def keep_off(trace: Trace, facts: Any, args: Sequence[Tensor], written: Sequence[Any]) -> None:
    """Keep autograd's own record of a write off outside tensors; C++ makes one where parameters
    take part. It is taken back when the recording ends; a write to a tensor that has an older one
    is refused."""
    tracked = [t for t in args if requires_grad(t)]
    if not tracked:
        follow_writes(trace, written)
        return
    trace.autograd.reach()  # what was read before the write
    for t in written:
        owner = t._base if t._is_view() else t
        if owner.__class__ is Traced or has_history(owner):
            continue
        if not (owner.requires_grad or is_part(t, owner)):
            trace.rewritten.append(owner)
        elif not facts.accumulates or len(tracked) > 1 or tracked[0] is not t:
            # else its derivative is 1
            raise CaptureError(
                "a tensor from outside that requires grad is written to, and autograd is to see it"
                f"{at(user_line(4))}: pass it as an argument, or write to it under no_grad"
            )


def follow_writes(trace: Trace, written: Sequence[Any]) -> None:
    """Let outside tensors that were just written to require grad if what was written does."""
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
                # which is not redirected
                super(Function, GiveHistory).apply(owner, torch.empty(0, requires_grad=True))
                # a view finds out only when it is asked
                _ = torch._C.TensorBase.grad_fn.__get__(t)


def has_history(t: Tensor) -> bool:
    """Whether it has a history for the time of a recording."""
    return any(t is r for trace in under_way.traces for r in trace.rewritten)


def is_part(t: Tensor, owner: Tensor) -> bool:
    """Whether ``t`` is a view made outside: its history could not be taken back."""
    return owner is not t and t.__class__ is not Traced


def take_back(trace: Tape) -> None:
    """Nothing was written after all: PyTorch has counted writes that were recorded."""
    written = [(t, version) for t, version in trace.versions if t._version != version]
    trace.versions.clear()
    if not (written or trace.rewritten):
        return
    with quiet():
        for t in trace.rewritten:
            torch._C.TensorBase.detach_(t)
        # those that share memory count together, and the first one had it right
        for t, version in reversed(written):
            torch._C._autograd._unsafe_set_version_counter((t,), (version,))

"""Refuse backwards of a compiled call whose gradients could not be eager's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..capture.calls import CompiledCall
from ..errors import AotfuncError
from ..trace.memory import version


def check_alone(ctx: Any) -> None:
    """Refuse a backward that has reached another node of the call with a Function in common: the
    Function's backward gets the sum of the cotangents of both."""
    task = torch._C._current_graph_task_id()
    for shared in ctx.halves.shared(ctx.part[0]):
        if ctx.tasks.get(shared) == task:
            raise AotfuncError(
                f"two results of {ctx.halves.call.__name__} have gradients of their own, and a "
                "Function or hook in common whose backward is not linear; one backward cannot go "
                "through both: return one result"
            )
        ctx.tasks[shared] = task


def check_met(ctx: Any) -> tuple[int, ...]:
    """Return the further results of this node; refuse a second derivative where another node has
    cotangents for the same Function."""
    if ctx.met is None:
        raise AotfuncError(
            f"several results of {ctx.halves.call.__name__} have gradients of their own, and a "
            "Function or hook in common whose backward is not linear; it cannot be differentiated "
            "twice (create_graph=True): return one result"
        )
    return ctx.met


def unchanged(ctx: Any, gradient: CompiledCall) -> list[Tensor]:
    """Return the inputs, those that this gradient reads as autograd would have saved them."""
    for t, before, p in zip(ctx.inputs, ctx.versions, gradient.program.placeholders, strict=False):
        if version(t) != before and p.users:
            raise AotfuncError(
                f"an input of {ctx.halves.call.__name__} of shape {list(t.shape)} was modified by "
                "an inplace operation after the call; its backward can neither be differentiated "
                "(create_graph=True) nor be run for another result any more: pass it a clone(), "
                "or write after the backward"
            )
    return ctx.inputs

"""Refuse backwards of a compiled call whose gradients could not be eager's."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..capture.calls import CompiledCall
from ..errors import AotfuncError
from ..trace.memory import version
from .meetings import reaches_bent
from .unseen import check_hooks


class Kin:
    """Which backward has last gone through a call, its gradient, or the gradient of that; and the
    ``group`` of nodes, those of one of these calls."""

    task, group = -1, None


class Related(threading.local):
    """What the nodes of autograd that are made now are related to, and their group."""

    now: tuple[Kin, Any] | None = None


_related = Related()


def relation() -> tuple[Kin, Any]:
    """Return what a new node is related to: to the node whose gradient is computed, or nothing."""
    return _related.now or (Kin(), None)


@contextmanager
def related(ctx: Any) -> Iterator[None]:
    """Relate the nodes that are made now to this one."""
    before, _related.now = _related.now, (ctx.kin[0], object())
    try:
        yield
    finally:
        _related.now = before


def check_kin(ctx: Any, name: str) -> None:
    """Refuse a backward that goes through a call and through its gradient, where both reach a
    Function that has no node of its own: its backward gets the sum of the cotangents of both."""
    (kin, group), task = ctx.kin, torch._C._current_graph_task_id()
    if kin.task == task and kin.group is not group:
        raise AotfuncError(
            f"one backward goes through {name} and through its gradient (create_graph=True), and "
            "both have cotangents for a Function or hook, in a transform or the body of a branch "
            "or loop, whose backward is not linear; take that gradient inside of the function, "
            "with torch.autograd.grad or grad"
        )
    kin.task, kin.group = task, group


def check_reached(ctx: Any, outs: Sequence[int]) -> None:
    """Refuse a backward of a node's ``outs`` if another has cotangents for its Function."""
    if ctx.met is None:
        check_alone(ctx)
    if ctx.watched:
        check_hooks(ctx.watched, ctx.halves.unseen, outs, ctx.halves.call.__name__)
    halves = ctx.halves
    if reaches_bent(halves.program, halves.wrt, outs, bodies=True):
        check_kin(ctx, halves.call.__name__)


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
    """Return this node's further results; refuse cotangents that meet in a Function."""
    if ctx.met is None:
        raise AotfuncError(
            f"several results of {ctx.halves.call.__name__} have gradients of their own, and a "
            "Function or hook in common whose backward is not linear; it cannot be differentiated "
            "twice (create_graph=True): return one result"
        )
    return ctx.met


def unchanged(ctx: Any, gradient: CompiledCall) -> list[Tensor]:
    """Return the inputs, those that this gradient reads as autograd would have saved them."""
    inputs = ctx.inputs
    if inputs is None:  # another thread has let go of them, and before of what is saved
        inputs = ctx.saved_tensors
    for t, before, p in zip(inputs, ctx.versions, gradient.program.placeholders, strict=False):
        if version(t) != before and p.users:
            raise AotfuncError(
                f"an input of {ctx.halves.call.__name__} of shape {list(t.shape)} was modified by "
                "an inplace operation after the call; its backward can neither be differentiated "
                "(create_graph=True) nor be run for another result any more: pass it a clone(), "
                "or write after the backward"
            )
    return inputs

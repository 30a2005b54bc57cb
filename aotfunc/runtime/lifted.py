"""The results of a node of autograd that has several, each behind a node of its own: autograd
calls the hooks of all results of a node, with None for those that no gradient reaches."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: results that keep themselves: number -> (their node, their place there)
Lifts = dict[int, tuple[weakref.ref, int]]


def lifted(
    new: Sequence[Tensor], numbers: Sequence[int], keeping: Mapping[int, Any]
) -> tuple[list[Tensor], Lifts]:
    """Return the results ``new`` of a node, each behind a node of its own. Those that keep
    themselves for a second derivative share one with the other results of the op."""
    outs, lifts = [*new], Lifts()
    ops: dict[Hashable, list[int]] = {}
    for at, (o, k) in enumerate(zip(new, numbers, strict=True)):
        if k in keeping:
            ops.setdefault(keeping[k].group, []).append(at)
        else:
            outs[at] = kept(o)[0] if o.is_complex() else lift(o)
    for places in ops.values():
        found = kept(*[new[at] for at in places])
        for i, (at, o) in enumerate(zip(places, found, strict=True)):
            outs[at], lifts[numbers[at]] = o, (weakref.ref(o.grad_fn), i)
    return outs, lifts


#: PyTorch's op, which has no derivative of complex numbers
lift = torch.ops.aten.lift.default


class Lift(torch.autograd.Function):
    """Lift results of one op, and keep them with the hooks that they will have."""

    @staticmethod
    def forward(ctx: Any, *outs: Tensor) -> tuple:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        new = tuple([o.detach() for o in outs])
        ctx.save_for_backward(*new)
        return new

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple:  # type: ignore[override]
        return gs


#: ``Lift.apply`` without the look for torch.func's wrappers: there are none here
kept = super(torch.autograd.Function, Lift).apply


def as_kept(lifts: Lifts, k: int) -> Tensor | None:
    """Return result ``k`` as autograd knows it behind its own node; None if that node is gone."""
    ref, i = lifts.get(k, (None, 0))
    node: Any = None if ref is None else ref()
    return None if node is None else node.saved_tensors[i]

"""The results of a node of autograd that has several, each behind a node of its own: autograd
calls the hooks of all results of a node, with None for those that no gradient reaches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from .refused import check_met

#: results that keep themselves, by number, as autograd knows them
Lifts = dict[int, Callable[[], Tensor | None]]


class ResultGroups(NamedTuple):
    """The results of a node, by their places there: those that go behind one node ``together``,
    with their numbers in the call, as they keep themselves for a second derivative; the others."""

    together: Sequence[tuple[Sequence[int], Sequence[int]]]
    others: Sequence[int]


def result_groups(numbers: Sequence[int], keeping: Mapping[int, Any]) -> ResultGroups:
    """Return the groups of a node's results; those of one op that keep themselves are together."""
    ops: dict[Hashable, list[int]] = {}
    for at, k in enumerate(numbers):
        if k in keeping:
            ops.setdefault(keeping[k].group, []).append(at)
    together = [(places, [numbers[at] for at in places]) for places in ops.values()]
    return ResultGroups(together, [at for at, k in enumerate(numbers) if k not in keeping])


def lifted(new: Sequence[Tensor], groups: ResultGroups) -> tuple[list[Tensor], Lifts]:
    """Return the results ``new`` of a node behind nodes of their own."""
    outs, lifts = [*new], Lifts()
    for places, numbers in groups.together:
        found = kept(*[new[at] for at in places])
        node = ref(found[0].grad_fn)
        for i, k in enumerate(numbers):
            outs[places[i]], lifts[k] = found[i], partial(as_kept, node, i)
    for at in groups.others:
        o = new[at]
        outs[at] = kept(o)[0] if o.is_complex() else lift(o)
    return outs, lifts


#: PyTorch's op, which has no derivative of complex numbers
lift = torch.ops.aten.lift.default._op


class Lift(torch.autograd.Function):
    """Lift results of one op, and keep them with the hooks that they will have."""

    @staticmethod
    def forward(ctx: Any, *outs: Tensor) -> tuple:  # type: ignore[override]
        new = tuple([o.detach() for o in outs])
        # what `save_for_backward` and `set_materialize_grads` do
        ctx.to_save, ctx.materialize_grads = new, False
        return new

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple:  # type: ignore[override]
        return gs


#: ``Lift.apply`` without the look for torch.func's wrappers: there are none here
kept = super(torch.autograd.Function, Lift).apply
#: without PyTorch's own looks for a vjp and for boxed gradients
Lift._backward_cls.apply = Lift.backward  # type: ignore[attr-defined]


def as_kept(lift: ref, i: int) -> Tensor | None:
    """Return result ``i`` of a node as autograd knows it there; None if the node is gone, or has
    let go of it, as no graph is retained: eager has no further derivative then."""
    node: Any = lift()
    try:
        return None if node is None else node.saved_tensors[i]
    except RuntimeError:
        return None


def known_results(
    ctx: Any, outs: frozenset[int], again: bool, saved: Sequence[Tensor]
) -> dict[int, Tensor]:
    """Return what the second derivative of the results ``outs`` reads as autograd knows it, by its
    number among the results and further results of the call. ``saved`` are the node's saved
    tensors: a checkpoint around the call lets them be read once."""
    halves, lifts, met = ctx.halves, ctx.lifts, () if again else check_met(ctx)
    first = len(saved) - len(met)
    found = {halves.count + i: t for i, t in zip(met, saved[first:], strict=True)}
    first -= len(ctx.keeping)
    for k, t in zip(ctx.keeping, saved[first:] or ctx.keeping, strict=False):
        if k in halves.kept_for(outs):
            t = t if k not in lifts or (lift := lifts[k]()) is None else lift
            if isinstance(t, Tensor):
                found.pop(halves.met_at(k), None)
                found[k] = t
    return found

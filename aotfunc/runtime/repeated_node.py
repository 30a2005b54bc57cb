"""The node of autograd of a call like the last one, made without Python's detours, and without
Python once there is a library for that (:mod:`.native_node`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from .autograd import CompiledFunction, facts, give_to_node, node_class
from .halves import Halves
from .late_reads import storage
from .lifted import lifted
from .native_node import MANY, native_results, nodes
from .redraw import generator_states


def same_node(
    halves: Halves, tensors: Sequence[Tensor], tree: Callable[[Sequence], Any]
) -> Callable | None:
    """Return ``(*tensors) -> tree(results)``, which does what :func:`.autograd.differentiated`
    does for inputs like these; None where nodes differ from call to call."""
    program, count = halves.call.program, halves.count
    run: Any = halves.forward.compiled(tensors)
    outs, inputs = halves.whole
    varies = halves.differing or halves.unreached or program.mutated
    if varies or halves.usual is None or len(outs) != count:
        return None
    if generator_states(program) or halves.parts(tensors) != [halves.whole]:
        return None
    if getattr(run, "own", -1) < count or any(t.is_neg() or t.is_conj() for t in tensors):
        return None
    known = facts(halves, halves.whole, dict.fromkeys(halves.saved, tensors[0]), [], None)
    compute, reads, differentiable = run.unchecked.boxed, picked(halves.needed), picked(inputs)
    keeping, lifts = known["keeping"], halves.lifts(outs)
    native, calls = native_results(halves, known, compute, lifts), itertools.count(1)

    def results(ctx: Any, tensors: tuple[Tensor, ...]) -> tuple:
        found, needed = compute([*tensors]), reads(tensors)
        kept = found[count:] if not keeping else (*found[count:], *[found[i] for i in keeping])
        give_to_node(ctx, known, kept, needed, [*map(written, needed)], [*map(storage, needed)])
        return found[:count]

    def call(*tensors: Tensor) -> Any:
        nonlocal native
        if native is not None:
            return tree(native(*tensors))
        if next(calls) % MANY == 0:
            nodes().start()
            native = native_results(halves, known, compute, lifts)
        new = apply(results, tensors, *differentiable(tensors))
        if count > 1:
            node = new[0].grad_fn
            new, node.lifts = lifted(new, lifts)
        return tree(new)

    return call if native is None else chained_calls(native, tree)


def chained_calls(first: Callable, then: Callable) -> Callable:
    """Return ``then(first(...))`` as a function."""
    return lambda *given: then(first(*given))


def picked(places: Sequence[int]) -> Callable[[Sequence], Sequence]:
    """Return a function that takes the elements at these places."""
    if len(places) == 1:
        [only] = places
        return lambda given: (given[only],)
    return itemgetter(*places) if places else lambda given: ()


#: how often tensors were written to
written = attrgetter("_version")


class RepeatedFunction(CompiledFunction):
    """Results of a call like the last one, computed where PyTorch has turned gradients off."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, results: Callable[[Any, tuple], tuple], tensors: tuple, *inputs: Tensor
    ) -> tuple:
        return results(ctx, tensors)


#: nodes of one kind, whichever call made them
RepeatedFunction._backward_cls = node_class  # type: ignore[attr-defined]
#: as in :mod:`.autograd`
apply = super(torch.autograd.Function, RepeatedFunction).apply

"""Tensors that are leaves of autograd though a function made them: those of modules and parameters
made inside, and results of an inference mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.captured import Captured
from ..errors import AotfuncError, CaptureError
from ..trace.autograd import Reach
from ..trace.tensor_classes import GIVEN
from ..trace.traced import Traced
from ..trace.tracer import Trace
from .aliasing import memory_program


class Leaves:
    """The results of a program, and of the function, that require grad because of leaves that the
    function made.

    Raises CaptureError where such a leaf is returned beside what was computed from it: autograd
    would not connect them."""

    def __init__(self, rec: Captured, mutated: Sequence[int]) -> None:
        trace = rec.trace
        count = len(trace.inputs)
        leaves = {ref for ref, yes in trace.autograd.leaves.items() if yes and ref >= count}
        self.retained = [
            k
            for k, ref in enumerate(rec.refs)
            if ref in trace.autograd.kept and ref not in trace.finals
        ]
        self.parameters = [
            k
            for k, i in enumerate(rec.tensors)
            if getattr(rec.leaves[i], "_is_param", GIVEN) is not GIVEN
        ]
        self.returned = [
            k
            for k, ref in enumerate(rec.refs)
            if ref in leaves and ref not in trace.autograd.computed
        ]
        if any(
            rec.leaves[rec.tensors[k]].__dict__.get("_grad") is not None for k in self.returned
        ):
            raise CaptureError(
                "a tensor made inside is returned, and has a .grad; return x.detach(), and x.grad"
            )
        #: results whose graph is freed
        self.spent = [k for k, ref in enumerate(rec.refs) if ref in trace.detached]
        #: the positions of results of the program, and of written inputs, that were computed from
        #: a leaf
        self.results: list[int] = []
        self.written: list[int] = []
        if not leaves:
            return
        owned = [ref for ref, _ in memory_program(rec)]
        finals = [trace.finals[i] if i < count else trace.ref_at(i) for i in mutated]
        given = {rec.refs[k] for k in self.returned}
        if given and (computed_from(rec, given) - given).intersection(
            (*owned, *rec.refs, *finals)
        ):
            raise CaptureError(
                "a tensor that was made inside and requires grad is returned, and so is what was "
                "computed from it; its gradient would not be found; pass it as an argument"
            )
        mine = leaves - trace.autograd.computed
        found = computed_from(rec, leaves) - mine
        views = [s for ref in rec.refs if (s := rec.seen.get(ref)) and ref in found]
        if any(
            s.root not in found or any(step.ref in mine for step in s.path[:-1]) for s in views
        ):
            raise CaptureError(
                "a view of a tensor that was made inside and requires grad is returned; return "
                "the tensor itself, or a clone() of the view"
            )
        self.results = [k for k, ref in enumerate(owned) if ref in found]
        self.written = [i for i, ref in zip(mutated, finals, strict=True) if ref in found]

    def __bool__(self) -> bool:
        return bool(
            (self.parameters or self.returned or self.retained or self.results or self.written)
            or self.spent
        )

    def attach(self, outs: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        """Let the results of the program, and written inputs, require grad."""
        for t in (*[outs[k] for k in self.results], *[tensors[i] for i in self.written]):
            if t.requires_grad:
                continue
            if t.__class__ is Traced:
                t.tracer.autograd.mark_computed(t)
            else:
                Attached.apply(torch.zeros((), requires_grad=True), t)

    def returns(self, outs: Sequence[Any]) -> Sequence[Any]:
        """Return the returned tensors, leaves as leaves; some retain their gradient."""
        outs = list(outs)
        for k in self.returned:
            outs[k] = outs[k].requires_grad_()
        for k in self.parameters:
            outs[k] = nn.Parameter(outs[k], k in self.returned)
        for k in self.spent if torch.is_grad_enabled() else ():
            if outs[k].__class__ is Traced:
                outs[k].tracer.autograd.mark_computed(outs[k])
                outs[k].tracer.spent += (outs[k].ref,)
            else:
                outs[k] = Spent.apply(torch.zeros((), requires_grad=True), outs[k])
        for k in self.retained:
            if outs[k].requires_grad:
                outs[k].retain_grad()
        return outs


def computed_from(rec: Captured, leaves: set[int]) -> set[int]:
    """Return these values and all that was computed from them or from leaves."""
    reach = Reach(set(leaves), len(rec.trace.inputs))
    reach.extend(rec.trace.records, rec.trace.autograd.leaves)
    return reach.active


def made_in_inference_mode(rec: Captured) -> bool:
    """Return whether the function has made its results in inference mode, which it switched on.
    Raises CaptureError where it has made others too: a program runs in the mode, or outside."""
    trace, roots = rec.trace, [rec.trace.root(ref) for ref in rec.refs]
    made = [root in trace.autograd.inference for root in roots]
    if torch.is_inference_mode_enabled():  # around the call
        if any(root >= len(trace.inputs) and not yes for root, yes in zip(roots, made)):
            raise CaptureError(
                "the function switches inference mode, which is on around it, off and returns "
                "what it has made there; call it outside of the mode"
            )
        return False
    if not any(made):
        return False
    for yes, ref in zip(made, rec.refs, strict=True):
        if not yes and ref not in trace.finals:
            raise CaptureError(
                "the function returns tensors made in torch.inference_mode(), and others, or "
                "views of its arguments; use torch.no_grad(), or return clones made outside of "
                "the mode"
            )
    return True


class Attached(torch.autograd.Function):
    """A tensor with a way to a leaf that is gone, changed in place."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(t)
        return t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        return None, None


class Spent(torch.autograd.Function):
    """Let a value require grad whose graph a backward inside of the function has freed."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        raise AotfuncError(
            "a compiled function returns a value of which it has called .backward(), which frees "
            "its graph: call .backward(retain_graph=True) inside of it, or return the value "
            "detached"
        )


def detached_results(trace: Trace, result: Any) -> Any:
    """Return the result, itself or a tuple, with values detached that a ``.backward()`` was called
    of: a graph of theirs would hold what the backward reads."""
    if not trace.spent:
        return result
    if result.__class__ is tuple:
        return tuple([detached_results(trace, x) for x in result])
    if result.__class__ is not Traced or result.tracer is not trace:
        return result
    if not (result.requires_grad and result.ref in trace.spent):
        return result
    with torch.no_grad():
        twin = result.clone()
    trace.detached += (twin.ref,)
    return twin

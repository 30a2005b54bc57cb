"""Run programs of whole tensors on what each process holds of them.

The program of a function of DTensors, or of its backward, is captured once more for the placements
of a call: PyTorch's own code for DTensors runs on traced parts, so that it says which ops run on
parts and which collectives run between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ..capture.calls import CompiledCall
from ..capture.capture import capture
from ..capture.live_hooks import live_hooks
from ..debug import at, user_line
from ..errors import CaptureError
from ..graph import Program
from ..trace.dtensors import mesh_and_placements, of_spec
from ..trace.emit import Builder, remap, remap_dict
from ..trace.kinds import innermost, is_dtensor
from ..trace.patches import Exchange
from ..trace.placement_rules import on_whole, rule_for
from ..trace.placing import dtensor, dtensor_spec, replicated, resharded, waited
from ..transforms.lower import EVERYTHING, lowered
from .together import TOGETHER, one_collective

layouts = torch.ops.aotfunc_layout


@dataclass(frozen=True)
class OfParts:
    """A compiler of programs of whole tensors, by one for programs of parts."""

    compile: Callable

    def __call__(self, program: Program, tensors: Sequence[Tensor]) -> OnParts:
        return OnParts(program, self.compile)


@dataclass(frozen=True)
class SplitOfParts:
    """A partition into halves that run on parts."""

    split: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Sequence[CompiledCall]:
        return [on_parts(half) for half in self.split(*args, **kwargs)]


def on_parts(call: CompiledCall) -> CompiledCall:
    """Return a compiled call whose tensors may be DTensors."""
    for n in call.program.graph.nodes:
        if live_hooks(n) is not None:
            raise CaptureError(
                f"{call.__name__} runs on DTensors or modules of fully_shard, and autograd calls "
                f"hooks inside of it ({n.target.__name__}); register them on what is outside"
            )
    return CompiledCall(
        call.program, OfParts(call.compile), SplitOfParts(call.split), call.__name__
    )


def check_whole(call: CompiledCall, tensors: Sequence[Tensor]) -> None:
    """Raise CaptureError for a call that is to run op by op and has DTensors."""
    if isinstance(call.compile, OfParts) or any(is_dtensor(innermost(t)) for t in tensors):
        raise CaptureError(
            f"{call.__name__}, a compiled function of DTensors or modules of fully_shard, is not "
            f"called under torch.func's transforms or forward AD{at(user_line())}: take gradients "
            "by backward() or torch.autograd.grad, or leave the function uncompiled"
        )


class OnParts:
    """A program of whole tensors as a function of a list of tensors, among them DTensors."""

    def __init__(self, program: Program, compile: Callable) -> None:
        self.program, self.compile = program, compile
        self.made: dict[tuple, tuple] = {}

    def __call__(self, tensors: list[Tensor]) -> Sequence:
        return self.results(tensors, lambda call, parts: call.compiled(parts)([*parts]))

    def results(self, tensors: Sequence[Any], run: Callable) -> Sequence:
        """Return the results, which ``run(call, parts)`` computes."""
        specs = tuple([t._spec if is_dtensor(t) else None for t in tensors])
        parts = [
            t if s is None else waited(t._local_tensor)
            for t, s in zip(tensors, specs, strict=True)
        ]
        key = specs, tuple([(p.shape, p.stride()) for p in parts])
        found = self.made.get(key)
        if found is None:
            found = self.made[key] = self.captured(specs, parts)
        call, constants, placed = found
        known = {id(p): t for p, t in zip(parts, tensors, strict=True)}
        outs = iter(run(call, [*parts, *constants]))
        return [x if how is None else how(next(outs), known) for how, x in placed]

    def captured(self, specs: Sequence[Any], parts: list[Tensor]) -> tuple:
        """Return the program of parts for these placements as a compiled call, its constants, and
        what makes its results: ``(function, None)``, or ``(None, value)`` of no tensor."""
        placed: list[tuple] = []

        def f(*parts: Tensor) -> list:
            given = [p if s is None else dtensor(p, s) for p, s in zip(parts, specs, strict=True)]
            outs = run_whole(lowered(self.program, EVERYTHING), given)
            placed[:] = [
                (partial(whole_result, o._spec if is_dtensor(o) else None), None)
                if isinstance(o, Tensor)
                else (None, o)
                for o in outs
            ]
            return [o._local_tensor if is_dtensor(o) else o for o in outs]

        with torch.no_grad(), propagating():
            given = [p.detach() for p in parts]  # autograd is above
            why_not = "a program of parts runs later"
            rec = capture(f, given, lambda given: (list(given), {}), why_not=why_not)
        never: Any = None  # its halves are programs of whole tensors
        call = CompiledCall(rec.program(), self.compile, never, self.program.name)
        return call, rec.closed_over, placed


def whole_result(spec: Any, part: Tensor, known: dict[int, Any]) -> Tensor:
    """Return a result of which this is a part; an argument, if it is one that is ``known``."""
    t = known.get(id(part))
    if t is not None and (t._spec if is_dtensor(t) else None) == spec:
        return t
    return part if spec is None else dtensor(part, spec)


def run_whole(program: Program, tensors: Sequence[Any]) -> list:
    """Run a program of whole tensors on DTensors."""
    env: dict[Node, Any] = dict(zip(program.placeholders, tensors, strict=True))
    for n in program.graph.nodes:
        if n.target in TOGETHER and n not in env:
            env.update(one_collective(n, env))
        elif n.op == "call_function" and n not in env:
            env[n] = run_op(n.target, remap(n.args, env), remap_dict(n.kwargs, env))
    return list(remap(program.outputs, env))


def run_op(op: Any, args: Any, kwargs: Any) -> Any:
    """Run an op on DTensors, or between them and their parts. Plain tensors beside DTensors are
    those that all processes have. What PyTorch has no rule for is computed by all of them."""
    if op in BETWEEN:
        return BETWEEN[op](*args)
    found = next((x for x in tree_leaves((args, kwargs)) if is_dtensor(x)), None)
    if found is None:
        return op(*args, **kwargs)
    args, kwargs = tree_map_only(Tensor, lambda x: replicated(x, found._spec.mesh), (args, kwargs))
    try:
        run, _ = rule_for(op, args, kwargs)
    except (NotImplementedError, RuntimeError):
        return on_whole(op, *args, **kwargs)
    return run(*args, **kwargs)


def redistribute(x: Any, to: str, back: str) -> Any:
    mesh, placements = mesh_and_placements(to)
    return resharded(replicated(x, mesh), placements)


def from_local(x: Tensor, shape: Any, stride: Any, to: str, back: str) -> Any:
    return dtensor(x, dtensor_spec(*mesh_and_placements(to), shape, stride, x.dtype))


def to_local(x: Any, shape: Any, stride: Any, of: str, back: str) -> Tensor:
    part = redistribute(x, of, back)._local_tensor
    if part.stride() == tuple(stride):
        return part
    return torch.empty_strided(shape, stride, dtype=part.dtype, device=part.device).copy_(part)


BETWEEN: dict[Any, Callable] = {
    layouts.redistribute.default: redistribute,
    layouts.from_local.default: from_local,
    layouts.to_local.default: to_local,
}


@functools.cache
def propagating() -> Exchange:
    """Let PyTorch find placements, which it does by running ops without values, unrecorded."""
    from torch.distributed.tensor import DTensor

    name = "_propagate_tensor_meta_non_cached"
    propagator = DTensor._op_dispatcher.sharding_propagator
    found = getattr(propagator, name)

    def unrecorded(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return found(*args, **kwargs)

    return Exchange({(propagator, name): unrecorded})


def laid_as_inputs(program: Program, tensors: Sequence[Any]) -> tuple[Program, bool]:
    """Return the program with gradients laid out as its inputs are; whether it has DTensors."""
    texts = tuple([of_spec(t._spec, summed=True) if is_dtensor(t) else None for t in tensors])
    if not any(texts):
        return program, any(
            n.target in BETWEEN or n.target in TOGETHER for n in program.graph.nodes
        )

    def make() -> Program:
        b = Builder()
        inputs = b.inputs(program.placeholders)
        moved = [
            b.call(layouts.redistribute.default, x, of_spec(t._spec), text)
            if text is not None and x.meta["val"].differentiable and i not in program.mutated
            else x
            for i, (x, t, text) in enumerate(zip(inputs, tensors, texts, strict=True))
        ]
        outs = b.inlined(program, moved)
        return Program(
            b.finish(outs), program.n_inputs, program.n_outputs, program.mutated, program.name
        )

    return program.once(("laid as inputs", texts), make), True

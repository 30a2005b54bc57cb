"""A program of a transform as a compiled call, where autograd has to know values of it: what a
derivative reads of its results, on which the caller may register hooks, and where cotangents of
second derivatives meet."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from ..capture.calls import CompiledCall
from ..capture.makers import made_in
from ..graph import Program
from ..trace.traced import under_way
from ..transforms.activity import live
from .autograd import call_compiled
from .chains import chained
from .execute import execute, ours
from .meetings import kept_results, meetings, without_meetings
from .pipeline import Pipeline
from .usual import op_by_op

_flag = operator.attrgetter("requires_grad")


def called(program: Program, tensors: Sequence[Tensor]) -> Sequence:
    """Return the results of a program for these inputs and closed-over tensors."""
    if (
        program.mutated
        or under_way.traces
        or not torch.is_grad_enabled()
        or not any(map(_flag, tensors))
        or op_by_op()
        or not ours(program)  # looks at the graph, which a program that shares code may not have
    ):
        return execute(program, tensors)
    wrt = tuple([i for i, t in enumerate(tensors) if t.requires_grad])
    call, reads, outs = program.once(("called", wrt), lambda: as_call(program, wrt))
    if call is None:
        return execute(program, tensors)
    given = [tensors[i] for i in reads]
    found = None if call.plain is None else chained(call, given)
    results = call_compiled(call, given) if found is None else found[0]
    return [results[i] for i in outs]


def as_call(
    program: Program, wrt: tuple[int, ...]
) -> tuple[CompiledCall | None, Sequence[int], Sequence[int]]:
    """Return ``(call, its inputs, its results)`` for the results of a program: the only call that
    it has, or one of the program itself if autograd has to know a value; else None."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    if not calls:
        return None, (), ()
    n, *items = calls
    inputs = program.placeholders
    if isinstance(n.target, CompiledCall) and all(
        u.target is operator.getitem and u.args[0] is n for u in items
    ):
        outs = program.outputs
        if not n.target.program.mutated and all(isinstance(o, Node) and o in items for o in outs):
            reads = [inputs.index(a) for a in n.args]
            return n.target, reads, [o.args[1] for o in outs]
    whole, made = without_meetings(program), made_in(program)
    met = meetings(whole, wrt, flags := live(whole, wrt))
    if not (met or kept_results(whole, wrt, flags, met, made)):
        return None, (), ()
    pipeline = Pipeline(program.name, "eager")
    call = CompiledCall(program, pipeline.forward, pipeline.split, program.name)
    call.made = made
    return call, range(len(inputs)), range(len(made))

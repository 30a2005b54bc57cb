"""Answer questions about values that differ between the samples of a batch, if all samples agree.

``if (variance < 0).any(): raise …`` inside ``vmap`` asks for a truth value, and each sample has
its own. The recording so far is batched and run on the whole batch, in every recording from the
asking one outwards; each sample answers. One common answer holds for this call; two different ones
are an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache
from ..debug import at, user_line
from ..errors import CaptureError
from ..graph import Program, dependents, weight
from ..trace.emit import Builder, paused_gc
from ..trace.functionalize import Functionalizer, input_nodes
from ..trace.kinds import has_values
from ..trace.modes import without_modes
from ..trace.records import flat_tensors
from ..trace.replay import generators
from ..trace.scalars import bits_of
from ..trace.seeds import named_generators
from ..trace.tape import signature
from ..trace.traced import Traced, around, as_if_outside, quiet
from ..trace.tracer import Trace
from ..transforms.tidy import rebuilt
from .calls import CallStep, on_eager
from .followed import Unsteady, batched_program, follow_trace, followed_batches
from .grad_step import builder_for


def agreed(trace: Trace, question: Callable, tensors: Sequence[Tensor], what: str) -> Any:
    """Return ``question(*values)`` for ``tensors``, on which all samples must agree."""
    line = at(user_line())
    with as_if_outside(), paused_gc(), without_modes(trace.dtype):
        values, count = followed_batches(trace, tensors) or batches(trace, tensors, what)
    with quiet(), torch.no_grad():
        if not count:
            raise CaptureError(
                f"{what} was asked for, but the batch is empty: there is no sample to answer{line}"
            )
        answer = question(*[v[0] for v in values])
        if count == 1 or all(bit_patterns(v).eq(bit_patterns(v[:1])).all() for v in values):
            return answer
        for k in range(1, count):
            if same_answer(answer, question(*[v[k] for v in values])):
                continue
            if trace.finished:
                raise CaptureError(
                    "a value leaked from vmap, where each sample has its own, and is used outside "
                    f"of it{line}: return it from the function"
                )
            raise CaptureError(
                f"{what} was asked for, but the samples of the batch do not agree on it{line}. "
                "Use cond or torch.where instead of `if`, torch.where instead of selecting by a "
                "mask, nonzero_static(size=...) instead of nonzero, or pass the value as an "
                "argument with in_dims=None."
            )
    return answer


def batch_of(trace: Trace, tensors: Sequence[Tensor]) -> list[tuple[Tensor, int | None]]:
    """Return real values of ``tensors`` of an outermost ``vmap``, with all samples, and the batch
    dimension of each, None for common values."""
    with as_if_outside(), paused_gc(), without_modes(trace.dtype):
        try:
            return follow_trace(trace).batch_of(trace, [trace.ref_of(t)[0] for t in tensors])
        except Unsteady:
            pass
        program = so_far(trace, tensors)
        values, _ = batches(trace, tensors, "the batch of an autograd.Function")
    inputs = [
        p for p, d in zip(program.placeholders, trace.samples.dims, strict=False) if d is not None
    ]
    differ = dependents(program.graph, inputs)
    return [
        (v, 0) if o in differ else (v[0], None)
        for v, o in zip(values, program.outputs, strict=True)
    ]


def batches(trace: Trace, tensors: Sequence[Tensor], what: str) -> tuple[list[Tensor], int]:
    """Return real values of ``tensors``, samples at dimension 0, and how many there are."""
    if trace.concrete_inputs is None and not trace.may_ask_constants:
        raise trace.unanswered(what)
    program, samples = so_far(trace, tensors), trace.samples
    inputs = [*trace.origins, *trace.lifted]
    # closed-over tensors, and values of these alone, may still be known
    if trace.concrete_inputs is None:
        if any(p.users for p in program.placeholders[: program.n_inputs]):
            raise trace.unanswered(what)
        program, inputs = closed(program), trace.lifted
    if samples is not None:
        program = batched_program(
            program,
            samples,
            trace.as_placed([*map(signature, trace.origins)]),
            [0] * program.n_outputs,
        )
    outer = next(reversed(around(trace)), None)
    if outer is None:
        values, count = run_once(program, inputs, what), 1
    else:
        with aside(outer, program, inputs) as results:
            values, count = batches(outer, results, what)
    if samples is None:
        return values, count
    with quiet():
        return [v.flatten(0, 1) for v in values], count * samples.axis.size


def so_far(trace: Trace, tensors: Sequence[Tensor]) -> Program:
    """Return the recording up to now as a program for ``tensors``; it writes nothing back."""
    refs = tuple([trace.ref_of(t)[0] for t in tensors])

    def make() -> Program:
        b, plain = builder_for(trace)
        f = Functionalizer(trace, b, input_nodes(trace, b))
        f.run()
        outs = [f.read(r) for r in refs]
        program = Program(b.finish(outs), len(trace.inputs), len(refs), (), "asked")
        return rebuilt(program, "asked") if plain else program

    return _programs.once((trace.key(), bits_of(trace.numbers), refs), make)


def closed(program: Program) -> Program:
    """Return the program as a function of the one closed-over tensor it depends on."""

    inputs = program.placeholders[: program.n_inputs]
    return program.once(
        "closed", lambda: rebuilt(program, "asked", b=Builder(), env=dict.fromkeys(inputs))
    )


_programs = Cache(1 << 16, weight)


@contextmanager
def aside(trace: Trace, program: Program, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Return the results of a program run next in ``trace``, without recording it there."""
    records, count = len(trace.records), trace.count
    results = trace.record(CallStep(program, on_eager), inputs)
    try:
        yield flat_tensors(results)
    finally:
        trace.forget(records, count)


def run_once(program: Program, inputs: Sequence[Tensor], what: str) -> list[Tensor]:
    """Run the program on real tensors, with a leading 1; restore the generators."""
    states = [
        (g, g.get_state()) for g in generators([]) | set(named_generators(program.graph.nodes))
    ]
    reals = [t.tracer.value(t) if t.__class__ is Traced else t for t in inputs]
    if not all(map(has_values, reals)):
        raise CaptureError(f"{what} was asked for, but the inputs have no values{at(user_line())}")
    try:
        with quiet(), torch.no_grad():
            return [o.unsqueeze(0) for o in on_eager(program)(*reals)]
    finally:
        for g, state in states:
            g.set_state(state)


def bit_patterns(x: Tensor) -> Tensor:
    """Return bit patterns, which are equal only if values are, NaN and signed zeros included."""
    if x.is_complex():
        return bit_patterns(torch.view_as_real(x.resolve_conj()))
    if x.is_floating_point():
        x = torch.where(x.isnan(), math.nan, x)
        return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    return x


def same_answer(a: Any, b: Any) -> bool:
    """Return whether two answers are the same: ``nan`` equals itself, and 0.0 is not -0.0."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_answer, a, b))
    if isinstance(a, Tensor):
        return bool(a.shape == b.shape and bit_patterns(a).eq(bit_patterns(b)).all())
    return a is b or (type(a) is type(b) and repr(a) == repr(b) and (a == b or a != a))

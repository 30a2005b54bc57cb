"""What ``f`` asks of values that differ between the samples of a batch: answered if all samples agree.

``if (variance < 0).any(): raise …`` inside ``vmap`` asks for a truth value of which there is one for each sample. What
has been recorded so far is batched and run on the whole batch, in every recording from the asking one outwards; the
question is put to each sample. One answer is right for all of them, for this call; two different ones are an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.eager import compile_graph
from .cache import Cache
from .debug import at, user_line
from .errors import CaptureError
from .graph import Program, weight
from .trace.emit import Builder, paused_gc
from .trace.functionalize import Functionalizer, input_nodes
from .trace.records import flat
from .trace.replay import generators, named_generators
from .trace.shapes import sig_of
from .trace.traced import HOOKS, Traced, has_values, quiet, under_way
from .trace.tracer import Trace
from .transforms.lower import lowered
from .transforms.steps import CallStep
from .transforms.tidy import REWRITES
from .transforms.vmap import vmap


class Samples(NamedTuple):
    """Of what the inputs of a recording under ``vmap`` are samples: one dimension (or None) for each of them."""

    dims: tuple[int | None, ...]
    size: int
    randomness: str


def agreed(trace: Trace, question: Callable, tensors: Sequence[Tensor], what: str) -> Any:
    """``question(*values)`` for the values of ``tensors``, which must be the same in all samples."""
    line = at(user_line())
    with as_if_outside(), paused_gc():
        values, count = batches(trace, tensors, what)
    with quiet(), torch.no_grad():
        if not count:
            raise CaptureError(f"{what} was asked for, but the batch is empty: there is no sample to answer{line}")
        answer = question(*[v[0] for v in values])
        if count == 1 or all(bits(v).eq(bits(v[:1])).all() for v in values):
            return answer
        for k in range(1, count):
            if not same(answer, question(*[v[k] for v in values])):
                raise CaptureError(
                    f"{what} was asked for, but the samples of the batch do not agree on it{line}. Use torch.where "
                    "instead of `if` and of selecting by a mask, nonzero_static(size=...) instead of nonzero, or pass "
                    "the value as an argument with in_dims=None. Beside another index tensor write w[i.reshape(1), j]."
                )
    return answer


HOOKS["agreed"] = agreed


def as_if_outside() -> Any:
    """Dispatch as outside of ops: a question may come from within one, where autograd and batching are switched off,
    which the rules that are traced for the answer rely on.
    """
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _EXCLUDED)


_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()


def batches(trace: Trace, tensors: Sequence[Tensor], what: str) -> tuple[list[Tensor], int]:
    """Real values of ``tensors`` with all samples at dimension 0, and how many samples there are."""
    if trace.concrete_inputs is None and not trace.may_ask_constants:
        raise refusal(trace, what)
    program, samples = so_far(trace, tensors), trace.samples
    inputs = [*trace.origins, *trace.lifted]
    if trace.concrete_inputs is None:  # then closed-over tensors may still be asked, and what depends on them alone
        if any(p.users for p in program.placeholders[: program.n_inputs]):
            raise refusal(trace, what)
        program, inputs = closed(program), trace.lifted
    if samples is not None:
        sigs = [t.sig if t.__class__ is Traced else sig_of(t) for t in trace.origins]
        key = ("asked", *samples, *sigs)
        program = batched(program, samples, sigs, key)
    outer = outside(trace)
    if outer is None:
        values, count = run(program, inputs, what), 1
    else:
        with aside(outer, program, inputs) as results:
            values, count = batches(outer, results, what)
    if samples is None:
        return values, count
    with quiet():
        return [v.flatten(0, 1) for v in values], count * samples.size


def batched(program: Program, samples: Samples, sigs: Sequence[Any], key: tuple) -> Program:
    outs = [0] * program.n_outputs
    return program.derived(key, lambda: vmap(program, samples.dims, sigs, samples.size, samples.randomness, outs))


def refusal(trace: Trace, what: str) -> CaptureError:
    reason = trace.why_not or "this value belongs to a capture that is over"
    return CaptureError(
        f"{what} was asked for, but {reason}{at(user_line())}. Return it from the function (has_aux=True), use "
        "torch.where instead of `if`, or pass the value as a Python argument."
    )


def so_far(trace: Trace, tensors: Sequence[Tensor]) -> Program:
    """What has been recorded up to now as a program for the values of ``tensors``; it writes nothing back."""
    refs = tuple([trace.ref_of(t)[0] for t in tensors])

    def make() -> Program:
        b = Builder(REWRITES)
        f = Functionalizer(trace, b, input_nodes(trace, b))
        f.run()
        outs = [f.read(r) for r in refs]
        return Program(b.finish(outs), len(trace.inputs), len(refs), (), "asked")

    return _programs.once((trace.key(), refs), make)


def closed(program: Program) -> Program:
    """The program as one of its closed-over tensors alone, on which it depends."""

    def make() -> Program:
        b = Builder()
        rest = b.inputs(program.placeholders[program.n_inputs :])
        outs = b.splice(program.graph, [None] * program.n_inputs + rest, program.outputs)
        return Program(b.finish(outs), 0, program.n_outputs, (), "asked")

    return program.once("closed", make)


_programs = Cache(1 << 16, weight)


def outside(trace: Trace) -> Trace | None:
    """The recording in which this one goes on."""
    traces = under_way.traces
    place = traces.index(trace) if trace in traces else len(traces)
    return traces[place - 1] if place else None


@contextmanager
def aside(trace: Trace, program: Program, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The results of a program run next in ``trace``, which does not remember it afterwards."""
    records, count = len(trace.records), trace.count
    results = trace.record(CallStep(program, compiled), inputs)
    try:
        yield flat(results)
    finally:
        trace.forget(records, count)


def compiled(program: Program) -> Callable[..., tuple]:
    return program.once(compiled, lambda: compile_graph(lowered(program).graph))


def run(program: Program, inputs: Sequence[Tensor], what: str) -> list[Tensor]:
    """The program's results on real tensors, as the only sample; generators of random numbers are left as they were."""
    states = [(g, g.get_state()) for g in generators([]) | set(named_generators(program.graph.nodes))]
    reals = [t.tracer.value(t) if t.__class__ is Traced else t for t in inputs]
    if not all(map(has_values, reals)):
        raise CaptureError(f"{what} was asked for, but the inputs have no values{at(user_line())}")
    try:
        with quiet(), torch.no_grad():
            return [o.unsqueeze(0) for o in compiled(program)(*reals)]
    finally:
        for g, state in states:
            g.set_state(state)


def bits(x: Tensor) -> Tensor:
    """Equal where and only where the values are the same, NaN and signed zeros included."""
    if x.is_complex():
        return bits(torch.view_as_real(x.resolve_conj()))
    if x.is_floating_point():
        x = torch.where(x.isnan(), math.nan, x)
        return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    return x


def same(a: Any, b: Any) -> bool:
    """Whether two answers are the same: ``nan`` is itself, and 0.0 is not -0.0."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return bool(a.shape == b.shape and bits(a).eq(bits(b)).all())
    return a is b or (type(a) is type(b) and repr(a) == repr(b) and (a == b or a != a))

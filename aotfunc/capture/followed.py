"""Keep the values of a recording so far for all samples of the batches around it, so that each
step runs once, however often values are asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import Cache
from ..graph import Program, weight
from ..trace.emit import Builder
from ..trace.functionalize import Functionalizer, input_nodes
from ..trace.kinds import has_values
from ..trace.records import Record, n_new_values, written_slots
from ..trace.scalars import FIRST, bits_of
from ..trace.shapes.instr import Instr
from ..trace.shapes.sig import Sig, sig_of
from ..trace.traced import Traced, around, quiet, under_way
from ..trace.tracer import Trace
from ..transforms.tidy import REWRITES
from ..transforms.vmap import Axis, vmap
from .axes import AXES
from .calls import CallStep, Row, on_eager


class Samples(NamedTuple):
    """How a recording's inputs were sampled by ``vmap``: dimensions (or None), the axis."""

    dims: tuple[int | None, ...]
    axis: Axis


class Unsteady(Exception):
    """Raised for a recording that cannot be followed: a step writes, draws or looks back."""


def followed_batches(trace: Trace, tensors: Sequence[Tensor]) -> tuple[list[Tensor], int] | None:
    """Return :func:`batches` that runs each step once, however often called; else None."""
    try:
        follower = follow_trace(trace)
        return [follower.value(trace, trace.ref_of(t)[0]) for t in tensors], follower.count
    except Unsteady:
        return None


def follow_trace(trace: Trace) -> Followed:
    """Return the values of a recording, computed as far as it has come."""
    if trace.followed is None:
        trace.followed = Followed(trace)
    trace.followed.catch_up(trace)
    return trace.followed


class Followed:
    """A recording's values so far; those that ``differ`` for all samples, at dimension 0."""

    def __init__(self, trace: Trace) -> None:
        self.outer = samples_around(trace)
        self.count = samples_around(trace, itself=True)
        self.values: dict[int, Tensor] = {}
        self.stale: set[int] = set()  # values whose memory was written through another value
        dims = () if trace.samples is None else trace.samples.dims
        self.differ = {i for i, d in enumerate(dims) if d is not None}  # between the samples
        # number of steps that have been run, and of values by then
        self.done, self.number = 0, len(trace.inputs)

    def catch_up(self, trace: Trace) -> None:
        """Run the steps recorded since the last call."""
        new = trace.runnable(self.done)
        going_on = trace in under_way.traces and trace.concrete_inputs is not None
        # step outwards, to the values that this recording closes over
        written = any(t.mutates for t in under_way.traces if t is not trace)
        if not going_on or written or not self.count or not all(steady(r[0]) for r in new):
            raise Unsteady
        if AXES.sizes:  # here all batches around are one
            raise Unsteady
        for whole, steps in itertools.groupby(new, lambda record: record[0].__class__ is Row):
            if whole:
                self.take(trace, [*steps])
            else:
                self.run(trace, [*steps])

    def showing(self, trace: Trace, new: Sequence[Record]) -> set[int]:
        """Return the existing values that show memory which these steps write to."""
        roots = trace.roots().of
        written = {refs[s] for instr, refs, *_ in new for s in written_slots(instr)}
        shown = {roots.get(r, r) for r in written}
        if any(root < len(trace.inputs) for root in shown):
            raise Unsteady
        return {r for r in (*shown, *roots) if r < self.number and roots.get(r, r) in shown}

    def take(self, trace: Trace, rows: Sequence[Record]) -> None:
        """Take rows from batches that are already computed."""
        if self.outer != 1:
            raise Unsteady
        for _, (batch, _), *_ in rows:
            with quiet():
                self.values[self.number] = trace.lifted[~batch].detach()
            self.differ.add(self.number)
            self.number += 1
        self.done += len(rows)

    def run(self, trace: Trace, new: Sequence[Record]) -> None:
        """Run steps as one batched program of the values that they read."""
        old = self.showing(trace, new) if trace.mutates else set()
        refs, written, program = steps_as_program(new, self.number, trace.numbers, old)
        if len({trace.root(r) for r in written}) < len(written):  # each would change the other
            raise Unsteady
        values = [self.one(trace, r) for r in refs]
        dims = self.dims(refs)
        self.stale |= old.difference(written)
        number = self.number
        for instr, read, *_ in new:
            results = range(number, number := number + n_new_values(instr))
            if not self.differ.isdisjoint(read):
                shown = {trace.root(read[s]) for s in written_slots(instr)}
                there = (*written, *range(self.number, number)) if shown else ()
                self.differ.update(results, (r for r in there if trace.root(r) in shown))
        made = [*range(self.number, number), *written]
        samples, sigs = Samples(dims, Axis(self.count)), [*map(sig_of, values)]
        program = batched_program(program, samples, sigs, self.dims(made))
        with quiet(), torch.no_grad():
            self.values.update(zip(made, on_eager(program)(*values), strict=True))
        self.number = number
        self.done += len(new)

    def batch_of(self, trace: Trace, refs: Sequence[int]) -> list[tuple[Tensor, int | None]]:
        """Return the values, and the batch dimension of each."""
        return [*zip([self.one(trace, r) for r in refs], self.dims(refs), strict=True)]

    def dims(self, refs: Sequence[int]) -> tuple[int | None, ...]:
        """Return the batch dimension of each of these values."""
        return tuple([0 if r in self.differ else None for r in refs])

    def value(self, trace: Trace, ref: int) -> Tensor:
        """Return the value of :meth:`one` for all samples."""
        x = self.one(trace, ref)
        with quiet():
            return x if ref in self.differ else x.expand(self.count, *x.shape)

    def one(self, trace: Trace, ref: int) -> Tensor:
        """Return the value: all samples' if it differs, else the common one."""
        if ref in self.stale:
            raise Unsteady
        if ref not in self.values:
            self.values[ref] = self.given(trace, ref)
        return self.values[ref]

    def given(self, trace: Trace, ref: int) -> Tensor:
        """Return the value of an input, or of a tensor from outside."""
        t = trace.origins[ref] if ref >= 0 else trace.lifted[~ref]
        dim = trace.samples.dims[ref] if ref >= 0 and trace.samples is not None else None
        known = None
        if t.__class__ is Traced:
            if t.tracer not in under_way.traces:
                raise Unsteady
            # traces rules, for which nothing is set aside
            known = follow_trace(t.tracer).value(t.tracer, t.ref)
        elif not has_values(t) or not (trace.may_ask_constants or ref in trace.made_inside):
            raise Unsteady
        with quiet(), torch.no_grad():
            if dim is None and self.outer == 1:
                return t.detach() if known is None else known[0]
            self.differ.add(ref)
            if known is None:
                x = t.detach().expand(self.outer, *t.shape)
            else:
                x = repeat_samples(known, self.outer // len(known))
            if dim is None:
                return repeat_samples(x, self.count // self.outer)
            return x.movedim(dim % t.ndim + 1, 1).flatten(0, 1)


def samples_around(trace: Trace, itself: bool = False) -> int:
    """Return the number of samples of all batches around a recording together."""
    traces = [*around(trace), trace] if itself else around(trace)
    return math.prod(t.samples.axis.size for t in traces if t.samples is not None)


def repeat_samples(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.unsqueeze(1).expand(len(x), times, *x.shape[1:]).flatten(0, 1)


def steady(instr: Any) -> bool:
    """Return whether a step is a function of the tensors it reads, and writes no others."""
    facts = instr.facts
    if facts.random:
        return False
    return instr.__class__ in (CallStep, Row) or (
        instr.__class__ is Instr and not (facts.effect or facts.dynamic)
    )


def steps_as_program(
    records: Sequence[Record], number: int, numbers: Sequence[float], old: Collection[int]
) -> tuple[list[int], list[int], Program]:
    """Return ``(read, written, program)`` of these steps. The program takes the ``read`` values,
    which they do not make. It returns all that they make, from value ``number`` on, then the new
    values of those among ``old`` that they read. The rounds of a loop give the same program. The
    Python ``numbers`` are literals."""
    read: dict[int, Sig] = {}
    for instr, refs, *_ in records:
        known = (
            instr.sigs
            if instr.__class__ is Instr
            else [p.meta["val"] for p in instr.program.placeholders]
        )
        for r, sig in zip(refs, known, strict=True):
            if FIRST < r < number and (r not in read or instr.__class__ is Instr):
                read[r] = sig
    literals = {r: numbers[FIRST - r] for _, refs, *_ in records for r in refs if r <= FIRST}
    place = {r: i for i, r in enumerate(read)} | {r: FIRST - i for i, r in enumerate(literals)}
    shift = len(read) - number
    written = [r for r in read if r in old]
    ends = tuple(map(place.__getitem__, written))
    own = tuple(
        [
            (r[0], tuple([place[x] if x in place else x + shift for x in r[1]]), r[2], None, None)
            for r in records
        ]
    )

    def make() -> Program:
        trace, b = Trace(), Builder(REWRITES)
        trace.mutates = any(instr.facts.writes for instr, *_ in own)
        trace.inputs += read.values()
        trace.records += own
        trace.numbers += literals.values()
        f = Functionalizer(trace, b, input_nodes(trace, b))
        f.run()
        made = [f.read(r) for r in (*range(len(read), f.number), *ends)]
        return Program(b.finish(made), len(read), len(made), (), "asked")

    return (
        list(read),
        written,
        _programs.once((own, ends, *read.values(), bits_of(literals.values())), make),
    )


_programs = Cache(1 << 16, weight)


def batched_program(
    program: Program, samples: Samples, sigs: Sequence[Any], outs: Sequence[int | None]
) -> Program:
    """Return the program for all samples at once."""
    return program.derived(
        ("asked", *samples, *sigs, *outs),
        lambda: vmap(program, samples.dims, sigs, samples.axis, outs),
    )

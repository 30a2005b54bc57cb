"""Values on request: a recording run on its concrete inputs, as far as it has come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .memory import memory_of
from .records import Record, instr_run, results_of, written_slots
from .scalars import FIRST
from .shapes.instr import Instr
from .traced import Traced, has_values, quiet, under_way

if TYPE_CHECKING:
    from .tracer import Trace


class Replay:
    """Runs a recording on its concrete inputs, as far as it has come, on copies of what it writes;
    generators of random numbers are left as they were."""

    def __init__(self, trace: Trace) -> None:
        self.done = self.lifted = self.numbers = 0  # of the recording, so much
        self.env: dict[int, Any] = {}
        self.storages: dict[Any, Tensor] = {}  # copies keep sharing memory as the originals do
        # samples of a batch, and recordings inside of others, start at another state of the
        # generator, and so does each call of what is compiled once
        self.draws = (
            trace.samples is None
            and trace.may_ask_constants
            and under_way.traces[:1] in ([], [trace])
        )
        if trace.concrete_inputs is not None:
            for i, t in enumerate(trace.concrete_inputs):
                if t is not None and (real := known(trace, t)) is not None:
                    with quiet():
                        self.env[i] = self.copy(real)
        self.states: dict[torch.Generator, Tensor] = {}  # as what has been run left them
        self.number = len(trace.inputs)

    def copy(self, t: Tensor) -> Tensor:
        t = t.detach()
        key, _ = memory_of(t)
        if key not in self.storages:
            self.storages[key] = torch.empty(0, dtype=t.dtype, device=t.device).set_(
                t.untyped_storage().clone()
            )
        whole = self.storages[key]
        if whole.dtype != t.dtype:
            return t.clone()
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    def lose(self, trace: Trace, root: int) -> None:
        """Something unknown was written there."""
        for ref in [r for r in self.env if trace.root(r) == root]:
            del self.env[ref]

    def value(self, trace: Trace, ref: int) -> Tensor | None:
        """The value of a result of the recording; None if it depends on inputs that are not
        there."""
        new = trace.records[self.done :]
        with quiet(), torch.no_grad(), self.drawing(new):
            for i in range(self.lifted, len(trace.lifted)):
                t = trace.lifted[i]
                real = t if -1 - i in trace.made_inside else known(trace, t)
                if real is not None:
                    self.env[-1 - i] = self.copy(real)
            self.lifted = len(trace.lifted)
            for i in range(self.numbers, len(trace.numbers)):
                self.env[FIRST - i] = trace.numbers[i]
            self.numbers = len(trace.numbers)
            for instr, refs, *_ in new:
                if any(r not in self.env for r in refs) or (instr.facts.random and not self.draws):
                    for slot in written_slots(instr):
                        self.lose(trace, trace.root(refs[slot]))
                    self.number += results_of(instr)
                    continue
                for o in instr_run(instr, [self.env[r] for r in refs]):
                    self.env[self.number] = o
                    self.number += 1
            self.done += len(new)
        return self.env.get(ref)

    def drawing(self, records: Sequence[Record]) -> AbstractContextManager:
        """Generators meanwhile go on where the replay left them."""
        if all([instr.__class__ is Instr and not instr.facts.random for instr, *_ in records]):
            return nullcontext()
        return self.going_on(generators(records))

    @contextmanager
    def going_on(self, used: set[torch.Generator]) -> Iterator[None]:
        outside = {g: g.get_state() for g in used}
        for g in used:
            g.set_state(self.states.get(g, outside[g]))
        try:
            yield
            self.states.update((g, g.get_state()) for g in used)
        finally:
            for g, state in outside.items():
                g.set_state(state)


def generators(records: Sequence[Record]) -> set[torch.Generator]:
    """The generators that a recording may draw from: the devices' own, and those it names."""
    found = {torch.default_generator}
    if torch.cuda.is_initialized():
        found.update(torch.cuda.default_generators)
    for instr, *_ in records:
        if instr.facts.random:
            found.update(
                named_generators(
                    instr.program.graph.nodes if hasattr(instr, "program") else [instr]
                )
            )
    return found


def named_generators(calls: Iterable[Any]) -> list[torch.Generator]:
    """The generators among the arguments of recorded ops, or of nodes."""
    # isinstance(a, Generator) would run Python of torch's
    return [
        a
        for c in calls
        for a in (*c.args, *c.kwargs.values())
        if issubclass(a.__class__, torch.Generator)
    ]


def known(trace: Trace, t: Tensor) -> Tensor | None:
    """The real tensor that this is or stands for, if it has values that stay as they are until the
    next call."""
    if t.__class__ is Traced:
        return t.tracer._known(t)
    return t if trace.may_ask_constants and has_values(t) else None

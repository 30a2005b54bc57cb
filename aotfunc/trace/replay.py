"""Compute values on request: run a recording, up to its present end, on its concrete inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..debug import at, user_line
from ..errors import CaptureError
from .above import above
from .kinds import has_values
from .memory import storage_span
from .modes import device_generators, without_modes
from .numbers import refusal
from .records import Record, instr_run, n_new_values, written_slots
from .scalars import FIRST
from .seeds import named_generators
from .shapes.instr import Instr
from .tape import Tape
from .traced import Traced, quiet, under_way

#: so many elements take longer than to let a step wait
MANY = 1 << 12


class Replay:
    """A run of a recording on its concrete inputs, on copies of written tensors. Generators of
    random numbers keep their states.

    A step on many elements waits until its result is asked for, or something is written, drawn or
    called."""

    def __init__(self, trace: Answering) -> None:
        self.done = self.lifted = self.numbers = 0  # how far it has come
        self.crosses = False  # some tensors overlap that are copied apart
        self.env: dict[int, Any] = {}
        #: steps that wait, by the number of their first result, and that number for each result
        self.steps: dict[int, tuple[Instr, Sequence[int]]] = {}
        self.makers: dict[int, int] = {}
        #: copies share memory as the originals do: (its identity, first and last byte, copy)
        self.storages: list[tuple[int, int, int, torch.UntypedStorage]] = []
        # samples of a batch, recordings inside of others, and each call of a compiled function
        # start at another state of the generator
        self.draws = (
            trace.samples is None
            and trace.may_ask_constants
            and under_way.traces[:1] in ([], [trace])
        )
        if trace.concrete_inputs is not None:
            inputs = enumerate(trace.concrete_inputs)
            with quiet():
                self.take_copies((i, known(trace, t)) for i, t in inputs if t is not None)
        self.states: dict[torch.Generator, Tensor] = {}  # after the draws of this run
        self.number = len(trace.inputs)

    def take_copies(self, tensors: Iterable[tuple[int, Tensor | None]]) -> None:
        """Copy tensors that have values, those first whose memory may cover that of others."""
        found = [(r, t) for r, t in tensors if t is not None]
        for r, t in sorted(found, key=lambda x: -x[1].untyped_storage().nbytes()):
            self.env[r] = self.copy(t)

    def copy(self, t: Tensor) -> Tensor:
        t = t.detach()
        memory, start, stop = storage_span(t)
        meets = (x for x in self.storages if x[0] == memory and start < x[2] and x[1] < stop)
        known = next(meets, None)
        if known is None:
            known = memory, start, stop, t.untyped_storage().clone()
            self.storages.append(known)
        _, first, last, whole = known
        size = t.element_size()
        offset, odd = divmod(t.storage_offset() * size + start - first, size)
        if first <= start and stop <= last and not odd:
            new = torch.empty(0, dtype=t.dtype, device=t.device)
            return new.set_(whole, offset, t.shape, t.stride())
        self.crosses = True
        return t.clone()

    def lose(self, trace: Answering, root: int) -> None:
        """Forget the values that show the memory ``root``: an unknown value was written there."""
        of = trace.roots().of
        for ref in [r for r in self.env if of.get(r, r) == root]:
            del self.env[ref]

    def value(self, trace: Answering, ref: int) -> Tensor | None:
        """Return the value of a result; None if it depends on inputs without values."""
        new = trace.runnable(self.done)
        with quiet(), without_modes(trace.dtype), torch.no_grad(), self.drawing(new):
            lifted = ((-1 - i, trace.lifted[i]) for i in range(self.lifted, len(trace.lifted)))
            made = trace.made_inside
            self.take_copies((r, t if r in made else known(trace, t)) for r, t in lifted)
            self.lifted = len(trace.lifted)
            for i in range(self.numbers, len(trace.numbers)):
                self.env[FIRST - i] = trace.numbers[i]
            self.numbers = len(trace.numbers)
            for instr, refs, *_ in new:
                self.take(trace, instr, refs)
            self.run(self.needed(ref))
        return self.env.get(ref)

    def take(self, trace: Answering, instr: Any, refs: Sequence[int]) -> None:
        """Run the next step, or let it wait. Skip one that reads unknown values."""
        first = self.number
        if instr.__class__ is Instr and instr.simple and instr.size < MANY:
            if all([r in self.env for r in refs]):
                [self.env[first]] = instr_run(instr, [self.env[r] for r in refs])
                self.number, self.done = first + 1, self.done + 1
                return
        if self.crosses and written_slots(instr):
            raise CaptureError(
                "the value of a tensor was asked for after a write, and there are tensors whose "
                f"memories overlap and do not cover one another{at(user_line())}: pass clones"
            )
        waits, end = not instr.runs or may_wait(instr), first + n_new_values(instr)
        if not waits:
            self.run([*self.steps])
        known = instr.runs and all([r in self.env or r in self.makers for r in refs])
        if not known or (instr.facts.random and not self.draws):
            for slot in written_slots(instr):
                self.lose(trace, trace.root(refs[slot]))
        else:
            self.steps[first] = instr, refs
            self.makers.update(dict.fromkeys(range(first, end), first))
            if not waits:
                self.run([first])
        self.number, self.done = end, self.done + 1

    def needed(self, ref: int) -> list[int]:
        """Return the steps that wait and that a value depends on, in order."""
        found: set[int] = set()
        refs = [ref]
        while refs:
            first = self.makers.get(refs.pop())
            if first is not None and first not in found:
                found.add(first)
                refs += self.steps[first][1]
        return sorted(found)

    def run(self, steps: Sequence[int]) -> None:
        """Run steps that wait."""
        for first in steps:
            instr, refs = self.steps[first]
            for k, o in enumerate(instr_run(instr, [self.env[r] for r in refs]), first):
                self.env[k] = o
                del self.makers[k]
            del self.steps[first]

    def drawing(self, records: Sequence[Record]) -> AbstractContextManager:
        """Set the generators, inside the block, to where this run left them."""
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


def may_wait(instr: Any) -> bool:
    """Return whether a step gives the same later, as long as nothing is written."""
    facts = instr.facts
    return instr.__class__ is Instr and not (facts.writes or facts.random or facts.effect)


class Answering(Tape):
    """A recording that answers questions about the values of its tensors."""

    def value(self, t: Tensor, what: str = "the value of a tensor") -> Tensor:
        """Return the real value of ``t``: replay the recording on the concrete inputs."""
        return self.answer(lambda value: value, [t], what)

    def answer(self, question: Callable, tensors: Sequence[Tensor], what: str) -> Any:
        """Return ``question(*values)`` for ``tensors``; a batch must give one answer."""
        if not self.may_ask_constants and any(
            t.__class__ is not Traced and not self._made(t) for t in tensors
        ):
            raise refusal(what)
        for t in tensors:
            if t.__class__ is Traced and t.tracer.finished and t.tracer.why_not is None:
                above("check_inputs", t.tracer, t)
        values = [self.known_value(t) for t in tensors]
        if any(v is None for v in values):
            inner = (
                tensors[0].tracer if len(tensors) == 1 and tensors[0].__class__ is Traced else self
            )
            if inner.ask is None:
                raise inner.unanswered(what)
            return inner.ask(inner, question, tensors, what)
        with quiet(), torch.no_grad():
            return question(*values)

    def runnable(self, start: int) -> list[Record]:
        """Return the records from ``start`` on, with calls in place of steps that look back, where
        these can be replaced."""
        found = enumerate(self.records[start:], start)
        return [r if r[0].runs else r[0].replayed(self, k) or r for k, r in found]

    def unanswered(self, what: str) -> CaptureError:
        reason = self.why_not or "this value belongs to a capture that is over"
        return CaptureError(
            f"{what} was asked for, but {reason}{at(user_line())}. Return the "
            "tensor and ask it after the call, use torch.where instead of `if`, or pass the value "
            "as a Python argument."
        )

    def _made(self, t: Tensor) -> bool:
        """Return whether ``f`` makes the constant ``t`` anew on each run."""
        return self._lift_refs.get(id(t)) in self.made_inside

    def known_value(self, t: Tensor) -> Tensor | None:
        """Return the value of ``t`` if it depends on known inputs only."""
        if t.__class__ is Traced and t.tracer is not self:
            return t.tracer.known_value(t)
        ref = t.ref if t.__class__ is Traced else self._lift_refs.get(id(t))
        if ref is None or (t.__class__ is not Traced and not self.mutates):
            return t
        if self.finished and self.concrete_inputs is None:
            return None
        if self._values is None:
            self._values = Replay(self)
        return self._values.value(self, ref)


def generators(records: Sequence[Record]) -> set[torch.Generator]:
    """Return the generators that a recording may draw from: each device's own, and named ones."""
    found = {*device_generators()}
    for instr, *_ in records:
        if instr.facts.random:
            found.update(
                named_generators(
                    instr.program.graph.nodes if hasattr(instr, "program") else [instr]
                )
            )
    return found


def known(trace: Answering, t: Tensor) -> Tensor | None:
    """Return the real tensor that ``t`` stands for, if its values stay until the next call."""
    if t.__class__ is Traced:
        return t.tracer.known_value(t)
    return t if trace.may_ask_constants and has_values(t) else None

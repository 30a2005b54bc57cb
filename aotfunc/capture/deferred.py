"""Record backwards when a gradient is taken: autograd calls the backwards of Functions and hooks
after the function is over, and they read Python's variables as they are by then.

Tensors that they read go into their step, where the function was applied. A tensor that is made or
written to later has no place there, and the derivative that reads it is refused.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Node

from ..debug import Line, at
from ..errors import CaptureError, CheckpointWarning
from ..graph import Program
from ..trace.marks import no_tangent
from ..trace.node_views import view_source
from ..trace.records import instr_op, n_new_values, written_slots
from ..trace.scalars import FIRST
from ..trace.traced import under_way
from ..trace.tracer import Trace
from .calls import CallStep, CompiledCall
from .custom_derivative import CustomDerivative, RuleProgram
from .grad_step import GradStep
from .live_hooks import LiveHooks


def calls_late(*functions: Callable) -> None:
    """Note functions that autograd calls later, when variables that they read may differ."""
    for trace in under_way.traces:
        if not trace.may_ask_constants:
            trace.late += functions


class Deferred:
    """A step whose backward waits. ``make(self)`` returns the step with its backward, and the
    numbers of the other values that the backward reads."""

    def __init__(
        self, trace: Trace, name: str, raw: Sequence[Tensor], results: Sequence[Any], saved: Any
    ) -> None:
        """Remember that the last record of another layer turned ``raw`` into ``results``; autograd
        itself guards the tensors ``saved`` against writes."""
        self.trace, self.name, self.record = trace, name, len(trace.records) - 1
        while instr_op(trace.records[self.record][0]) is no_tangent:
            self.record -= 1
        self.count = trace.count - len(results)
        self.raw = {new.ref: trace.ref_of(o)[0] for o, new in zip(raw, results, strict=True)}
        self.saved = {id(t): (trace.ref_of(t)) for t in saved if isinstance(t, Tensor)}
        self.written_from = len(trace.records)
        self.make: Callable[[Deferred], tuple[Any, list[int]]]
        self.made: Any = None
        #: hooks that may be given to autograd instead
        self.hooks: LiveHooks | None = None
        self.live = False

    def wait(self, make: Callable[[Deferred], tuple[Any, list[int]]]) -> None:
        """Defer the backward from here on: it would see later writes, and the recording cannot."""
        self.make, self.written_from = make, len(self.trace.records)
        self.trace.deferred.append(self)

    def refs(self, tensors: Sequence[Tensor]) -> list[int] | CaptureError:
        """Return the values that a backward reads, as they are before the step."""
        found: list[int] = []
        written: set[Any] = set()
        for t in tensors:
            ref, sig = self.trace.ref_of(t)
            if self.saved.get(id(t), (ref, sig))[1] is not sig:
                return self.error("saves a tensor that is reshaped")
            if id(t) in self.saved:
                found.append(self.saved[id(t)][0])
                continue
            before = self.raw.get(ref, ref)
            while before >= self.count and (older := self.unhooked(before)) is not None:
                before = older
            if before >= self.count:
                return self.error("reads a tensor that is computed")
            if self.trace.mutates:
                written = written or written_memory(self.trace, self.written_from)
                if not written.isdisjoint(memory_group(self.trace, r) for r in (ref, before)):
                    return self.error("reads a tensor that is written to")
            found.append(before)
        return found

    def unhooked(self, ref: int) -> int | None:
        return next((s.old for s in self.trace.stand_ins if s.hooks and s.new == ref), None)

    def settle(self) -> None:
        """Record the present backward, unless nobody will take a gradient. It waits on, and must
        be the same when settled again."""
        if self.made is None and self.unasked():
            return
        step, refs = self.make(self)
        derivative = step.derivative
        rules = [p if isinstance(p, RuleProgram) else type(p) for p in derivative.rules]
        before, self.made = self.made, (rules, refs)
        if before not in (None, self.made):
            raise self.error("reads what changes")
        _, given, *rest = self.trace.records[self.record]
        k, n = derivative.n_outputs, len(given) - derivative.n_inputs
        self.trace.records[self.record] = (step, (*given[:k], *refs, *given[n:]), *rest)

    def unasked(self) -> bool:
        """Return whether no gradient will be taken: the outermost ``vmap`` is called on real
        tensors, and none from which these are computed requires grad."""
        trace = self.trace
        if trace.samples is None or under_way.traces[0] is not trace:
            return False
        if forward_ad._current_level >= 0:
            return False
        given = [*trace.origins, *trace.lifted]
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, given)):
            return False
        return trace.autograd.active().isdisjoint((*self.raw, *self.raw.values()))

    def error(self, what: str) -> CaptureError:
        return too_late(f"the backward of {self.name} {what}", self.trace.records[self.record][4])


def too_late(what: str, line: Line | None) -> CaptureError:
    return CaptureError(
        f"{what} afterwards{at(line)}, which it would see when autograd calls it: let it read a "
        "clone() made before"
    )


def written_memory(trace: Trace, start: int, count: int | None = None) -> set[Any]:
    """Return the memory that ``count`` records from ``start`` on, or all of them, write to."""
    later = trace.records[start:][:count]
    return {
        memory_group(trace, refs[s]) for instr, refs, *_ in later for s in written_slots(instr)
    }


def memory_group(trace: Trace, ref: int) -> Any:
    root, count = trace.root(ref), len(trace.inputs)
    if root >= count:
        return root
    return "outside", trace.layout()[trace.position(root)].group


# ----- what checkpoints and nested compiled functions read ---------------------------------------


def check_checkpoints(trace: Trace) -> None:
    """Refuse a write, before a gradient is taken, to a tensor that a checkpoint reads and its
    recomputation would read again. The checkpoint's own writes, such as statistics, do not count:
    they are made once, and not read."""
    if not trace.regions:
        return
    regions: dict[int, list[tuple[int, range]]] = {}
    number = len(trace.inputs)
    for k, (instr, _, _, region, _) in enumerate(trace.records):
        made = range(number, number := number + n_new_values(instr))
        if region is not None:
            regions.setdefault(region, []).append((k, made))
    for inside in regions.values():
        own = {r for _, made in inside for r in made}
        if trace.autograd.active().isdisjoint(own):
            continue
        steps, (last, _) = [trace.records[k] for k, _ in inside], inside[-1]
        read = {
            memory_group(trace, r)
            for _, refs, *_ in steps
            for r in refs
            if r not in own and r > FIRST
        }
        own_writes = {
            memory_group(trace, refs[s]) for i, refs, *_ in steps for s in written_slots(i)
        }
        if any(type(group) is tuple for group in own_writes):
            warnings.warn(
                f"a checkpoint writes to a tensor from outside{at(steps[0][4])}, as batch norm to "
                "its running statistics: once, where eager mode writes again in the backward",
                CheckpointWarning,
                stacklevel=2,
            )
        read -= own_writes
        later = trace.records[last + 1 :]
        taken = next((k for k, r in enumerate(later) if isinstance(r[0], GradStep)), None)
        if not read.isdisjoint(written_memory(trace, last + 1, taken)):
            raise too_late("a checkpoint reads a tensor that is written to", steps[0][4])


def check_calls(trace: Trace) -> None:
    """Refuse a write to a value that the backward of a nested compiled function reads."""
    if not any(isinstance(r[0], CallStep) for r in trace.records):
        return
    number = len(trace.inputs)
    for k, (instr, refs, grad, _, line) in enumerate(trace.records):
        made = range(number, number := number + n_new_values(instr))
        if not (grad and isinstance(instr, CallStep)):
            continue
        inputs, results = unguarded(instr.program)
        read = {
            memory_group(trace, r)
            for r in (*(refs[i] for i in inputs), *(made[i] for i in results))
        }
        if read and not trace.autograd.active().isdisjoint(refs):
            if not read.isdisjoint(written_memory(trace, k + 1)):
                raise too_late(
                    "the backward of a nested compiled function reads a tensor that is written to",
                    line,
                )


def unguarded(program: Program, again: bool = False) -> tuple[list[int], list[int]]:
    """Return the inputs and results that the backwards in a program read and autograd does not
    guard against writes; ``again``: those that its checkpoints read when they recompute."""

    def find() -> tuple[list[int], list[int]]:
        read: set[Any] = set()
        for n in program.graph.nodes:
            region = n.meta.get("region")
            if again and region is not None:
                read.update(shown_by(i) for i in n._input_nodes if i.meta.get("region") != region)
            elif isinstance(n.target, CustomDerivative) and not again:
                residuals = n.target.parts(n)[2]
                read.update(shown_by(residuals[k]) for k in n.target.unguarded)
            if isinstance(n.target, CompiledCall):
                inputs, results = unguarded(n.target.program, again)
                read.update(shown_by(n.args[i]) for i in inputs)
                read.update(u for u in n.users if u.args[1] in results)
        outs = [shown_by(o) for o in program.outputs]
        finals = dict(zip(program.mutated, outs[program.n_outputs :], strict=True))
        own = [o for o in outs[: program.n_outputs] if isinstance(o, Node)]
        # a checkpoint reads its own statistics as they are by then
        seen = lambda i, p: p in read and i not in finals if again else {p, finals.get(i)} & read
        return (
            [i for i, p in enumerate(program.placeholders) if seen(i, p)],
            [i for i, o in enumerate(own) if o in read],
        )

    return program.once(("unguarded", again), find)


def shown_by(n: Any) -> Any:
    """Return the node whose memory ``n`` shows, as a view of it or as a Function's result."""
    while isinstance(n, Node):
        source, item = n.args if n.target is operator.getitem else (n, 0)
        if isinstance(source.target, CustomDerivative):
            n = source.target.parts(source)[1][item]
        elif (above := view_source(n)) is not None:
            n = above
        else:
            break
    return n

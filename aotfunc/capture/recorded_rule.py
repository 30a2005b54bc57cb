"""Record one rule of a user's, a backward, a jvp or a hook, as a program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import CaptureError
from ..graph import Program
from ..trace.recording import record_into
from ..trace.shapes.sig import Sig
from ..trace.traced import Traced, current, quiet
from ..trace.tracer import Trace
from ..transforms.walk import builder, made_node
from .captured import Captured
from .concretize import agreed


class RuleUnderWay:
    """A derivative that is being recorded: what ``calls`` it, the tensors of its context, and
    those that it is known to close over."""

    def __init__(self, calls: Any, kept: Sequence[Tensor], closed: Sequence[Tensor]) -> None:
        self.calls, self.kept, self.closed = calls, kept, closed
        #: it applies its own Function; with functions among the arguments
        self.again = self.with_functions = False

    def closed_over(self, functions: bool) -> list[Tensor]:
        """Return what an application of its own Function must be handed: ``functions`` among its
        arguments may close over tensors from outside that the context keeps, too."""
        self.again, self.with_functions = True, self.with_functions or functions
        outside = [t for t in self.kept if functions and t.__class__ is not Traced]
        return [*self.closed, *outside]


class RecordedNow(threading.local):
    def __init__(self) -> None:
        self.rules: list[RuleUnderWay] = []
        self.compared: list[Any] = []  # the keys of those recorded for a comparison

    def of(self, calls: Any) -> RuleUnderWay | None:
        return next((r for r in reversed(self.rules) if r.calls == calls), None)


recorded_now = RecordedNow()


def with_numbers(program: Program, made: Sequence[Tensor]) -> Program:
    """Return a rule that makes these tensors of numbers, its last inputs, itself."""
    if not made:
        return program
    with quiet():
        key = tuple([(t.dtype, t.device, t.shape, repr(t.tolist())) for t in made])

    def make() -> Program:
        b, count = builder(), program.n_inputs
        inputs = b.inputs(program.placeholders[:count])
        with quiet():
            numbers = [made_node(b, t) for t in made]
        outs = b.inlined(program, [*inputs, *numbers])
        return Program(b.finish(outs), count, len(outs), (), program.name)

    return program.once(("numbers", key), make)


def recorded_rule(
    name: str,
    rule: Callable,
    sigs: Sequence[Sig],
    calls: Any,
    kept: Sequence[Tensor] = (),
    closed: Sequence[Tensor] | None = None,
) -> Any:
    """Return ``(program, recording)`` of a rule on values with these signatures, a result per
    leaf; or the error that it raised. A rule that applies its own Function is recorded again once
    it is known what it has ``closed`` over beside what its context ``kept``: this application must
    hand it on."""
    why_not = f"the derivative of {name} is recorded, without values"
    if name.startswith(("hook", "a hook")):
        why_not = (
            "a hook inside a captured function is recorded, without values: register it outside, "
            "on an argument, a parameter or a result"
        )
    inner = Trace(why_not, ask=agreed)
    inner.of_a_rule = True
    values = [inner.input_like(sig) for sig in sigs]
    inner.autograd.leaves.update((t.ref, True) for t in values)
    now = RuleUnderWay(calls, () if closed is None else kept, closed or ())
    recorded_now.rules.append(now)
    try:
        rec = record_into(inner, lambda: Captured(inner, rule(*values), lambda: ()))
    except NotImplementedError as e:
        return CaptureError(f"{name} has no derivative: {e}")
    except Exception as e:
        # the user's error is raised when this derivative is taken, as in eager
        return e.with_traceback(None)
    finally:
        recorded_now.rules.pop()
    if now.again and closed is None:
        found = [t for t in inner.foreign() if not any(t is k for k in kept)]
        if found or now.with_functions:
            return recorded_rule(name, rule, sigs, calls, kept, found)
    base = rec.program()
    trace = current()
    if inner.strided and trace is not None:
        trace.strided = True
    if base.mutated:
        return CaptureError(
            f"the backward or jvp of {name} writes to what it was given or saved; clone() it "
            "there first"
        )
    if len(rec.tensors) == len(rec.leaves):
        return base, inner

    def with_nones() -> Program:
        b = builder()
        outs = b.inlined(base, b.inputs(base.placeholders))
        full: list = [None] * len(rec.leaves)
        for i, o in zip(rec.tensors, outs, strict=False):
            full[i] = o
        return Program(b.finish(full), base.n_inputs, len(full), (), "backward")

    return base.once(("gaps", tuple(rec.tensors), len(rec.leaves)), with_nones), inner

"""The Python state that a backward reads when autograd calls it: hooks, and the backwards of
Functions and checkpoints, look variables up by then. A compiled one has the values of its call,
and refuses if one of them has changed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..capture.custom_derivative import CustomDerivative
from ..errors import AotfuncError
from ..graph import Program
from .guards.keys import TensorFacts
from .guards.reads import Names
from .guards.state import look

if TYPE_CHECKING:
    from .entry import Entry

#: names by which state is read; None for any name
Read = frozenset[str] | None


def read_late(late: Sequence[Any], opened: set[str]) -> Read:
    """Return the names by which functions that are called late read their state, and such names;
    ``opened`` are the libraries whose code is followed."""
    functions = [x for x in late if callable(x)]
    names, found = Names(), set[str]()
    names.opened |= opened
    modes, names.of_torch = names.of_torch, set()  # they matter where there are modules
    if functions:
        look(functions[0], functions, ["late"] * len(functions), names)
        found = names.attributes | names.variables | names.written
        found |= names.of_torch | modes if names.of_torch else set()
    if names.any or None in late:
        return None
    return frozenset(found.union(*[x for x in late if isinstance(x, frozenset)]))


def reads_state(program: Program) -> bool:
    """Return whether the backward of a program calls functions of the user's."""

    def find() -> bool:
        return any(
            "region" in n.meta
            or isinstance(n.target, CustomDerivative)
            or (hasattr(n.target, "program") and reads_state(n.target.program))
            for n in program.graph.nodes
        )

    return program.once("reads state", find)


class Moment:
    """The state of a compiled function at the end of a call."""

    def __init__(self, entry: Entry, f: Callable, objects: Sequence[Any]) -> None:
        self.entry, self.f, self.objects = entry, f, objects
        self.tensors: Sequence[Tensor] | None = None
        self.facts: list[tuple[str, Any]] = entry.reached

    def take(self) -> None:
        self.tensors = self.entry.check.tensors(self.f, self.objects)
        if self.tensors is None:  # the function changes what it reads
            self.facts, self.tensors = self.now()

    def now(self) -> tuple[list[tuple[str, Any]], Sequence[Tensor]]:
        state = look(self.f, self.objects, self.entry.labels, self.entry.names)
        return state.facts, state.tensors

    def check(self, name: str) -> None:
        """Raise AotfuncError if the state that the backward reads has changed."""
        tensors = self.entry.check.tensors(self.f, self.objects)
        if self.tensors is None or (tensors is not None and same_objects(tensors, self.tensors)):
            return
        for label in changed_labels(self.facts, self.tensors, *self.now()):
            if self.entry.late is None or not self.entry.late.isdisjoint(last_names(label)):
                raise AotfuncError(
                    f"{label} is another than it was at the call of {name}, whose backward reads "
                    "it, in a hook, a Function or a checkpoint; eager reads what is there by now: "
                    "change it after the backward, and register a hook that changes it outside of "
                    "a checkpoint"
                )


def same_objects(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    return len(xs) == len(ys) and all(x is y for x, y in zip(xs, ys, strict=True))


def changed_labels(
    facts: list[tuple[str, Any]],
    tensors: Sequence[Tensor],
    facts_now: list[tuple[str, Any]],
    tensors_now: Sequence[Tensor],
) -> Iterator[str]:
    """Yield the labels of facts that have changed."""
    old, new = dict(facts), dict(facts_now)
    for label in {**old, **new}:
        if label not in old or label not in new or repr(old[label]) != repr(new[label]):
            yield label
    before, now = by_label(facts, tensors), by_label(facts_now, tensors_now)
    yield from (label for label in before if now.get(label) is not before[label])


def by_label(facts: list[tuple[str, Any]], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    labels = [label for label, x in facts if isinstance(x, TensorFacts)]
    return dict(zip(labels, tensors, strict=True))


def last_names(label: str) -> set[str]:
    """Return the names by which code reaches a label's object, in its last step."""
    steps = [s for s in label.split(".") if not s.endswith(("__", "()"))]
    return set(re.findall(r"\w+", steps[-1])) if steps else set()


class _Now(threading.local):
    moment: Moment | None = None


_now = _Now()


def moment() -> Moment | None:
    """Return the moment of the call under way in this thread, if its backward reads late."""
    return _now.moment


@contextmanager
def at_moment(m: Moment | None) -> Iterator[None]:
    """Let what runs inside the block belong to this moment."""
    before, _now.moment = _now.moment, m
    try:
        yield
    finally:
        _now.moment = before


def late_reader(entry: Entry, f: Callable, objects: Sequence[Any], call: Callable[[], Any]) -> Any:
    """Return the result of a call whose backward reads late."""
    if not torch.is_grad_enabled():
        return call()
    m = Moment(entry, f, objects)
    with at_moment(m):
        result = call()
    m.take()
    return result

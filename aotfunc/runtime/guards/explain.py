"""Explain what entries of a compiled function depend on, and why it was captured again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch.distributions import Distribution

from .keys import ENVIRONMENT, USUAL_CASTS, AnyNumber, Named, TensorFacts, environment_key

Facts = dict[str, Any]


class Explanation(str):
    """A text that shows itself as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class History:
    """The reasons for a function's captures."""

    def __init__(self) -> None:
        self.programs: list[Facts] = []  # of the first captures of a program each
        self.warned = False
        self.last: tuple[list[Facts], Facts] | None = None  # see note
        self.changed: tuple[Facts, Facts] | None = None  # by the last capture itself

    def note(self, entries: list[Facts], captured: Facts) -> None:
        """Remember the last capture, and the entries before it."""
        self.last = entries, captured

    def why(self) -> list[str]:
        """Return how the last capture differs from the entry most like it, and why."""
        why: list[str] = []
        if self.last is not None and self.last[0]:
            why = min([[*differences(old, self.last[1])] for old in self.last[0]], key=len)
            why = why or [
                "what it reads is arranged in another way, or arguments are one tensor or share "
                "memory"
            ]
        if self.changed is not None:
            found = differences(*self.changed)
            why += [f"it changed while it ran, and is not kept: {x}" for x in found]
        return why

    def growth(self, facts: Facts, limit: int) -> str | None:
        """Return the warning about the ``limit``-th program, once."""
        if self.warned:
            return None
        self.programs.append(facts)
        if len(self.programs) < limit:
            return None
        self.warned, programs, self.programs = True, self.programs, []
        return growth(programs)


def facts_of(given: Facts, reached: Sequence[tuple[str, Any]]) -> Facts:
    """Return what an entry depends on, by name: arguments, what it reads, surroundings."""
    return {**given, **dict(reached), **dict(zip(ENVIRONMENT, environment_key(), strict=False))}


def differences(old: Facts, new: Facts) -> Iterator[str]:
    """List what differs between two captures."""
    for name in {**old, **new}:
        if name not in new:
            yield f"{name} was {worded(old[name])}, and is not there any more"
        elif name not in old:
            yield f"{name} is {worded(new[name])}, and was not there before"
        elif isinstance(old[name], AnyNumber) and type(new[name]).__name__ == old[name].value:
            continue
        elif old[name] is not new[name] and repr(old[name]) != repr(new[name]):
            yield f"{name} was {worded(old[name])}, and is {worded(new[name])}"


def changing(history: Sequence[Facts]) -> list[tuple[str, Any]]:
    """Return which of the described things took many values: ``(name, latest value)``."""
    found = []
    for name, latest in history[-1].items():
        values = {repr(h[name]) for h in history if name in h}
        if len(values) > len(history) // 2:
            found.append((name, latest))
    return found


def guards(facts: Facts) -> list[str]:
    """Return a line for each thing that an entry depends on and that is not as always."""
    usual = (True, False, -1, torch.float32, None, None, False)
    validates = Distribution._validate_args
    hidden = dict(zip(ENVIRONMENT, (*usual, validates, USUAL_CASTS), strict=False))
    lines = []
    for name, x in facts.items():
        if name in hidden and repr(hidden[name]) == repr(x):
            continue
        if x is None and name.endswith(("__defaults__", "__kwdefaults__")):
            continue
        sign = (
            ":"
            if isinstance(x, TensorFacts)
            else " is"
            if isinstance(x, Named | bool | Enum | None)
            else " =="
        )
        lines.append(f"{name}{sign} {worded(x)}")
    return lines


def worded(x: Any) -> str:
    text = str(x) if isinstance(x, TensorFacts | Named) else repr(x)
    return text if len(text) <= 200 else f"{text[:200]}…"


def explained(
    who: str,
    captures: int,
    entries: Sequence[Facts],
    why: Sequence[str],
    eagerly: Sequence[str] = (),
) -> Explanation:
    """Return the text that ``explain`` shows."""
    count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    lines = [f"{who}: captured {captures} {'time' if captures == 1 else 'times'}, {count}"]
    for i, facts in enumerate(entries):
        lines += [f"entry {i}:", *[f"  {line}" for line in guards(facts)]]
    if why:
        lines += ["captured last because:", *[f"  {line}" for line in why]]
    if eagerly:
        lines += ["run eagerly:", *[f"  {line}" for line in eagerly]]
    return Explanation("\n".join(lines))


def growth(history: Sequence[Facts]) -> str:
    """Say what keeps changing, and how to avoid it."""
    guilty = changing(history)
    given = [
        (name.removeprefix("argument "), x) for name, x in guilty if name.startswith("argument ")
    ]
    numbers = [name for name, x in given if isinstance(x, int | float | complex)]
    others = [name for name, x in given if name not in numbers]
    reached = [name for name, _ in guilty if not name.startswith("argument ")]
    why = []
    if numbers:
        many = ", ".join(numbers)
        why.append(
            f"its Python argument {many} keeps changing; every value is a new signature: pass it "
            "as a tensor"
        )
    if others:
        why.append(f"the shape, dtype or value of {', '.join(others)} keeps changing")
    if reached or not guilty:
        many = ", ".join(reached) or "a global or the mode of a module"
        why.append(
            f"what it reads or closes over, {many}, keeps changing; keep it in a tensor, or write "
            "to it elsewhere"
        )
    return "; ".join(why)

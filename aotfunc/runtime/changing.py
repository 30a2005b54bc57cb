"""Find the Python numbers that may change without another capture: those among a call's arguments
that the function only computes with.

A number that has changed since an earlier call is followed by the next capture
(:mod:`~aotfunc.trace.following`). Where nothing asked for its value, the entry serves all values
of it: the inputs of its program are computed anew from the numbers of the call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..capture.captured import Captured
from ..trace.following import KINDS, Following, Recipe
from ..trace.seeds import rewinder
from .guards.keys import bits
from .guards.state import State
from .guards.stores import undo_changes

if TYPE_CHECKING:
    from .entry import Entry

#: entries kept for calls that differ in numbers alone
KEPT = 8


def with_any_numbers(key: tuple) -> tuple[tuple, list[float]]:
    """Return the key of all calls that differ from this one in numbers alone, and the numbers of
    this one. A number stands behind its class."""
    places = [i for i, part in enumerate(key, 1) if part is float or part is int]
    values = [float.fromhex(x) if type(x := key[i]) is str else x for i in places]
    parts = list(key)
    for i in places:
        parts[i] = None
    return tuple(parts), values


class Family:
    """Calls that differ in numbers alone: the numbers of the first, which of them have changed,
    which a capture asked for, and the entries that serve many calls."""

    def __init__(self, values: Sequence[float]) -> None:
        self.first = values
        self.changed: set[int] = set()
        self.asked: set[int] = set()
        self.entries: list[tuple[Served, weakref.ref[Entry]]] = []

    def following(
        self, values: Sequence[float], leaves: Sequence[Any], rounds: bool
    ) -> Following | None:
        """Return the numbers that the capture of a call with these leaves follows. A number that
        is a part of a leaf, such as a slice, is not followed, nor are those beside it."""
        pairs = enumerate(zip(values, self.first, strict=True))
        self.changed |= {i for i, (x, y) in pairs if bits(x) != bits(y)}
        places = [i for i, x in enumerate(leaves) if type(x) in KINDS]
        if [*map(bits, values)] != [bits(leaves[i]) for i in places]:
            return None
        found = {i: values[i] for i in sorted(self.changed - self.asked)}
        return Following(found, places, rounds) if found else None

    def keep(self, served: Served, entry: Entry) -> None:
        self.entries = [(served, weakref.ref(entry)), *self.entries[: KEPT - 1]]

    def serving(self, values: Sequence[float]) -> Iterator[tuple[Entry, list[tuple[int, Tensor]]]]:
        """Yield the entries for a call with these numbers, and the inputs that stand for them."""
        for served, ref in self.entries:
            if (entry := ref()) is not None and (inputs := served.inputs(values)) is not None:
                yield entry, inputs


class Served:
    """The calls that an entry serves: any numbers at ``free`` places, these at others."""

    def __init__(
        self, following: Following, free: Collection[int], values: Sequence[float], entry: Entry
    ) -> None:
        self.fixed = [(i, bits(x)) for i, x in enumerate(values) if i not in free]
        self.recipe = Recipe(following, entry.sources)

    def inputs(self, values: Sequence[float]) -> list[tuple[int, Tensor]] | None:
        """Return the tensors that stand for the numbers; None for a call not served."""
        if any(bits(values[i]) != x for i, x in self.fixed):
            return None
        return self.recipe.inputs_for(values)


def followed(
    captured: Callable[[Following | None], Captured], following: Following, state: State
) -> Captured:
    """Return a capture that follows numbers, unless something takes numbers alone."""
    rewind = rewinder()
    try:
        rec = captured(following)
        if not following.escaped():
            return rec
    except Exception:  # the function's own comes again
        pass
    following.ask()
    undo_changes(state)
    rewind()
    return captured(None)

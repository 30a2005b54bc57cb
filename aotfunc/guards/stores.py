"""Tensors that a function binds in the state it reaches: ``self.state = new``, a cache filled, a closure variable.

During the capture such a value is a traced one. It becomes one more result of the program, and every call puts the real
tensor in its place, which the state's paths find; a capture that fails puts back what was there.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils._pytree import tree_leaves

from ..trace.traced import Traced
from .state import State

_NOTHING = object()


class Place(NamedTuple):
    """The entry ``key`` of an owner: the dictionary of an object, the globals, another dictionary, a list or a cell."""

    owner: int
    key: Any
    value: Any


def traced(x: Any) -> list[Traced]:
    """The traced values in a tree."""
    leaves = tree_leaves(x) if isinstance(x, list | tuple | dict) else [x]
    return [e for e in leaves if e.__class__ is Traced]


def entries(owner: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(owner, types.CellType):
        try:
            yield "cell_contents", owner.cell_contents
        except ValueError:  # not bound
            return
    else:
        table = hasattr(owner, "items")  # those of scripted modules are no dicts
        yield from list(owner.items() if table else enumerate(owner))


def left_behind(state: State, all_of_them: bool = False) -> list[Place]:
    """Where the function has put traced values since the state was looked at."""
    found = []
    for i, (owner, _, before) in enumerate(state.owners):
        for key, value in entries(owner):
            if value is not before.get(key, _NOTHING) and (values := traced(value)):
                if any(t.tracer.finished for t in values) and not all_of_them:  # an inner transform's: a leak
                    continue
                found.append(Place(i, key, value))
    return found


def put(owner: Any, key: Any, value: Any) -> None:
    if isinstance(owner, types.CellType):
        owner.cell_contents = value
    else:
        owner[key] = value


def put_back(state: State) -> None:
    """Undo what :func:`left_behind` finds."""
    for place in left_behind(state, all_of_them=True):
        owner, _, before = state.owners[place.owner]
        if place.key in before:
            put(owner, place.key, before[place.key])
        elif isinstance(owner, list):
            del owner[place.key :]
        elif isinstance(owner, dict):
            del owner[place.key]
        else:
            del owner.cell_contents


class Stores:
    """The places in which every call of an entry puts the last of its results."""

    def __init__(self, state: State, places: Sequence[Place]) -> None:
        self.keys = [p.key for p in places]
        self.captured = [state.owners[p.owner][0] for p in places]
        names = [state.owners[p.owner][1] for p in places]
        lines = needed(state.lines, names)
        body = "".join(f"    {line}\n" for line in lines)
        space = dict(state.constants)
        exec(f"def owners(f, objects):\n{body}    return [{', '.join(names)}]\n", space)
        self.owners: Callable[[Callable, Sequence[Any]], list] = space["owners"]

    def put(self, f: Callable, objects: Sequence[Any], result: Any, values: Sequence[Any]) -> Any:
        """Put the values in their places; the result that the caller gets."""
        for owner, key, value in zip(self.owners(f, objects), self.keys, values, strict=True):
            put(owner, key, value)
        return result

    def first(self, result: Any, values: Sequence[Any]) -> Any:
        """The same right after the capture, when the state may be another one already."""
        for owner, key, value in zip(self.captured, self.keys, values, strict=True):
            put(owner, key, value)
        self.captured = []
        return result


def needed(lines: Sequence[str], names: Sequence[str]) -> list[str]:
    """The lines that bind these variables, and those that they are made of."""
    wanted, found = set(re.findall(r"\bv\d+\b", " ".join(names))), []
    for line in reversed(lines):
        name, bound, expr = line.partition(" = ")
        if bound and name in wanted:
            found.append(line)
            wanted.update(re.findall(r"\bv\d+\b", expr))
    return found[::-1]

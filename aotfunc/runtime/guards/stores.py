"""Tensors that a function binds in the state it reaches: ``self.state = new``, a cache filled, a
closure variable.

During the capture such a value is a traced one. It becomes one more result of the program, and
every call puts the real tensor in its place, which the state's paths find; a capture that fails
puts back what was there."""

from __future__ import annotations

import functools
import re
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ...capture.instances import flatten_tree
from ...errors import CaptureError
from ...trace.holding import holds_traced
from ...trace.traced import Traced
from .objects import Gradient, Slots
from .state import State

_NOTHING = object()


class Place(NamedTuple):
    """The entry ``key`` of an owner: the dictionary or the slots of an object, the globals,
    another dictionary, a list or a cell."""

    owner: int
    key: Any
    value: Any
    grows: bool  # the list gets one more element


def entries(owner: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(owner, types.CellType):
        try:
            yield "cell_contents", owner.cell_contents
        except ValueError:  # not bound
            return
    else:
        table = hasattr(owner, "items")  # those of scripted modules are no dicts
        yield from list(owner.items() if table else enumerate(owner))


def changed_stores(state: State) -> Iterator[tuple[Place, list[Tensor]]]:
    """Find the entries into which the function has put tensors, traced or from elsewhere, since
    the state was described; none in objects that hide them."""
    known = set(state.seen)
    owners = {id(owner): (i, owner, before) for i, (owner, _, before) in enumerate(state.owners)}
    for i, owner, before in owners.values():
        for key, value in entries(owner):
            if value is not before.get(key, _NOTHING):
                leaves = flatten_tree(value)[0]
                tensors = [x for x in leaves if isinstance(x, Tensor)]
                hidden = any(holds_traced(x, known) for x in leaves if not isinstance(x, Tensor))
                if tensors or hidden:
                    grows = isinstance(owner, list | deque) and key not in before
                    yield Place(i, key, value, grows), [] if hidden else tensors


def left_behind(state: State, titled: Callable[[], str], given: Sequence[Any] = ()) -> list[Place]:
    """Find the entries into which the function has put tensors; tensors that leaked from inner
    transforms stay there. Refused if it changed one of the containers ``given``, which are copies
    of arguments, that it also reaches by another way."""
    found = []
    twice = {id(x) for c in given for x in (c, getattr(c, "__dict__", c))}
    for place, tensors in changed_stores(state):
        if id(state.owners[place.owner][0]) in twice:
            raise CaptureError(
                f"{titled()} changes a {type(state.owners[place.owner][0]).__name__} that is an "
                "argument and that it reaches by another way, too; pass it, or close over it, not "
                "both"
            )
        if not tensors:
            raise CaptureError(
                f"{titled()} leaves a {type(place.value).__name__} that holds tensors in what "
                "lies outside, in which every call would have to put its own; keep a dataclass, "
                "or a tuple or dictionary of the tensors"
            )
        if not any(t.__class__ is Traced and t.tracer.finished for t in tensors):
            found.append(place)
    return found


def store(owner: Any, key: Any, value: Any) -> None:
    """Bind a value in a cell or under a key."""
    if isinstance(owner, types.CellType):
        owner.cell_contents = value
    else:
        owner[key] = value


def undo_stores(state: State) -> None:
    """Undo the changes that :func:`changed_stores` finds."""
    for place, _ in list(changed_stores(state)):
        owner, _, before = state.owners[place.owner]
        restore(owner, before, [place.key])


def empty_caches(state: State) -> None:
    """Empty functions' caches that hold traced values (``functools.lru_cache``)."""
    for x in state.kept:
        if isinstance(x, functools._lru_cache_wrapper) and holds_traced(
            x, {*state.seen} - {id(x)}
        ):
            x.cache_clear()


def undo_changes(state: State) -> None:
    """Undo all changes of the described state, numbers and texts too."""
    for owner, _, before in state.owners:
        now = dict(entries(owner))
        changed = [
            k for k in {**before, **now} if k not in now or now[k] is not before.get(k, _NOTHING)
        ]
        if changed:
            restore(owner, before, changed)
    for array, content in state.arrays:
        if array.tobytes() != content:
            array[...] = np.frombuffer(content, array.dtype).reshape(array.shape)


def restore(owner: Any, before: dict, keys: Sequence[Any]) -> None:
    """Put ``before`` back at these entries of an owner; a list is put back whole."""
    if isinstance(owner, list | deque):
        owner.clear()
        owner.extend(before.values())
        return
    if isinstance(owner, dict) and not owner.keys() >= {*keys} & before.keys():
        new = {k: x for k, x in owner.items() if k not in before}
        kept = {k: x for k, x in before.items() if k in owner or k in keys}
        owner.clear()  # in the order that it had
        owner.update({**kept, **new})
    for key in keys:
        if key in before:
            store(owner, key, before[key])
        elif isinstance(owner, types.CellType):
            del owner.cell_contents
        else:
            del owner[key]


def finder(state: State, names: Sequence[str]) -> Callable[[Callable, Sequence[Any]], list]:
    """Return a function of ``f`` and argument objects to what these state variables hold."""
    body = "".join(f"    {line}\n" for line in lines_needed(state.lines, names))
    space = {"Slots": Slots, "Gradient": Gradient, **state.constants}
    exec(f"def found(f, objects):\n{body}    return [{', '.join(names)}]\n", space)
    return space.pop("found")  # no cycle: what the constants are lives no longer than the function


def lines_needed(lines: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the lines that bind these variables, and those that they are made of."""
    wanted, found = set(re.findall(r"\bv\d+\b", " ".join(names))), []
    for line in reversed(lines):
        name, bound, expr = line.partition(" = ")
        if bound and name in wanted:
            found.append(line)
            wanted.update(re.findall(r"\bv\d+\b", expr))
    return found[::-1]

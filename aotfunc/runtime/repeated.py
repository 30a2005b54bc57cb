"""Take a fast path for a call like the last one.

Most calls of a compiled function are like the call before. One that is given tensors without
attributes, plain values and trees of these needs no key: C++ compares the tensors, and the rest is
looked at as for other calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..trace.traced import under_way
from .entry import Entry
from .guards.check import Check
from .guards.description import CheckLines
from .guards.keys import (
    ATOMS,
    ATTRIBUTES,
    READS,
    TENSORS,
    bits,
    environment_key,
    first_alike,
    rare,
)

#: functions that answer None unless torch.jit.trace (which would keep what kernels compute) or
#: torch.func is at work
ABSENT = (torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack)

#: the result for any other call than the last one
OTHER = object()


def repeated_call(
    f: Callable, entry: Entry, tensors: Sequence[Tensor], found: Sequence[Tensor], given: tuple
) -> Callable:
    """Return ``call(args, kwargs)`` for calls like ``given`` of ``entry``, with the state's
    tensors ``found``; OTHER for any other call, or one not easily compared."""
    same = same_structure(given)
    plain = all(t.__class__ in TENSORS and not t.__dict__ for t in tensors)
    state = entry.check if entry.check.is_large else None  # it has native code of its own
    shared = entry.shared
    differ = first_alike(tensors) is None and entry.whereabouts is None
    # the check of a small state finds no tensor twice
    apart = not shared.given if state else not shared.places
    if not (tensors and same and plain and differ and apart):
        return lambda args, kwargs: OTHER
    number = len(tensors)
    # all closed-over tensors are tensors of the state, in its order
    all_closed = [s if s.__class__ is int else None for s in entry.sources] == [*range(len(found))]
    check = Check(Situation(tensors, found, None if state else entry.check), large=0)
    # the tensors, if these are all that is given
    alone = not given[1] and [*map(id, given[0])] == [*map(id, tensors)]
    count = number if alone else -1
    run = entry.direct([*tensors, *entry.closed(found)])

    def call(args: tuple, kwargs: dict) -> Any:
        tensors = args if len(args) == count and not kwargs else same(args, kwargs)
        if tensors is None or (found := check.tensors(f, tensors)) is None:
            return OTHER
        if state is not None:
            if (more := state.tensors(f, ())) is None:
                return OTHER
            found = (*found, *more)
        if not all_closed:
            found = (*found[:number], *entry.closed(found[number:]))
        return run(*found) if run is not None else entry([*found], f, (), (args, kwargs))

    return call


class Situation(CheckLines):
    """The tensors and surroundings of a call and the state that its function reads, described for
    a check; without the state where that is None."""

    def __init__(
        self, tensors: Sequence[Tensor], found: Sequence[Tensor], state: Check | None
    ) -> None:
        lines, constants, paths = ([], {}, []) if state is None else state.described
        self.tensors = [*tensors] if state is None else [*tensors, *found]
        self.constants: dict[str, Any] = {**constants}
        self.lines = [f"if len(objects) != {len(tensors)}: return"]
        self.paths = [*[f"x{i}" for i in range(len(tensors))], *paths]
        for i, t in enumerate(tensors):
            self.lines.append(f"x{i} = objects[{i}]")
            self.require(f"type(x{i})", t.__class__)
            self.lines.append(f"if x{i}.__dict__: return")
            if t.requires_grad:
                self.require(f"x{i}.is_leaf", t.is_leaf)
        for read in READS:
            self.require(f"{self.constant(read)}()", read())
        for table, name in ATTRIBUTES:
            self.require(f"{self.constant(table)}['{name}']", table[name])
        for absent in ABSENT:
            self.lines.append(f"if {self.constant(absent)}() is not None: return")
        self.lines.append(f"if {self.constant(under_way)}.traces: return")
        if rare():
            known = self.constant(environment_key), self.constant(environment_key())
            self.lines.append("if {}() != {}: return".format(*known))
        self.lines += lines


def same_structure(given: tuple) -> Callable[[tuple, dict], Sequence[Tensor] | None] | None:
    """Return ``same(args, kwargs)``, generated: the tensors in arguments that have the structure
    and the values of these but for tensors; None for others. None if there are other objects."""
    lines: list[str] = []
    found: list[str] = []
    space: dict[str, Any] = {"bits": bits}

    def constant(x: Any) -> str:
        space[name := f"k{len(space)}"] = x
        return name

    def describe(x: Any, v: str) -> bool:
        """Add the lines for the variable ``v``; tell whether ``x`` is easily compared."""
        cls = x.__class__
        if cls in TENSORS:
            found.append(v)
            return True
        other = f"{v}.__class__ is not {constant(cls)}"
        if cls in ATOMS or cls is float:
            differs = f"({other} or bits({v}) != {constant(bits(x))})"
            lines.append(f"if {v} is not {constant(x)} and {differs}: return")
            return True
        if cls not in (tuple, list, dict):
            return False
        parts = [f"{v}_{i}" for i in range(len(x))]
        if cls is dict:
            if any(k.__class__ is not str for k in x):
                return False
            lines.append(f"if {other} or (*{v},) != {constant((*x,))}: return")
        else:
            lines.append(f"if {other} or len({v}) != {len(x)}: return")
        if parts:
            values = f"{v}.values()" if cls is dict else v
            lines.append(f"{', '.join(parts)}, = {values}")
        return all(map(describe, x.values() if cls is dict else x, parts))

    if not all(map(describe, given, ("args", "kwargs"))):
        return None
    body = "\n    ".join([*lines, f"return ({''.join(v + ', ' for v in found)})"])
    exec(f"def same(args, kwargs):\n    {body}", space)
    return space["same"]

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
    alone = first_alike(tensors) is None and not entry.shared.given and entry.whereabouts is None
    if not (tensors and same and plain and alone):
        return lambda args, kwargs: OTHER
    number = len(tensors)
    # all closed-over tensors are tensors of the state, in its order
    all_closed = [s if s.__class__ is int else None for s in entry.sources] == [*range(len(found))]
    state = entry.check if entry.check.is_large else None  # it has native code of its own
    check = Check(Situation(tensors, found, None if state else entry.check), large=0)
    # the tensors, if all arguments are tensors
    count = number if [*map(id, given[0])] == [*map(id, tensors)] else -1
    run = entry.direct([*tensors, *entry.closed(found)])

    def call(args: tuple, kwargs: dict) -> Any:
        tensors: Sequence[Tensor] = args
        if len(args) != count or kwargs:
            tensors = []
            if not same((args, kwargs), tensors):
                return OTHER
        found = check.tensors(f, tensors)
        if found is None:
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


def same_structure(x: Any) -> Callable[[Any, list], bool] | None:
    """Return ``same(y, found)``: whether ``y`` has the structure and the values of ``x``, but for
    tensors, added to ``found``. None if ``x`` holds other kinds of objects."""
    cls = x.__class__
    if cls in TENSORS:
        return tensor
    if cls in ATOMS or cls is float:
        value = bits(x)
        return lambda y, found: y is x or (y.__class__ is cls and bits(y) == value)
    if cls not in (tuple, list, dict):
        return None
    keys = (*x,) if cls is dict else ()
    if any(k.__class__ is not str for k in keys):
        return None
    count, values = len(x), dict.values if cls is dict else iter
    parts = [part for v in values(x) if (part := same_structure(v)) is not None]
    if len(parts) < count:
        return None

    def same(y: Any, found: list) -> bool:
        if y.__class__ is not cls or len(y) != count or (keys and (*y,) != keys):
            return False
        if flat:
            found += values(y)
            return True
        return all([part(v, found) for part, v in zip(parts, values(y), strict=True)])

    flat = all(part is tensor for part in parts)
    return same


def tensor(y: Any, found: list) -> bool:
    found.append(y)
    return True

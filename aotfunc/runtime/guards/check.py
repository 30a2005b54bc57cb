"""A quick check that a state is as it was, which also fetches its tensors by their paths:
generated Python, and native code after many calls if there is a C++ compiler."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, Protocol

from torch import Tensor

from ...cache import Cache
from ...trace.kinds import is_dtensor
from ...trace.traced import Traced
from .containers import content
from .keys import tensor_facts

#: a check of so many lines becomes native after so many calls, which save the time of compiling; a
#: compiler runs once on a machine
MANY, LARGE = 100, 100

_code = Cache(256)  # by source: entries of one function often have the same check


class Described(Protocol):
    """What a check compares with: lines of Python that return where something differs, by names of
    constants, and the variables that hold these tensors."""

    lines: list[str]
    constants: dict[str, Any]
    paths: list[str]
    tensors: list[Tensor]


class Check:
    """A quick check that all is as described; ``large``: the lines worth native code."""

    def __init__(self, state: Described, large: int | None = None) -> None:
        self.large = LARGE if large is None else large
        self.source = ""
        self.space: dict[str, Any] = {}
        self.native = False
        self.renew(state)

    def renew(self, state: Described) -> None:
        """Compare with an equal state's objects from now on. (Other threads may be checking.)"""
        self.described = state.lines, state.constants, state.paths
        source = check_source(state)
        found = {**state.constants, "alike": metadata_check(state.tensors)}
        if source == self.source:
            self.space.update(found)
            if self.native:
                self.quicken(state.lines, state.paths)
            return
        space = {"is_": is_, "content": content, "unbound": is_unbound, **found}
        exec(_code.once(source, lambda: compile(source, "<check>", "exec")), space)
        self.python: Callable[[Callable, Sequence[Any]], tuple | None] = space["tensors"]
        self.source, self.space, self.native = source, space, False
        self.tensors = self.python
        if self.is_large:
            self.count(state.lines, state.paths)

    @property
    def is_large(self) -> bool:
        """Return whether it is worth native code of its own."""
        return len(self.described[0]) >= self.large

    def count(self, lines: Sequence[str], paths: Sequence[str]) -> None:
        """Count calls, and make the check native after many."""
        python, calls = self.python, itertools.count(1)

        def tensors(f: Callable, objects: Sequence[Any]) -> tuple | None:
            if next(calls) == MANY and self.python is python:
                self.quicken(lines, paths)
            return python(f, objects)

        self.tensors = tensors

    def quicken(self, lines: Sequence[str], paths: Sequence[str]) -> None:
        """Make the check native, if native code can be had."""
        from .native import native_check  # most calls are no such many

        quick = native_check(self.source, lines, paths, self.python, self.space)
        self.native, self.tensors = quick is not None, quick or self.python


def check_source(state: Described) -> str:
    """Return the check as Python: a function of ``f`` and the objects among the arguments to the
    tensors that are reached, or to None where the state is another one."""
    body = "".join(f"        {line}\n" for line in state.lines)
    found = ", ".join(state.paths) + ("," if len(state.paths) == 1 else "")
    alike = " if alike(*found) else None" if found else ""
    return f"""def tensors(f, objects):
    try:
{body}    except (LookupError, AttributeError, TypeError, ValueError):
        return
    found = ({found})
    return found{alike}
"""


def is_unbound(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def metadata_check(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return whether tensors, no two the same, have these shapes, strides, dtypes, devices and
    requires_grad."""
    if not any(t.__class__ is Traced or is_dtensor(t) for t in tensors):
        try:
            from torch._C._dynamo.guards import TensorGuards

            shapes = [list(t.shape) for t in tensors]
            strides = [list(t.stride()) for t in tensors]
            return TensorGuards(
                *tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides
            ).check
        except (ImportError, TypeError, RuntimeError):
            pass
    facts = [tensor_facts(t) for t in tensors]
    return lambda *now: (
        len({*map(id, now)}) == len(now) and [tensor_facts(t) for t in now] == facts
    )

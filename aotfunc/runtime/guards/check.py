"""The quick check that a state is as it was: generated Python that also fetches its tensors by
their paths."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from ...cache import Cache
from ...trace.traced import Traced
from .containers import content
from .keys import tensor_facts
from .state import State

_code = Cache(256)  # by source: entries of one function often have the same check


class Check:
    """A quick way to tell whether a state is still the one that was looked at, and to fetch its
    tensors."""

    def __init__(self, state: State) -> None:
        self.source = ""
        self.space: dict[str, Any] = {}
        self.renew(state)

    def renew(self, state: State) -> None:
        """Take the objects of an equal state for those to compare with. (Another thread may be
        checking meanwhile.)"""
        source, found = (
            check_source(state),
            {**state.constants, "alike": metadata_check(state.tensors)},
        )
        if source == self.source:
            self.space.update(found)
            return
        space = {"is_": is_, "content": content, "unbound": unbound, **found}
        exec(_code.once(source, lambda: compile(source, "<check>", "exec")), space)
        self.tensors: Callable[[Callable, Sequence[Any]], tuple | None] = space["tensors"]
        self.source, self.space = source, space


def check_source(state: State) -> str:
    """The check as Python: a function of ``f`` and the objects among the arguments to the tensors
    that are reached, or to None where the state is another one."""
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


def unbound(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def metadata_check(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether tensors have the shapes, strides, dtypes, devices and requires_grad that these
    have."""
    if not any(t.__class__ is Traced for t in tensors):
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
    return lambda *now: [tensor_facts(t) for t in now] == facts

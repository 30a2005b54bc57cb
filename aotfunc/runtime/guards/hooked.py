"""Hooks that a function registers on its arguments, and what they may hold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

from ...errors import CaptureError
from ...trace.holding import SHARED, contents
from .description import is_plain
from .state import State


def check_made_outside(hook: Callable, state: State) -> None:
    """Refuse a hook that holds what the function makes, which each call would have to make for
    it."""
    known = {*state.seen, *(id(owner) for owner, _, _ in state.owners)}
    todo: list[Any] = [hook]
    while todo:
        x = todo.pop()
        if id(x) in known or is_plain(x) or isinstance(x, SHARED[:2]):
            continue
        known.add(id(x))
        if isinstance(x, FunctionType | MethodType | functools.partial):
            todo += contents(x)
        elif isinstance(x, BuiltinMethodType):  # of a list: its append
            todo.append(x.__self__)
        else:
            raise CaptureError(
                f"a hook of an argument holds a {type(x).__name__} that the function makes, which "
                "would be the same object at every call; make it outside"
            )

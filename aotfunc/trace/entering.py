"""Enter aotfunc and return to the user's function: shorten tracebacks to the user's frames, and
hide our calls from function modes (``torch.set_default_device`` is one).

A ``TorchFunctionMode`` is asked at each ``x.shape``; most of what it would see is our own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from ..debug import _OURS, _TORCH, FULL, outside_dynamo

modes_are_on = torch._C._is_torch_function_mode_enabled
_state, _set_state = torch._C._get_torch_function_state, torch._C._set_torch_function_state
_OFF = torch._C._TorchFunctionState.ALL_DISABLED


class _Aside(threading.local):
    def __init__(self) -> None:
        self.state: Any = None  # the function modes that were set aside


_aside = _Aside()


def entry(f: Callable, in_graph: Callable | None = None) -> Callable:
    """Mark ``f`` as a way into aotfunc: errors leave it with a short traceback of the user's lines
    (``AOTFUNC_TRACEBACK=full`` shows all), and function modes are off except in
    :func:`as_outside`. Dynamo reads ``in_graph`` instead, or does not look into it."""
    call = entered(f)
    functools.update_wrapper(call, f)
    if in_graph is None:
        return call

    @functools.wraps(f)
    def read(*args: Any, **kwargs: Any) -> Any:
        return in_graph(*args, **kwargs) if is_dynamo_compiling() else call(*args, **kwargs)

    return read


def entered(f: Callable) -> Callable:
    """Return ``f`` as :func:`entry` marks it, with nothing else than its name: a function that
    each call makes anew must be quick to make."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if modes_are_on():
                return without_function_modes(f, *args, **kwargs)
            return f(*args, **kwargs)
        except Exception as e:
            e.__traceback__ = short_traceback(e.__traceback__)
            raise

    call.__name__ = call.__qualname__ = getattr(f, "__name__", "call")
    return outside_dynamo(call)


def without_function_modes(f: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return ``f(*args, **kwargs)`` with function modes set aside."""
    outer, _aside.state = _aside.state, _state()
    try:
        _set_state(_OFF)
        return f(*args, **kwargs)
    finally:
        _set_state(_aside.state)
        _aside.state = outer


def as_outside(f: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return the user's ``f(*args, **kwargs)`` with the function modes that were on outside."""
    mine = _aside.state
    if mine is None:
        return f(*args, **kwargs)
    try:
        _aside.state = None
        _set_state(mine)
        return f(*args, **kwargs)
    finally:
        _set_state(_OFF)
        _aside.state = mine


def short_traceback(traceback: TracebackType | None) -> TracebackType | None:
    """Return the traceback without our frames and without torch's that these call."""
    shown, hidden = [], False
    while traceback is not None and not FULL:
        name = traceback.tb_frame.f_code.co_filename
        hidden = name.startswith(_OURS) or (hidden and name.startswith(_TORCH))
        if not hidden:
            shown.append(traceback)
        traceback = traceback.tb_next
    for t in reversed(shown):
        traceback = TracebackType(traceback, t.tb_frame, t.tb_lasti, t.tb_lineno)
    return traceback

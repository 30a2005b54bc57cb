"""Functions of torch that are redirected while a recording is under way, and what they were before."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from .traced import current
from .tracer import Trace

#: the functions as torch defines them
ORIGINALS: dict[str, Callable] = {}


def recorded() -> Trace | None:
    """The recording under way, unless it leaves autograd alone."""
    trace = current()
    return trace if trace is not None and trace.keeps_intent else None


def redirect(name: str, f: types.FunctionType, ours: Callable | None, template: Any) -> None:
    """Exchange the code of ``f`` for the template's, which asks whether a recording is under way. Doing it twice, from
    two threads, is doing it once.
    """
    twin = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    twin.__kwdefaults__ = f.__kwdefaults__
    original = ORIGINALS.setdefault(name, twin)
    f.__globals__["_aotfunc_recording"] = recorded
    f.__globals__[f"_aotfunc_{name}"] = ours
    f.__globals__[f"_torch_{name}"] = original
    code = f.__code__  # a reader of the source, as TorchScript, finds torch's
    f.__code__ = template.__code__.replace(co_filename=code.co_filename, co_firstlineno=code.co_firstlineno)

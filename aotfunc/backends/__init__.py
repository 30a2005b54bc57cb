"""Backends by name: each is a ``compiler(gm, example_inputs) -> callable``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import BackendError
from .inductor import inductor


def eager(gm: Any, example_inputs: Any) -> Callable:
    """The graph's own generated Python."""
    from .eager import compile_graph

    return compile_graph(gm.graph)


#: name -> compiler; add your own
REGISTRY: dict[str, Callable] = {"eager": eager, "inductor": inductor}


def lookup(backend: str | Callable) -> Callable:
    """The compiler of this name (or the compiler itself). Raises BackendError for an unknown name."""
    if callable(backend):
        return backend
    found = REGISTRY.get(backend)
    if found is None:
        raise BackendError(
            f"there is no backend {backend!r}; known are {', '.join(sorted(REGISTRY))}, "
            "or pass a compiler(gm, example_inputs)"
        )
    return found


def register(name: str, compiler: Callable) -> None:
    """Make a compiler known by name."""
    REGISTRY[name] = compiler

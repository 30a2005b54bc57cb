"""Backends by name: each compiles a graph module into a callable."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError
from .inductor import decompositions, inductor


@dataclass(frozen=True)
class Backend:
    """How graphs are compiled.

    ``compile(gm, example_inputs) -> callable`` gets a ``torch.fx.GraphModule`` of functional aten
    ops whose nodes have FakeTensors in ``meta["val"]``, and the tensors of the first call,
    detached. The callable gets tensors of the same shapes, strides, dtypes and devices, and
    returns the graph's flat results. ``decompositions`` maps ops to functions that replace them
    first, or is a function that makes this table when it is needed. With ``boxed`` the callable
    takes its inputs as one list, which it may empty to free memory early. With ``reassociates``
    graphs come with their sums of products in the cheapest order, unless results are to be
    ``exact``, see :func:`aotfunc.jit`. With ``fuses`` elementwise ops cost little beside their
    readers, so backwards recompute them rather than keep their results."""

    compile: Callable[[Any, list], Callable]
    decompositions: Mapping | Callable[[], Mapping] | None = None
    boxed: bool = False
    reassociates: bool = False
    fuses: bool = True

    def __call__(self, gm: Any, example_inputs: list) -> Callable:
        return self.compile(gm, example_inputs)

    @property
    def table(self) -> Mapping | None:
        """Return the decompositions."""
        return self.decompositions() if callable(self.decompositions) else self.decompositions


def eager(gm: Any, example_inputs: Any) -> Callable:
    """Return the graph's own generated Python."""
    from .eager import compile_graph

    return compile_graph(gm.graph)


def cpp(gm: Any, example_inputs: Any) -> Callable:
    """Compile C++ kernels for the CPU."""
    from .loops.backend import compile_cpp

    return compile_cpp(gm, example_inputs)


def flow_runner(target: Any, bodies: Sequence[Callable], plain: Callable) -> Callable:
    """Return ``plain``, which runs control flow with compiled bodies, or native code for it."""
    from .loops.looped import native_loop

    return native_loop(target, bodies, plain)


def auto(gm: Any, example_inputs: Any) -> Callable:
    """Compile C++ kernels on the CPU if there is a compiler; else generate Python."""
    from .auto import automatic

    return automatic(gm.graph, lambda backend: backend(gm, example_inputs))


def cpp_decompositions() -> Mapping:
    """Return the decompositions of the C++ backend."""
    from .loops.opened import OPENED

    return OPENED


EAGER, AUTO = Backend(eager, fuses=False), Backend(auto)
CPP = Backend(cpp, cpp_decompositions, reassociates=True)

#: name -> backend
REGISTRY: dict[str, Backend] = {
    "auto": AUTO,
    "eager": EAGER,
    "cpp": CPP,
    "inductor": Backend(inductor, decompositions),
}


def lookup(backend: str | Callable) -> Backend:
    """Return the backend of this name, or a :class:`Backend` around a bare compiler.
    ``AOTFUNC_BACKEND`` says what "auto" is. Raises BackendError for an unknown name."""
    if backend == "auto":
        backend = os.environ.get("AOTFUNC_BACKEND") or backend
    found = backend if callable(backend) else REGISTRY.get(backend)
    if found is None:
        raise BackendError(
            f"there is no backend {backend!r}; known are {', '.join(sorted(REGISTRY))}, "
            "or pass a compiler(gm, example_inputs)"
        )
    return found if isinstance(found, Backend) else Backend(found)


def register(name: str, compiler: Callable) -> None:
    """Register a :class:`Backend`, or a bare ``compiler(gm, example_inputs)``, under a name."""
    REGISTRY[name] = lookup(compiler)

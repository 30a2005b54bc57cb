"""Choose a backend for a graph if none is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import fx

from ..errors import BackendError, BackendWarning
from ..native import toolchain
from ..trace.records import flat_tensors
from . import AUTO, CPP, EAGER, Backend

#: compilers that have failed and been reported
_failed: set[str] = set()


def automatic(graph: fx.Graph, compiled: Callable[[Backend], Callable]) -> Callable:
    """Return ``compiled(CPP)`` for a graph on the CPU, if there are kernels or a compiler; else
    ``compiled(EAGER)``.

    A BackendWarning says where C++ fails, once for each compiler; a missing compiler gives none.
    In both cases the attribute ``eagerly`` of the result says why."""
    if not on_cpu(graph):
        return compiled(EAGER)
    try:
        if possible():
            return compiled(CPP)
        toolchain.compiler()
    except BackendError as e:
        error = e
    run = compiled(EAGER)
    run.eagerly = {"the whole graph": str(error).splitlines()[0]}  # type: ignore[attr-defined]
    if toolchain.has_compiler() and (which := toolchain.compiler_identity()) not in _failed:
        _failed.add(which)
        warnings.warn(
            f"backend='auto' runs graphs op by op: {error}", BackendWarning, stacklevel=2
        )
    return run


def suited(graph: fx.Graph, backend: Backend) -> Backend:
    """Return the backend that ``backend`` chooses for a graph."""
    return backend if backend != AUTO else CPP if on_cpu(graph) and possible() else EAGER


def on_cpu(graph: fx.Graph) -> bool:
    """Return whether all values of the graph are on the CPU."""
    vals = [n.meta.get("val") for n in graph.nodes]
    return all(t.device.type == "cpu" for v in vals for t in flat_tensors(v))


def possible() -> bool:
    """Return whether there is a compiler, or the disk has the library that launches kernels."""
    from .loops.launch import native_form

    return toolchain.has_compiler() or native_form() is not None

"""The node of autograd of a repeated call in C++: one of Python's, of a torch.autograd.Function,
costs more than the kernels of a small call. The compiler runs in the background once a call has
been repeated often, and once on a machine; nodes are Python's until then.

The node calls Python for the usual backward, which runs the compiled half, and for any other, to
which it looks like the ``ctx`` of a Function."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..backends.loops.launch import offset_of_tensors
from ..debug import LEVEL, outside_dynamo
from ..errors import BackendWarning, CompilerError
from ..native.extension import Extension
from ..native.fastcall import Unlike, address, python_function
from .autograd import general_backward
from .halves import Halves
from .late_reads import other_memory
from .lifted import ResultGroups
from .usual import unaffected

#: so many calls like the last one, each with gradients, are worth a compiler run
MANY = 2000


class NodeLibrary:
    """The functions of ``native_node.cpp``. Raises Unlike, OSError and AttributeError where they
    do not fit this process."""

    def __init__(self, path: Path) -> None:
        offset = offset_of_tensors()
        library = ctypes.CDLL(str(path))
        ctypes.c_int64.in_dll(library, "aot_offset").value = offset
        self.at = address(library.aot_call)
        self.saved, self.release, self.lifted = (
            python_function(name, address(getattr(library, f"aot_{name}")), (), __name__)
            for name in ("saved", "release", "lifted")
        )
        self.first()

    def call(self, plan: list[int], *parts: Callable) -> Callable[..., tuple]:
        """Return ``(*tensors) -> results``; ``native_node.cpp`` reads the ``plan``. The ``parts``
        are the forward half, the usual backward, and any other backward."""
        data = (array("q", plan).tobytes(), *parts)
        return python_function("compiled_call", self.at, data, __name__)

    def first(self) -> None:
        """Check that a node works. Raises Unlike."""
        call = self.call([1, 0, 0, 1, 0, 0], lambda xs: (xs[0] * 2,), lambda cts: [cts[0] * 3], id)
        x, ct = torch.ones(2, requires_grad=True), torch.ones(2)
        with torch.enable_grad():
            (y,) = call(x)
            (grad,) = torch.autograd.grad(y, x, ct)
        if (y.tolist(), grad.tolist()) != ([2, 2], [3, 3]):
            raise Unlike("a first node gave something else than it should")
        Node.register(type(y.grad_fn))


class Nodes:
    """The library, once it is there."""

    def __init__(self) -> None:
        self.library: NodeLibrary | None = None
        self.extension: Extension | None = None
        self.thread: threading.Thread | None = None
        if os.environ.get("AOTFUNC_NATIVE_NODES") == "0":
            return
        try:
            self.extension = Extension(Path(__file__).with_suffix(".cpp").read_text())
        except (CompilerError, OSError) as e:
            explain(e)
        self.load()

    def load(self) -> None:
        """Load the library if it has been compiled."""
        try:
            if self.extension is not None and (path := self.extension.find()) is not None:
                self.library = NodeLibrary(path)
        except (OSError, AttributeError, Unlike) as e:
            explain(e)

    def compile(self, last: bool = False) -> None:
        """Compile the library and load it; ``last``: after all else that the machine does."""
        try:
            if self.extension is not None:
                self.extension.compile(last)
        except CompilerError as e:
            explain(e)
        self.load()

    def start(self) -> None:
        """Compile in the background, once."""
        if self.thread is None and self.library is None:
            self.thread = threading.Thread(target=self.compile, args=(True,), daemon=True)
            self.thread.start()


def explain(why: Exception) -> None:
    if LEVEL:
        warnings.warn(f"nodes of autograd are Python's: {why}", BackendWarning, stacklevel=2)


nodes = functools.cache(Nodes)


def native_results(
    halves: Halves, known: dict[str, Any], compute: Callable, lifts: ResultGroups
) -> Callable[..., tuple] | None:
    """Return ``(*tensors) -> results``, those of a new native node; None if there is no library.
    ``known`` are the facts of such nodes."""
    library, usual = nodes().library, halves.usual
    if library is None or usual is None:
        return None
    (outs, inputs), keeping, dtype = halves.whole, known["keeping"], known["dtype"]
    residuals = len(halves.saved)
    n_saved = residuals + len(keeping)
    groups = [*[(1, places) for places, _ in lifts.together], *[(0, [at]) for at in lifts.others]]
    groups = groups if len(outs) > 1 else []
    plan = [len(inputs), *inputs, len(halves.needed), *halves.needed, len(outs)]
    plan += [len(keeping), *keeping, len(groups)]
    for keeps, places in groups:
        plan += [keeps, len(places), *places]
    numbers = [k for _, numbers in lifts.together for k in numbers] if groups else []
    known = {**known, "keeps": bool(halves.needed or n_saved), "numbers": numbers}

    @outside_dynamo
    def quick(values: list[Any]) -> Sequence[Tensor] | None:
        if not unaffected(dtype):
            return None
        given = [*values[:residuals], *values[n_saved:]] if keeping else values
        if (run := usual.run(given)) is None:
            return None
        if keeping:
            values.clear()
        return run(given)

    @outside_dynamo
    def slow(
        handle: Any, state: dict[str, Any], moved: int, read: list | None, cts: list
    ) -> Sequence[Tensor | None]:
        if moved >= 0:
            raise other_memory(state["inputs"][moved], usual.name)
        state.update({**known, **state})
        return general_backward(NativeContext(library, handle, state), cts, read)

    return library.call(plan, compute, quick, slow)


class NativeContext:
    """A native node as the ``ctx`` of a Function. Its attributes stay with the node."""

    __slots__ = ("__dict__", "handle", "library")
    done: frozenset[int] = frozenset()
    numbers: Sequence[int]

    def __init__(self, library: NodeLibrary, handle: Any, state: dict[str, Any]) -> None:
        self.library, self.handle, self.__dict__ = library, handle, state

    @property
    def saved_tensors(self) -> list[Tensor]:
        return self.library.saved(self.handle)

    def maybe_clear_saved_tensors(self) -> None:
        self.library.release(self.handle)

    @property
    def lifts(self) -> dict[int, Callable[[], Tensor | None]]:
        numbers = enumerate(self.numbers)
        return {k: functools.partial(self.library.lifted, self.handle, i) for i, k in numbers}

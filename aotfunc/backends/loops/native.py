"""Load kernels as C++ functions, compiled or from the disk cache, and call them on tensors.

A kernel is ``extern "C" void NAME(int64_t begin, int64_t end, const int64_t *sizes, void *const
*buffers)``; it computes rows ``begin`` to ``end`` of its outermost axis.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CompilerError
from ...native import toolchain
from ...native.build import built, without_comments

HERE = Path(__file__).parent

#: the beginning of every source: vector types, loads and stores, maths
PRELUDE = "\n".join(
    (HERE / f"{name}.h").read_text()
    for name in ("vectors", "lanes", "indexed", "polynomials", "maths")
)

#: how a function's declaration begins that is called from elsewhere
EXPORTED = 'extern "C" __attribute__((visibility("default")))'

#: fewest elements for a thread
GRAIN = 32768

#: code -> its library
LOADED: dict[str, Library] = {}

#: PyTorch's threads do not survive a fork, and waiting for them would last forever
_forked = False


def _in_child() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_in_child)


class LoadedKernel:
    """A kernel, callable as ``kernel(rows, sizes, tensors)``.

    Only the tensors' memory is passed: the caller guarantees dtypes, sizes and strides. Rows are
    divided among ``torch.get_num_threads()`` threads, ``grain`` or more for each; by default as
    many as hold 32768 elements of the largest tensor. A forked child uses one thread."""

    __slots__ = ("address", "function", "text")

    def __init__(self, function: Any) -> None:
        self.function = function
        #: the kernel as C++, if others may inline it
        self.text = ""
        function.argtypes = (ctypes.c_int64,) * 4
        function.restype = None
        self.address = ctypes.cast(function, ctypes.c_void_p).value or 0

    def __call__(
        self, rows: int, sizes: Sequence[int], tensors: Sequence[Tensor], grain: int | None = None
    ) -> None:
        words = array("q", [*sizes, *[t.data_ptr() for t in tensors]])
        start = words.buffer_info()[0]
        pointers = start + 8 * len(sizes)
        if rows > 1 and torch.get_num_threads() > 1 and not _forked:
            if grain is None:
                grain = max(1, GRAIN * rows // max(1, *[t.numel() for t in tensors]))
            if rows > grain and (divide := threads()) is not None:
                divide(rows, grain, self.address, start, pointers)
                return
        self.function(0, rows, start, pointers)


class Library:
    """The kernels of one source, by name."""

    def __init__(self, path: Path) -> None:
        self.loaded = ctypes.CDLL(str(path))
        self.kernels: dict[str, LoadedKernel] = {}
        #: code without the name -> the kernel
        self.codes: dict[str, LoadedKernel] = {}

    def __getitem__(self, name: str) -> LoadedKernel:
        if name not in self.kernels:
            self.kernels[name] = LoadedKernel(self.loaded[name])
        return self.kernels[name]


def load_kernels(source: str) -> Library:
    """Return the kernels of ``source``, which begins with :data:`PRELUDE`. Compiles at most once
    in this process and all that share the disk cache. Raises CompilerError."""
    code = without_comments(source)
    library = LOADED.get(code)
    if library is None:
        library = LOADED.setdefault(code, Library(built(source)))
    return library


def loaded_kernels(texts: Mapping[str, str]) -> dict[str, LoadedKernel]:
    """Return the kernels of these texts by their names. Those that this process has not loaded
    under any name are compiled as one source. Raises CompilerError."""
    found = {}
    codes = {name: nameless(name, text) for name, text in texts.items()}
    for name, code in codes.items():
        for library in list(LOADED.values()):
            if code in library.codes:
                found[name] = library.codes[code]
    new = [name for name in texts if name not in found]
    if new:
        library = load_kernels("\n\n".join([PRELUDE, *[texts[name] for name in new], ""]))
        for name in new:
            found[name] = library.codes[codes[name]] = library[name]
            found[name].text = texts[name]
    return found


def nameless(name: str, text: str) -> str:
    """Return the code of a kernel, which equal ones share."""
    return without_comments(text).replace(f" {name}(", " (")


@functools.cache
def threads() -> Callable | None:
    """Return ``aot_threads`` of ``threads.cpp``; None if it cannot be compiled."""
    if not toolchain.torch_exports("torch_parallel_for"):
        return None
    try:
        function = ctypes.CDLL(str(built((HERE / "threads.cpp").read_text())))["aot_threads"]
    except CompilerError:
        return None
    function.argtypes = (ctypes.c_int64,) * 5
    function.restype = None
    return function

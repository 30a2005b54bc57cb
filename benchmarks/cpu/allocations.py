"""The most memory that a call has at any time: a counting malloc, preloaded into the process.

It sees what every system allocates, scratch memory of libraries included, where PyTorch's own
profiler would see PyTorch's tensors alone. What was there before the call is not counted."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path


@cache
def library() -> str:
    """The counting malloc, to be named in LD_PRELOAD."""
    target = Path(tempfile.mkdtemp()) / "allocations.so"
    source = Path(__file__).with_name("allocations.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    return str(target)


def peak(run: Callable[[], object]) -> int:
    """Bytes above those before the call, results included."""
    counter = ctypes.CDLL(None)
    counter.allocations_now.restype = counter.allocations_most.restype = ctypes.c_long
    gc.collect()
    before = counter.allocations_now()
    counter.allocations_restart()
    result = run()
    most = counter.allocations_most()
    del result
    return most - before

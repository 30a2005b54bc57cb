"""C++ that includes PyTorch's headers, which takes a compiler some ten seconds: it is compiled in
the background, beside the program that could do with it."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import CompilerError
from . import store, toolchain
from .build import key_of, without_comments

#: unlike kernels it has exceptions, and runs on any processor
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared")


class Extension:
    """A source that is compiled on demand. Raises CompilerError without a compiler or headers."""

    def __init__(self, source: str) -> None:
        torch_at, python_at = Path(torch.__file__).parent, Path(sysconfig.get_path("include"))
        headers, libraries = torch_at / "include", torch_at / "lib"
        if not (python_at / "Python.h").exists() or not (headers / "torch/csrc").exists():
            raise CompilerError("the headers of Python or PyTorch are not there")
        places = [f"-I{headers}", f"-I{python_at}", f"-L{libraries}"]
        self.options = [*places, "-ltorch_python", "-ltorch_cpu", "-lc10"]
        self.source = source
        facts = (*FLAGS, *self.options, torch.__version__, toolchain.compiler_identity())
        self.key = key_of("\n".join((*facts, without_comments(source))))

    def find(self) -> Path | None:
        """Return the compiled file, or None."""
        return store.find(self.key)

    def compile(self, last: bool = False) -> None:
        """Compile; ``last``: after all else that the machine does. Raises CompilerError."""
        low = ["nice", "-n", "19"] if last and shutil.which("nice") else []
        build = functools.partial(self._compile, low)
        store.compile_and_keep(self.key, self.source, build)

    def _compile(self, low: Sequence[str], source: Path, library: Path) -> None:
        command: Sequence[str] = [*low, *toolchain.compiler(), *FLAGS]
        command = [*command, "-x", "c++", str(source), "-o", str(library), *self.options]
        null = subprocess.DEVNULL
        # its own files go with the source's, and what it starts ends with it
        process = subprocess.Popen(
            command,
            stdin=null,
            stdout=null,
            stderr=null,
            env={**os.environ, "TMPDIR": str(source.parent)},
            process_group=0,
        )
        with process:
            stop = functools.partial(stopped, process, os.getpid(), threading.current_thread())
            atexit.register(stop)
            try:
                failed = process.wait()
            finally:
                atexit.unregister(stop)
        if failed == -signal.SIGTERM:
            raise SystemExit  # of this thread: the process ends
        if failed:
            raise CompilerError("the C++ compiler failed")


def stopped(process: subprocess.Popen, pid: int, thread: threading.Thread) -> None:
    """Stop a compiler, whose ``thread`` removes its files, but not from a forked child."""
    if os.getpid() == pid:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        thread.join()

"""The C++ compiler, its flags, and the facts about this machine that compiled code depends on."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from ..errors import CompilerError
from ..progress import doing

#: compilers in the order they are looked for; the environment variable ``CXX`` comes first
NAMES = ("g++", "c++", "clang++")

#: No flag lets the compiler change a value: NaN, infinities, signed zeros and the order of sums
#: stay, and ``x * y + z`` rounds twice, as in eager PyTorch.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fno-tree-slp-vectorize",  # it takes registers apart that a kernel turns
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-shared",
    "-nostartfiles",
    "-Wno-psabi",
    "-Wl,--auxiliary=libtorch_cpu.so",  # its functions are found at load, without linking
)


def compiler() -> list[str]:
    """Return the compiler as the beginning of a command. Raises CompilerError without one."""
    chosen = os.environ.get("CXX")
    for words in [shlex.split(chosen)] if chosen else [[name] for name in NAMES]:
        if found := shutil.which(words[0]):
            return [found, *words[1:]]
    raise CompilerError(
        f"there is no C++ compiler: CXX={chosen} was not found"
        if chosen
        else f"there is no C++ compiler on the PATH ({', '.join(NAMES)}): install g++, name one "
        "in the environment variable CXX, or pass backend='eager'"
    )


def has_compiler() -> bool:
    """Return whether there is a compiler."""
    try:
        return bool(compiler())
    except CompilerError:
        return False


@functools.cache
def torch_library() -> str:
    """Return the path of libtorch_cpu, whose vector maths and threads the kernels use."""
    return str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")


@functools.cache
def torch_exports(name: str) -> bool:
    """Return whether libtorch_cpu has a function of this name."""
    try:
        return hasattr(ctypes.CDLL(torch_library()), name)
    except OSError:
        return False


@functools.cache
def processor() -> str:
    """Return the first processor's model and flags, which ``-march=native`` asks for."""
    lines = []
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if not line.strip():
                    break
                if "MHz" not in line and "bogomips" not in line.lower():
                    lines.append(line)
    except OSError:
        lines = list(os.uname())
    return "".join(lines)


def flags() -> tuple[str, ...]:
    """Return the flags that a kernel is compiled with."""
    sleef = all(map(torch_exports, ("Sleef_expf8_u10avx2", "Sleef_atan2d8_u10avx512f")))
    return (*FLAGS, "-DAOT_SLEEF") if sleef else FLAGS


def target_facts() -> str:
    """Return the facts that a compiled kernel depends on beside its source and its compiler."""
    return "\n".join((*flags(), processor(), torch.__version__))


def compiler_identity() -> str:
    """Return the compiler's path, time and size, without a process. Raises CompilerError."""
    command = compiler()
    stat = os.stat(command[0])
    return "\n".join(map(str, (*command, stat.st_mtime_ns, stat.st_size)))


def compile(source: Path, library: Path) -> None:
    """Compile ``source`` into the shared object ``library``. Raises CompilerError with what the
    compiler says, and OSError where the disk is full."""
    command = [*compiler(), *flags(), "-x", "c++", str(source), "-o", str(library)]
    step = lambda: f"{Path(command[0]).name}, {source.stat().st_size >> 10} KiB of C++"
    try:
        with doing(step):
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},
            )
    except OSError as e:
        raise CompilerError(f"the C++ compiler cannot be run: {e}") from e
    if done.returncode:
        if (full := os.strerror(errno.ENOSPC)) in done.stdout:
            raise OSError(errno.ENOSPC, full)
        raise CompilerError(f"the C++ compiler failed:\n{shlex.join(command)}\n{done.stdout}")

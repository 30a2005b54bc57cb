"""Commands: what this machine has, the programs of a call, its times, and an empty cache."""

from __future__ import annotations

import argparse
import inspect
import runpy
import shutil
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from platform import python_version
from typing import Any

import torch

import aotfunc
from aotfunc.errors import AotfuncError
from aotfunc.native import store, toolchain

BACKENDS = ("eager", "cpp", "inductor")


def doctor() -> None:
    """Print versions, the compiler, the cache, and whether each backend computes a gradient."""
    print(f"aotfunc {aotfunc.__version__}, PyTorch {torch.__version__}, Python {python_version()}")
    print("C++ compiler:", *toolchain.compiler() if toolchain.has_compiler() else ["none found"])
    try:
        folder = store.directory()
        files = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
        print(f"cache: {folder}, {len(files)} files, {sum(files) / 2**20:.1f} MiB")
    except OSError as e:  # kernels are then kept in a temporary directory
        print(f"cache: not used: {e}")
    for backend in BACKENDS:
        print(f"backend {backend}: {works(backend)}")


def works(backend: str) -> str:
    """Return whether a small training step is right with this backend, and how long it takes."""
    x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    step = lambda x: torch.tanh(x @ x.t()).sum()
    (want,) = torch.autograd.grad(step(x), x)
    start = time.perf_counter()
    try:
        (got,) = torch.autograd.grad(aotfunc.jit(step, backend=backend)(x), x)
    except Exception as e:  # whatever a compiler raises is what the user wants to read
        return f"{type(e).__name__}: {e}"
    took = time.perf_counter() - start
    return f"works ({took:.1f} s)" if torch.allclose(got, want) else "WRONG NUMBERS"


def parsed_call(what: str, arguments: str) -> tuple[Callable, tuple]:
    """Return the function that ``FILE.py:name`` names and the arguments that an expression makes
    where the names of the file and ``torch`` are known. Raises AotfuncError where there is no such
    function, or where it does not take these arguments."""
    file, _, name = what.rpartition(":")
    if not Path(file).is_file():
        raise AotfuncError(f"{what!r} names no file; write FILE.py:function")
    sys.path.insert(0, str(Path(file).resolve().parent))  # as for ``python FILE.py``
    names = runpy.run_path(file)
    if not callable(f := names.get(name)):
        raise AotfuncError(f"{file} defines no function {name!r}")
    try:
        args = eval(f"({arguments},)" if arguments else "()", {"torch": torch, **names})
        with suppress(ValueError):  # what is written in C may have no signature
            inspect.signature(f).bind(*args)
    except Exception as e:
        raise AotfuncError(f"--args {arguments!r}: {e}") from e
    return f, args


def write_page(what: str, arguments: str, to: str) -> None:
    """Write the page of a call's programs, and print how many there are."""
    f, args = parsed_call(what, arguments)
    print(f"{to}: {aotfunc.show(f, *args, to=to)}")


def bench(what: str, arguments: str) -> None:
    """Print the time of a call, as it is and compiled by each backend."""
    f, args = parsed_call(what, arguments)
    print(f"{'as it is':10}{best(f, args):>12}")
    for backend in BACKENDS:
        compiled = aotfunc.jit(f, backend=backend)
        start = time.perf_counter()
        try:
            compiled(*args)
        except AotfuncError as e:
            print(f"{backend:10}{type(e).__name__}: {e}")
            continue
        first = time.perf_counter() - start
        print(f"{backend:10}{best(compiled, args):>12}   first call {first:.2f} s")


def best(f: Callable, args: Sequence[Any]) -> str:
    timer = timeit.Timer(lambda: f(*args))
    count, _ = timer.autorange()
    return f"{min(timer.repeat(5, count)) / count * 1e6:,.1f} µs"


def clear_cache() -> None:
    """Remove the compiled code that is kept on disk."""
    folder = store.directory()
    shutil.rmtree(folder)
    print(f"removed {folder}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m aotfunc", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable) -> argparse.ArgumentParser:
        says = (run.__doc__ or "").strip()
        made = commands.add_parser(name, help=says, description=says)
        made.set_defaults(run=run)
        return made

    command("doctor", doctor)
    for name, run in (("show", write_page), ("bench", bench)):
        made = command(name, run)
        made.add_argument("what", metavar="FILE.py:function")
        made.add_argument("--args", dest="arguments", default="", help="torch.randn(3), 2.0")
        if run is write_page:
            made.add_argument("--to", default="aotfunc.html", help="the page to write")
    command("clear-cache", clear_cache)
    given = vars(parser.parse_args(argv))
    try:
        given.pop("run")(**given)
    except AotfuncError as e:
        parser.exit(1, f"{type(e).__name__}: {e}\n")


if __name__ == "__main__":
    main()

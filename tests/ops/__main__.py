"""The whole op table in worker processes: python -m tests.ops [PATTERN …] [--lib
aotfunc|torch|both] [--log FILE] …

Prints what fails and a summary, compares with known_failures.txt (a new failure or a listed one
that passes ends with status 1). Every cell (op, dtype, composition) is asked for by itself and has
a limit, so that a crash or a hang of the library costs that cell alone. With --log each outcome is
appended to FILE as it comes, and what FILE holds already is not run again: an interrupted run goes
on where it was. --write puts the outcomes into docs/coverage.tsv and .md, --update rewrites
known_failures.txt."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# one cell; the limit in processor time (table.LIMIT_S) comes first, unless a kernel hangs
WALL_LIMIT_S = 240.0

HEADER = """# Failures of the op table that are known: `op dtype composition  reason`, one a line.
# The list may only shrink: a listed failure that passes is an error.
# python -m tests.ops --update rewrites it.
"""

Cell = tuple[str, str, str, str]  # library, op, dtype, composition


def work() -> None:
    """A worker: a cell comes in, its outcome goes out, a line of JSON each."""
    import torch

    from tests.ops import table

    torch.set_num_threads(1)
    for line in sys.stdin:
        lib, name, dtype, composition = json.loads(line)
        print(json.dumps(table.check(name, dtype, composition, lib)), flush=True)


class Worker:
    """A process that is asked for one cell after another, and replaced when it dies or does not
    answer."""

    def __init__(
        self,
        command: tuple[str, ...] = ("-m", "tests.ops", "--worker"),
        limit_s: float = WALL_LIMIT_S,
    ):
        self.command, self.limit_s = command, limit_s
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        env = {**os.environ, "AOTFUNC_DEBUG": os.environ.get("AOTFUNC_DEBUG", "2")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, *self.command], **pipes, text=True, env=env)

    def ask(self, cell: Cell) -> str:
        self.process = process = self.process or self.start()
        assert process.stdin and process.stdout
        print(json.dumps(cell), file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], self.limit_s)
        line = process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        process.kill()
        self.process = None
        process.communicate()
        return (
            f"error: the process died ({process.returncode})"
            if ready
            else f"error: no answer within {self.limit_s:g} s"
        )

    def stop(self) -> None:
        if self.process:
            self.process.communicate()


def logged(log: Path | None, cells: list[Cell]) -> dict[Cell, str]:
    """The outcomes of these cells that the log holds; the last one of each counts."""
    if log is None or not log.exists():
        return {}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    results = {(lib, op, d, c): outcome for lib, op, d, c, outcome in lines}
    return {cell: results[cell] for cell in cells if cell in results}


def sweep(
    cells: list[Cell], jobs: int, log: Path | None, new_worker: Callable[[], Worker] = Worker
) -> dict[Cell, str]:
    """The outcome of every cell; those that the log holds are not run."""
    from rich.progress import Progress

    results = logged(log, cells)
    todo: queue.Queue = queue.Queue()
    for cell in cells:
        if cell not in results:
            todo.put(cell)
    out = log.open("a", buffering=1) if log else None

    def feed() -> None:
        worker = new_worker()
        while True:
            try:
                cell = todo.get_nowait()
            except queue.Empty:
                return worker.stop()
            results[cell] = worker.ask(cell)
            if out:
                out.write(json.dumps([*cell, results[cell]]) + "\n")
            bar.advance(task)

    with Progress() as bar:
        task = bar.add_task("cells", total=todo.qsize())
        threads = [threading.Thread(target=feed) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def sweep_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all sweeps over the ops have."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="shell patterns of op names (default all)")
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="the I-th of N parts, interleaved (default 1/1)",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="append each outcome to FILE; do not run what it has",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def chosen(names: Iterable[str], options: argparse.Namespace) -> list[str]:
    """The ops that the options of a sweep name."""
    patterns = options.patterns or ["*"]
    part, parts = map(int, options.part.split("/"))
    return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)][part - 1 :: parts]


def main() -> int:
    parser = sweep_parser(__doc__)
    parser.add_argument("--lib", choices=["aotfunc", "torch", "both"], default="aotfunc")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--update", action="store_true", help="rewrite known_failures.txt from this run"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="put this run into docs/coverage.tsv and docs/coverage.md",
    )
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    from tests.ops import report, table

    names = chosen(table.OPS, options)
    libs = ["aotfunc", "torch"] if options.lib == "both" else [options.lib]
    cells = [(lib, name, d, c) for name in names for d, c in table.cells(name) for lib in libs]
    began = time.time()
    results = sweep(cells, options.jobs, options.log)
    print(f"{len(names)} ops, {len(cells)} cells in {time.time() - began:.0f} s")
    known = {k: why for k, why in table.known().items() if k[0] in set(names)}
    ours = {cell[1:]: outcome for cell, outcome in results.items() if cell[0] == "aotfunc"}
    failed = {k: outcome for k, outcome in ours.items() if table.failed(outcome)}
    for key, outcome in sorted(failed.items()):
        print(*key, "(known)" if key in known else "NEW", outcome)
    gone = [k for k in known if k in ours and k not in failed]
    for key in gone:
        print(*key, "is listed as failing and passes")
    outcomes = report.merged(results)
    report.show({key: by for key, by in outcomes.items() if key[0] in set(names)})
    if options.write:
        report.write(outcomes)
    if options.update:
        kept = {k: why for k, why in table.known().items() if k not in ours}
        kept |= {
            k: known.get(k, r.split(": ", 1)[1].split(" (at ")[0][:140]) for k, r in failed.items()
        }
        lines = [f"{' '.join(k)}  {' '.join(r.split())}" for k, r in sorted(kept.items())]
        table.KNOWN.write_text(HEADER + "\n".join(lines) + ("\n" if lines else ""))
    return 0 if options.update else int(bool(gone or set(failed) - set(known)))


if __name__ == "__main__":
    sys.exit(main())

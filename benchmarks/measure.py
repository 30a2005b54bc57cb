"""How the benchmarks time, print and write down: medians with a spread, one rich table, a Markdown
copy."""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

DOCS = Path(__file__).resolve().parent.parent / "docs"


def timed(
    run: Callable[[], object],
    sync: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one call."""
    if sync:
        sync()
    start = clock()
    run()
    if sync:
        sync()
    return clock() - start


def median(
    run: Callable[[], object],
    repeat: int = 5,
    budget_s: float = 10.0,
    warmup: int = 1,
    sync=None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median seconds of up to ``repeat`` calls, fewer once ``budget_s`` is spent (always at least
    one)."""
    for _ in range(warmup):
        timed(run, sync, clock)
    times: list[float] = []
    while len(times) < repeat and (not times or sum(times) < budget_s):
        times.append(timed(run, sync, clock))
    return statistics.median(times)


def per_call(
    run: Callable[[], object],
    budget_s: float = 0.6,
    sync=None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median seconds a call of something short: batches of calls, long enough for the clock."""
    timed(run, sync, clock)
    once = max(timed(run, sync, clock), 1e-7)
    number = max(1, int(0.02 / once))

    def batch() -> None:
        for _ in range(number):
            run()

    return median(batch, 9, budget_s, 1, sync, clock) / number


def interleaved(
    runs: dict[str, Callable[[], object]],
    rounds: int = 3,
    budget_s: float = 0.4,
    sync=None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """per_call of several rivals, round by round, so that a busy moment of the machine meets them
    all."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seen[name].append(per_call(run, budget_s, sync, clock))
    return {name: statistics.median(times) for name, times in seen.items()}


def growth(sizes: list[int], seconds: list[float]) -> float:
    """The exponent p of the least-squares fit seconds ~ size^p."""
    xs, ys = [math.log(n) for n in sizes], [math.log(t) for t in seconds]
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds * 1e6:.2g} µs"
        if seconds < 1e-5
        else f"{seconds * 1e6:.0f} µs"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def ratio(theirs: float | None, ours: float) -> str:
    return "-" if theirs is None else f"{theirs / ours:.2f}x"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors"


def machine() -> str:
    import torch  # here, so that a fresh process can time its own import

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    python, threads = platform.python_version(), torch.get_num_threads()
    return f"torch {torch.__version__}, Python {python}, {device}, {threads} thread(s)"


class Report:
    """Tables that are printed as they come and, with ``write``, end up in ``path`` with the
    command: docs/bench_<name>.md."""

    def __init__(self, name: str, title: str, command: str) -> None:
        self.path, self.console = DOCS / f"bench_{name}.md", Console(width=140)
        self.text = [f"# {title}", "", f"`{command}` on {machine()}.", ""]
        self.console.print(f"[bold]{title}[/] · {machine()}")

    def table(self, caption: str, head: list[str], rows: list[list[str]]) -> None:
        table = Table(title=caption, title_justify="left")
        for i, column in enumerate(head):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        self.text += [f"## {caption}", "", "| " + " | ".join(head) + " |"]
        self.text += ["| --- " + "| ---: " * (len(head) - 1) + "|"]
        self.text += ["| " + " | ".join(row) + " |" for row in rows] + [""]

    def note(self, line: str) -> None:
        self.console.print(line)
        self.text += [line, ""]

    def write(self) -> None:
        self.path.write_text("\n".join(self.text))
        self.console.print(f"written: docs/{self.path.name}; python -m benchmarks.plots draws it")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables to docs/, too")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few repeats: does it run?"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    return parser

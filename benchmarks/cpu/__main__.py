"""Compiled programs on the CPU, ours beside what torch.func, torch.compile, AOTAutograd and JAX
make of them.

python -m benchmarks.cpu [--quick] [--only REGEX] [--columns a,b] [--cold] [--memory] [--write].
Each workload has a process of its own in which the columns take turns."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path

from benchmarks.cpu.columns import HEADS, MORE, columns, head, own
from benchmarks.cpu.processes import Cells, first_calls, measured, memory
from benchmarks.cpu.workloads import Workload, workloads
from benchmarks.measure import DOCS, Report, arguments, ms, processor

METHOD = [
    "Times are medians of processor time per call with one thread; the columns of a row take "
    "turns in one process, and each runs the program in the ways that it has: the transformed "
    "function compiled whole, or (ᵃ, training steps only) the compiled function differentiated "
    "by autograd, or (ʰ) plain PyTorch written by hand. The fastest stands here. The fastest "
    "peer is bold; behind ours stands how many times as long that peer takes. malloc keeps "
    "memory that is given back, except blocks of more than 32 MiB: a result of 10M elements is "
    "new memory at each call, page faults included.",
    "Every result is compared with PyTorch's in float64 before it is timed: the largest error "
    "relative to the largest element of each result may be ten times that of eager float32, and "
    "1e-5 at least. Arguments are float32.",
]
COLD = (
    "Processor time of the first call in a fresh process, compilers included, imports and a "
    "trivial first call of each library not: with empty caches → with those on disk that the "
    "first left. Inductor's precompiled header was there before. Training steps are the program "
    "of the whole step."
)
MEMORY = (
    "The most memory that one call has at any time, results and libraries' scratch memory "
    "included, by a counting malloc; the lower of a column's ways."
)


def best_peer(cells: Cells) -> float | None:
    return min(
        (c["seconds"] for n, c in cells.items() if n in HEADS and "seconds" in c), default=None
    )


def time_cell(cells: Cells, column: str) -> str:
    cell, peer = cells.get(column, {}), best_peer(cells)
    if "seconds" not in cell:
        reason = cell.get("why", ["-"])[0]
        return reason.split(": ", 1)[-1].split(": ")[0] if "wrong" not in reason else "wrong"
    text = ms(cell["seconds"]) + {"autograd": "ᵃ", "by hand": "ʰ"}.get(cell["way"], "")
    if column in HEADS:
        return f"**{text}**" if cell["seconds"] == peer else text
    return f"{text} ({peer / cell['seconds']:.2f}x)" if peer else text


def cold_cell(cell: dict) -> str:
    return f"{ms(cell.get('first'))} → {ms(cell.get('again'))}" if "first" in cell else "-"


def memory_cell(cell: dict) -> str:
    size = cell.get("bytes")
    if size is None:
        return "-"
    return f"{size / 2**20:.3g} MiB" if size >= 2**18 else f"{size / 2**10:.2g} KiB"


def summary(found: dict[str, Cells], column: str) -> str:
    """The geometric mean over the best peer, and where the column is behind."""
    peers = {name: best_peer(cells) for name, cells in found.items()}
    ratios = {
        name: peers[name] / cells[column]["seconds"]  # type: ignore[operator]
        for name, cells in found.items()
        if peers[name] and "seconds" in cells.get(column, {})
    }
    if not ratios:
        return f"{head(column)}: nothing measured."
    behind = sum(ratio < 1 for ratio in ratios.values())
    return (
        f"{head(column)}: {statistics.geometric_mean(ratios.values()):.2f}x of the fastest peer "
        f"in the geometric mean of {len(ratios)} workloads, behind it on {behind}."
    )


def commit() -> str:
    ask = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True).stdout
    changed = ask("status", "--porcelain", "aotfunc")
    return ask("rev-parse", "--short", "HEAD").strip() + (" with changes" if changed else "")


def tables(report: Report, chosen: dict[str, Workload], found: dict[str, Cells], names: list[str]):
    for group in dict.fromkeys(w.group for w in chosen.values()):
        rows = [name for name, w in chosen.items() if w.group == group and name in found]
        cell = lambda name, column: time_cell(found[name], column)
        body = [[name, *(cell(name, column) for column in names)] for name in rows]
        report.table(group, ["workload", *map(head, names)], body)
    for column in own():
        if column in names:
            report.note(summary(found, column))
    for key, caption, note, show in (
        ("first", "First calls", COLD, cold_cell),
        ("bytes", "Peak memory of a call", MEMORY, memory_cell),
    ):
        with_it = [c for c in names if any(key in cells.get(c, {}) for cells in found.values())]
        rows = [n for n, cells in found.items() if any(key in c for c in cells.values())]
        if rows:
            body = [[n, *(show(found[n].get(c, {})) for c in with_it)] for n in rows]
            report.table(caption, ["workload", *map(head, with_it)], body)
            report.note(note)
    reasons = [
        f"- {name}, {head(column)}: {why}"
        for name, cells in found.items()
        for column, cell in cells.items()
        for why in cell.get("why", [])
    ]
    if reasons:
        report.note("Not timed:\n\n" + "\n".join(reasons))


def lacking(cells: Cells, key: str, names: list[str]) -> list[str]:
    """The columns that neither have this measurement nor a reason for having none."""
    return [c for c in names if not cells.get(c, {}).keys() & {key, "why"}]


def add(cells: Cells, measure: Callable[[dict, float], Cells], task: dict) -> None:
    """Measure the task's columns and put what is found into the workload's cells."""
    if not task["columns"]:
        return
    try:
        new = measure(task, 900)
    except RuntimeError as e:
        new = {task["columns"][0]: {"why": [str(e)]}}
    for column, cell in new.items():
        cells[column] = cells.get(column, {}) | cell


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="workloads by name or group")
    parser.add_argument("--columns", default="", help=f"of {', '.join(columns())}")
    parser.add_argument("--cold", action="store_true", help="first calls, too (takes long)")
    parser.add_argument("--memory", action="store_true", help="peak memory, too")
    parser.add_argument("--keep", type=Path, help="a file of what is measured already: go on")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of timing a workload")
    options = parser.parse_args()
    asked = (
        options.columns.split(",") if options.columns else [c for c in columns() if c not in MORE]
    )
    names = [c for c in columns() if c in asked]
    chosen = {
        name: w
        for name, w in workloads(options.quick).items()
        if re.search(options.only, f"{w.group}: {name}")
    }
    kept = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    found: dict[str, Cells] = kept.setdefault("found", {})
    loads = kept.setdefault("loads", [])
    for name, w in chosen.items():
        task = {"name": name, "columns": names, "quick": options.quick, "mode": "time"}
        task |= {"skip": [], "repeats": 2 if options.quick else 15, "budget_s": options.budget}
        cells = found.setdefault(name, {})
        if lacking(cells, "seconds", names):  # side by side: all of them
            add(cells, measured, task)
        if options.memory:
            add(cells, memory, task | {"columns": lacking(cells, "bytes", names)})
        if options.cold and w.cold:
            compiling = [c for c in names if c in ("compile", "jax") or c in own()]
            add(cells, first_calls, task | {"columns": lacking(cells, "first", compiling)})
        loads.append(os.getloadavg()[0])
        print(name, {c: time_cell(cells, c) for c in names}, flush=True)
        if options.keep:
            options.keep.write_text(json.dumps(kept, indent=1))
    report = Report(
        "cpu", "Performance on the CPU", "python -m benchmarks.cpu --cold --memory --write"
    )
    report.path = DOCS / "performance.md"
    report.note(
        f"{date.today()}, commit {commit()}, {processor()}; load {min(loads):.1f} to "
        f"{max(loads):.1f}."
    )
    for line in METHOD:
        report.note(line)
    found = {name: found[name] for name in chosen}
    tables(report, chosen, found, names)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()

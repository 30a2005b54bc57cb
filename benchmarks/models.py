"""Whole networks: a training step of each, ours beside eager PyTorch and torch.compile.

python -m benchmarks.models [--quick] [--only REGEX] [--columns a,b] [--peers [REGEX]]
[--keep FILE] [--write]. Each network has a process of its own in which the columns take turns.
Those of transformers need `pip install aotfunc[models]`."""

from __future__ import annotations

import json
import os
import re
import tempfile
from datetime import date
from pathlib import Path

from benchmarks.cpu import allocations
from benchmarks.cpu.__main__ import MEMORY, commit, memory_cell, processor
from benchmarks.cpu.processes import Cells, environment, together
from benchmarks.measure import Report, arguments, ms
from benchmarks.model_programs import networks
from benchmarks.model_steps import COLUMNS

HEADS = {
    "eager": "eager",
    "compile": "torch.compile",
    "aot_eager": "torch.compile, aot_eager",
    "ours-eager": "aot_module, eager",
    "ours-cpp": "aot_module, cpp",
}
PEERS = ("compile", "aot_eager")

METHOD = (
    "Two layers each, random parameters, float32, dropout off (`benchmarks/model_programs.py`). "
    "A step is forward and backward, gradients left in the parameters. Times are medians of "
    "processor time with one thread; the columns take turns in one process, and behind each "
    "stands how many times as long eager takes. The loss, every gradient and every buffer of two "
    "steps are compared with float64's before anything is timed: the error may be ten times that "
    "of eager float32, and 1e-5 at least."
)
FIRST = (
    "Processor time of the first step with empty caches, compilers included, imports and a "
    "trivial first call not."
)
DIFFERS = (
    "The largest difference from eager of the loss, any gradient and any buffer in two steps, "
    "and → of the losses of twenty steps of AdamW; relative to the largest element of each "
    "tensor. 0: the same bits."
)
SAMPLES = (
    "Gradients of each of 4 samples, in evaluation mode: a loop over the samples by autograd, and "
    "`jit(vmap(grad(loss)))`; behind each, how many times as long the loop takes, and the largest "
    "difference from it."
)


def measured(task: dict) -> Cells:
    """What a process of its own finds of one network, its caches empty when it starts."""
    cells: Cells = {}
    with tempfile.TemporaryDirectory() as caches:
        env = environment(
            LD_PRELOAD=allocations.library(),
            TORCHINDUCTOR_CACHE_DIR=f"{caches}/inductor",
            AOTFUNC_CACHE_DIR=f"{caches}/aotfunc",
            AOTFUNC_BACKEND="auto",
        )
        for line in together(task, env, 900):
            cell = cells.setdefault(line["column"], {})
            if line["kind"] == "found":
                cell |= {k: v for k, v in line.items() if k not in ("kind", "column", "way")}
            elif line["kind"] == "failed":
                cell["why"] = line["why"]
    return cells


def time_cell(cells: Cells, column: str) -> str:
    cell, eager = cells.get(column, {}), cells.get("eager", {}).get("seconds")
    if "seconds" not in cell:
        return "error" if "why" in cell else "-"
    beside = "" if column == "eager" or not eager else f" ({eager / cell['seconds']:.2f}x)"
    return ms(cell["seconds"]) + beside


def first_cell(cells: Cells, column: str) -> str:
    return ms(cells.get(column, {}).get("first"))


def differs_cell(cells: Cells, column: str) -> str:
    cell = cells.get(column, {})
    return f"{cell['differs']:.0e} → {cell['trained']:.0e}" if "trained" in cell else "-"


def sample_cell(cells: Cells, column: str) -> str:
    found = time_cell(cells, column)
    off = cells.get(column, {}).get("differs")
    return found if column == "eager" or off is None else f"{found}, {off:.0e}"


TABLES = {
    "Training steps": (METHOD, time_cell, "steps"),
    "First steps": (FIRST, first_cell, "steps"),
    "Peak memory of a step": (MEMORY, lambda cells, c: memory_cell(cells.get(c, {})), "steps"),
    "Differences from eager": (DIFFERS, differs_cell, "steps"),
    "Per-sample gradients": (SAMPLES, sample_cell, "per-sample"),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="networks by name")
    parser.add_argument("--columns", default="", help=f"of {', '.join(COLUMNS)}")
    parser.add_argument(
        *("--peers",),
        nargs="?",
        const="",
        metavar="REGEX",
        help="networks with torch.compile, too",
    )
    parser.add_argument("--keep", type=Path, help="a file of what is measured already: go on")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing a network")
    parser.add_argument("--skip-samples", action="store_true", help="no per-sample gradients")
    options = parser.parse_args()
    asked = (
        options.columns.split(",")
        if options.columns
        else [c for c in COLUMNS if options.peers is not None or c not in PEERS]
    )
    names = [c for c in COLUMNS if c in asked]
    kept = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    modes = ["steps"] if options.skip_samples else ["steps", "per-sample"]
    chosen = [n for n in networks(options.quick) if re.search(options.only, n)]
    for name in chosen:
        for mode in modes:
            cells = kept.setdefault(mode, {}).setdefault(name, {})
            peers = mode == "steps" and bool(re.search(options.peers or "", name))
            columns = [c for c in names if c not in cells and (peers or c not in PEERS)]
            if not set(columns) - {"eager"}:
                continue
            task = {"worker": "benchmarks.model_steps", "name": name, "mode": mode}
            task |= {"columns": columns, "skip": [], "quick": options.quick}
            task |= {"repeats": 2 if options.quick else 15, "budget_s": options.budget}
            try:
                cells |= measured(task | {"steps": 3 if options.quick else 20})
            except RuntimeError as e:
                cells |= {c: {"why": str(e)} for c in columns}
            print(name, mode, {c: time_cell(cells, c) for c in names}, flush=True)
            if options.keep:
                options.keep.write_text(json.dumps(kept, indent=1))
    report = Report("models", "Whole networks", "python -m benchmarks.models --peers --write")
    report.note(
        f"{date.today()}, commit {commit()}, {processor()}; load {os.getloadavg()[1]:.1f}."
    )
    for caption, (note, show, mode) in TABLES.items():
        if mode not in modes:
            continue
        found = {n: kept[mode][n] for n in chosen}
        shown = [c for c in names if any(show(cells, c) != "-" for cells in found.values())]
        rows = [[n, *(show(cells, c) for c in shown)] for n, cells in found.items()]
        report.table(caption, ["network", *(HEADS[c] for c in shown)], rows)
        report.note(note)
    failures = [
        f"- {name}, {mode}, {HEADS[c]}: {cell['why']}"
        for mode in modes
        for name in chosen
        for c, cell in kept[mode][name].items()
        if "why" in cell
    ]
    if failures:
        report.note("Not timed:\n\n" + "\n".join(failures))
    if options.write:
        report.write()


if __name__ == "__main__":
    main()

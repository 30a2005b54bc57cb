"""DP-SGD's clipped sums of per-sample gradients: time and memory, beside torch.func,
torch.compile, JAX and ghost clipping by hand.

python -m benchmarks.clipping [--quick] [--write]."""

from __future__ import annotations

from datetime import date

from benchmarks.cpu.__main__ import MEMORY, METHOD, commit, memory_cell, processor, time_cell
from benchmarks.cpu.columns import columns, head
from benchmarks.cpu.processes import Cells, measured, memory
from benchmarks.cpu.workloads import clipped_sums
from benchmarks.measure import Report, arguments

COLUMNS = ("torch", "compile", "jax", "ghost", "exact", "cpp")

WHAT = (
    "A call computes every sample's gradient, shortens it to norm 1 and adds them up. Ours is "
    "the program that torch.func, torch.compile and JAX run, `vmap(grad(loss))`, norms, a "
    "product with the scales (`benchmarks/cpu/programs.py`); ghost clipping is written for each "
    "network, layer by layer, in plain PyTorch with one backward pass "
    "(`benchmarks/cpu/ghost.py`). [contractions.md](contractions.md) says what ours makes of the "
    "program, and `exact=True` leaves undone."
)


def main() -> None:
    options = arguments(__doc__).parse_args()
    names = [c for c in COLUMNS if c in columns()]
    found: dict[str, Cells] = {}
    for name in dict(clipped_sums(options.quick)):
        task = {"name": name, "columns": names, "quick": options.quick, "mode": "time"}
        task |= {"skip": [], "repeats": 2 if options.quick else 9, "budget_s": 20.0}
        found[name] = measured(task, 900)
        for column, cell in memory(task, 900).items():
            found[name].setdefault(column, {}).update(cell)
        print(name, found[name], flush=True)
    report = Report(
        "clipping", "Clipped sums of gradients", "python -m benchmarks.clipping --write"
    )
    report.note(f"{date.today()}, commit {commit()}, {processor()}.")
    for line in (WHAT, *METHOD):
        report.note(line)
    for caption, show in (
        ("Time", lambda cells, c: time_cell(cells, c)),
        ("Peak memory of a call", lambda cells, c: memory_cell(cells.get(c, {}))),
    ):
        rows = [[name, *(show(cells, c) for c in names)] for name, cells in found.items()]
        report.table(caption, ["network", *map(head, names)], rows)
    report.note(MEMORY)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()

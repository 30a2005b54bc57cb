"""docs/coverage.tsv, the outcome of every cell by aotfunc and by torch.func, and docs/coverage.md, what they add up to.

A line of the first is ``op dtype aotfunc torch``, where each library has one character per composition: ``.`` right,
``E`` an error, ``W`` a wrong result, ``-`` no reference to compare with, ``_`` no cell of the matrix, ``?`` not run.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.ops import table
from tests.ops.compositions import COMPOSITIONS

DOCS = Path(__file__).parents[2] / "docs"
TSV, MD = DOCS / "coverage.tsv", DOCS / "coverage.md"
LETTERS = {"right": ".", "error": "E", "wrong": "W", "none": "-"}
COLUMNS = list(COMPOSITIONS)

Outcomes = dict[tuple[str, str], dict[str, str]]  # (op, dtype) -> library -> a character per composition


def read() -> Outcomes:
    if not TSV.exists():
        return {}
    rows = [line.split("\t") for line in TSV.read_text().splitlines() if not line.startswith("#")]
    return {(op, dtype): dict(zip(table.LIBRARIES, letters)) for op, dtype, *letters in rows}


def merged(results: dict[tuple[str, str, str, str], str]) -> Outcomes:
    """What the file holds, with this run put over it; one line for every op and dtype of the matrix."""
    stored, found = read(), {}
    for op in sorted(table.OPS):
        for dtype in table.dtypes(table.OPS[op]):
            present = table.compositions(op, dtype)
            if not present:
                continue
            before = stored.get((op, dtype), {})
            found[op, dtype] = {
                lib: "".join(
                    LETTERS[results[lib, op, dtype, c].split(":")[0]]
                    if (lib, op, dtype, c) in results
                    else "_"
                    if c not in present
                    else before.get(lib, "?" * len(COLUMNS))[i].replace("_", "?")
                    for i, c in enumerate(COLUMNS)
                )
                for lib in table.LIBRARIES
            }
    return found


def counted(outcomes: Outcomes) -> list[list[str]]:
    """Per composition: cells that both had a reference for, and who is right in how many of them."""
    rows = []
    for i, composition in enumerate(COLUMNS):
        pairs = [(by["aotfunc"][i], by["torch"][i]) for by in outcomes.values()]
        pairs = [(a, t) for a, t in pairs if a in ".EW" and t in ".EW"]
        failed = [a for a, t in pairs if t != "."]
        ahead = sum(a == "." for a in failed)
        rows.append(
            [
                composition,
                len(pairs),
                sum(a == "." for a, _ in pairs),
                sum(t == "." for _, t in pairs),
                sum(t == "." and a != "." for a, t in pairs),
                f"{ahead} of {len(failed)}" + (f" ({100 * ahead / len(failed):.0f} %)" if failed else ""),
                sum(a == "W" for a, _ in pairs),
                sum(t == "W" for _, t in pairs),
            ]
        )
    return [[str(x) for x in row] for row in [*rows, total(rows)]]


def total(rows: list[list]) -> list:
    sums = [sum(row[i] for row in rows) for i in (1, 2, 3, 4, 6, 7)]
    parts = [row[5].split(" (")[0].split(" of ") for row in rows]
    ahead, failed = (sum(int(p[k]) for p in parts) for k in (0, 1))
    share = f"{ahead} of {failed}" + (f" ({100 * ahead / failed:.0f} %)" if failed else "")
    return ["all", *sums[:4], share, *sums[4:]]


HEAD = [
    "composition",
    "cells compared",
    "right by aotfunc",
    "right by torch.func",
    "torch right and we not",
    "torch not and we right",
    "wrong by aotfunc",
    "wrong by torch.func",
]

VERSION = torch.__version__.split("+")[0]
TEXT = f"""# Every op under every composition

`python -m tests.ops --lib both --write` (torch {VERSION}, CPU). A cell is an op of PyTorch's own
database (op_db with its variants, autograd_function_db, custom_op_db), a dtype (float32, float64, complex128; one
integer type for ops that take none of them) and a composition; it is right when all of up to three samples are.
vmapvjp is vmap of vjp, and so on. The same checks run for aotfunc and for torch.func, and what they compare with
depends on neither: torch.autograd, forward AD, two reverse passes, loops over the samples, and central differences in
float64 where those have no answer or a doubtful one. Cells where nothing has an answer (an op without any derivative,
samples that are not finite) are not counted. Left out: ops whose results are uninitialised memory, no tensors, or
sparse; under vmap random ops and shapes that depend on values.

`coverage.tsv` has the outcome of every cell: per op and dtype one string for each library, one character per
composition ({", ".join(COLUMNS)}): `.` right, `E` an error, `W` a wrong
result, `-` no reference, `_` no cell, `?` not run. What aotfunc fails in is listed with its reasons in
`tests/ops/known_failures.txt`.

"""


def markdown(rows: list[list[str]]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(outcomes: Outcomes) -> None:
    lines = ["# op\tdtype\taotfunc\ttorch (" + " ".join(COLUMNS) + ")"]
    lines += ["\t".join([*key, *by.values()]) for key, by in outcomes.items()]
    TSV.write_text("\n".join(lines) + "\n")
    MD.write_text(TEXT + markdown(counted(outcomes)))


def show(outcomes: Outcomes) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(*HEAD)
    for row in counted(outcomes):
        shown.add_row(*row)
    Console(width=150).print(shown)

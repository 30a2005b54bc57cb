"""docs/coverage.tsv, the outcome of every cell by aotfunc and by torch.func, and docs/coverage.md,
what they add up to.

A line of the first is ``op dtype aotfunc torch``, where each library has one character per
composition: ``.`` right, ``E`` an error, ``W`` a wrong result, ``-`` no reference to compare with,
``_`` no cell of the matrix, ``?`` not run."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.ops import table
from tests.ops.compositions import COMPOSITIONS

DOCS = Path(__file__).parents[2] / "docs"
TSV, MD = DOCS / "coverage.tsv", DOCS / "coverage.md"
LETTERS = {"right": ".", "error": "E", "wrong": "W", "none": "-"}
COLUMNS = list(COMPOSITIONS)
VERSION = torch.__version__.split("+")[0]

Outcomes = dict[
    tuple[str, str], dict[str, str]
]  # (op, dtype) -> library -> a character per composition


def read() -> Outcomes:
    if not TSV.exists():
        return {}
    rows = [line.split("\t") for line in TSV.read_text().splitlines() if not line.startswith("#")]
    return {(op, dtype): dict(zip(table.LIBRARIES, letters)) for op, dtype, *letters in rows}


def version() -> str:
    """The PyTorch whose ops the file is about."""
    return TSV.read_text().split(":")[0].removeprefix("# torch ") if TSV.exists() else ""


def merged(results: dict[tuple[str, str, str, str], str]) -> Outcomes:
    """What the file holds, with this run put over it; one line for every op and dtype of the
    matrix."""
    stored, found = read(), {}

    def letter(lib: str, op: str, dtype: str, i: int) -> str:
        if COLUMNS[i] not in table.compositions(op, dtype):
            return "_"
        if outcome := results.get((lib, op, dtype, COLUMNS[i])):
            return LETTERS[outcome.split(":")[0]]
        before = stored.get((op, dtype), {}).get(lib, "")
        return before[i].replace("_", "?") if before else "?"

    for op in sorted(table.OPS):
        for dtype in table.dtypes(table.OPS[op]):
            if table.compositions(op, dtype):
                letters = {
                    lib: [letter(lib, op, dtype, i) for i in range(len(COLUMNS))]
                    for lib in table.LIBRARIES
                }
                found[op, dtype] = {lib: "".join(of) for lib, of in letters.items()}
    return found


def counted(outcomes: Outcomes) -> list[list[str]]:
    """Per composition, and of all: cells that both had a reference for, and who is right in how
    many of them."""
    columns = {
        c: [(by["aotfunc"][i], by["torch"][i]) for by in outcomes.values()]
        for i, c in enumerate(COLUMNS)
    }
    columns["all"] = [pair for pairs in columns.values() for pair in pairs]
    rows = []
    for name, pairs in columns.items():
        pairs = [(ours, theirs) for ours, theirs in pairs if ours in ".EW" and theirs in ".EW"]
        they_fail = [ours for ours, theirs in pairs if theirs != "."]
        ahead = they_fail.count(".")
        share = f"{ahead} of {len(they_fail)}" + (
            f" ({100 * ahead / len(they_fail):.0f} %)" if they_fail else ""
        )
        ours, theirs = "".join(o for o, _ in pairs), "".join(t for _, t in pairs)
        behind = sum(t == "." != o for o, t in pairs)
        row = [
            name,
            len(pairs),
            ours.count("."),
            theirs.count("."),
            behind,
            share,
            ours.count("W"),
            theirs.count("W"),
        ]
        rows.append([str(x) for x in row])
    return rows


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

TEXT = f"""# Every op under every composition

`python -m tests.ops --lib both --write` (torch {VERSION}, CPU). A cell is an op of PyTorch's own
database (op_db with its variants, autograd_function_db, custom_op_db), a dtype (float32, float64,
complex128; one integer type for ops that take none of them) and a composition; it is right when
all of up to three samples are. vmapvjp is vmap of vjp, and so on. The same checks run for aotfunc
and for torch.func, and what they compare with depends on neither: torch.autograd, forward AD, two
reverse passes, loops over the samples, and central differences in float64 where those have no
answer or a doubtful one. Cells where nothing has an answer (an op without any derivative, samples
that are not finite) are not counted. Left out: ops whose results are uninitialised memory, no
tensors, or sparse; under vmap random ops and shapes that depend on values.

`coverage.tsv` has the outcome of every cell: per op and dtype one string for each library, one
character per composition ({", ".join(COLUMNS)}): `.` right, `E` an error, `W` a wrong result, `-`
no reference, `_` no cell, `?` not run. What aotfunc fails in is listed with its reasons in
`tests/ops/known_failures.txt`.

"""


def markdown(rows: list[list[str]]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(outcomes: Outcomes) -> None:
    lines = [f"# torch {VERSION}: op, dtype, aotfunc, torch.func ({' '.join(COLUMNS)})"]
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

"""What a partition keeps between forward and backward: each value with its size, the user's line
and the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .cost import nbytes, shape_hint
from .ops import made_at


@dataclass(frozen=True)
class Residual:
    """One saved value."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    bytes: int
    line: str | None
    reason: str


def residuals(fw: fx.GraphModule) -> list[Residual]:
    """What the forward graph of a partition hands to the backward, in order.

    >>> given = ("input", "parameter")
    >>> sum(r.bytes for r in residuals(fw) if r.reason not in given)  # doctest: +SKIP
    """
    reasons: dict[str, str] = fw.meta["reasons"]
    outputs: Any = next(iter(reversed(fw.graph.nodes))).args[0]
    found = []
    for (name, why), n in zip(reasons.items(), outputs[fw.meta["num_fwd_outputs"] :], strict=True):
        val = n.meta["val"]
        dtype = getattr(val, "dtype", None)
        shape = shape_hint(val) if dtype is not None else ()
        found.append(Residual(name, shape, dtype, nbytes(val), made_at(n), why))
    return found


def table(rows: Iterable[Residual]) -> str:
    """The residuals as text, largest first, with the sum of those that the forward made."""
    rows = sorted(rows, key=lambda r: -r.bytes)
    made = [r for r in rows if r.reason not in ("input", "parameter")]
    kept = [r for r in rows if r not in made]
    lines = [
        (
            r.name,
            str(list(r.shape)),
            str(r.dtype).removeprefix("torch."),
            bytes_text(r.bytes),
            r.reason,
            (r.line or "").strip(),
        )
        for r in made
    ]
    lines.insert(0, ("saved", "shape", "dtype", "bytes", "why", "line"))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    text = [
        "  ".join(
            [cell.ljust(w) for cell, w in zip(line, widths, strict=False)] + [line[5]]
        ).rstrip()
        for line in lines
    ]
    total = f"{len(made)} saved values, {bytes_text(sum(r.bytes for r in made))}"
    if kept:
        total += f"; and {len(kept)} inputs and parameters, which the caller keeps anyway"
    return "\n".join([*text, total])


def bytes_text(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"

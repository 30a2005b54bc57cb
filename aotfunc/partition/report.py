"""Report what a partition keeps and recomputes, and how good it is: text, JSON, a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import PartitionError
from ..graph import output_node
from .budget import Budget, Bytes, as_budget
from .cost import Cost, nbytes, shape_of
from .ops import base, made_at
from .problem import Choice, Problem
from .roles import read_joint
from .within import Within

GIVEN = ("input", "parameter")


@dataclass(frozen=True)
class Residual:
    """One saved value."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    bytes: int
    line: str | None
    reason: str


@dataclass(frozen=True)
class Recomputed:
    """One op that runs in the forward and again in the backward; ``time`` in the cost's unit."""

    name: str
    op: str
    time: float
    bytes: int
    line: str | None


class Report:
    """What :func:`partition` decided.

    ``saved`` and ``recomputed`` list the values, ``anew`` what the backward runs once more so that
    its peak is lower, ``bytes`` what is saved beyond the inputs,
    ``time`` what is computed again, in the unit of the cost, and ``forward_time`` what the forward
    takes. What takes a while to find is found when it is asked for: the simulated ``peaks`` of the
    two halves, the ``bound`` on the time of any choice that saves at most ``limit`` bytes (the
    budget's, or what was saved), the ``gap`` to it, and the ``frontier`` of best choices as
    ``(bytes, time, peak)``."""

    def __init__(
        self, fw: fx.GraphModule, within: Within, choice: Choice, budget: Budget | None
    ) -> None:
        self.limit = budget.limit if type(budget) is Bytes else choice.bytes
        self.bytes, self.time = choice.bytes, choice.time
        self.forward_time = within.problem.forward_time
        self._forward, self._within, self._choice = fw, within, choice
        self._run = within.run_under(choice, budget)

    @cached_property
    def saved(self) -> list[Residual]:
        return residuals(self._forward)

    @cached_property
    def recomputed(self) -> list[Recomputed]:
        problem = self._within.problem
        twice = problem.twice(self._choice.saved) & (problem.time > 0)
        return [run_again(problem.nodes[k], problem.cost) for k in np.flatnonzero(twice)]

    @cached_property
    def anew(self) -> list[Recomputed]:
        problem, runs = self._within.problem, Counter(self._run.late)
        more = [problem.joint.nodes[i] for i, count in runs.items() for _ in range(count - 1)]
        return [a for n in more if (a := run_again(n, problem.cost)).time]

    @property
    def peaks(self) -> tuple[int, int]:
        return self._run.peaks

    @property
    def peak(self) -> int:
        return max(self.peaks)

    @cached_property
    def bound(self) -> float:
        return self._within.bound(self.limit, self._choice) if self.time else 0.0

    @property
    def gap(self) -> float:
        """Return how much more is computed again than the bound says, as a share of the bound."""
        if self.time <= self.bound:
            return 0.0
        return self.time / self.bound - 1 if self.bound else float("inf")

    @cached_property
    def frontier(self) -> list[tuple[int, float, int]]:
        points = self._within.frontier.points
        return [(c.bytes, c.time, self._within.peak(c)) for c in points]

    def share(self, time: float) -> float:
        """Return a time as a share of the forward's."""
        return time / self.forward_time if self.forward_time else 0.0

    def __str__(self) -> str:
        lines = [table(self.saved)]
        if self.recomputed:
            lines += ["", again(self.recomputed, self.forward_time)]
        lines += ["", f"peak {bytes_text(self.peak)}, simulated"]
        if self.anew:
            time = self.share(sum([a.time for a in self.anew]))
            lines[-1] += f"; for it {len(self.anew)} ops run once more, {time:.2%} of the forward"
        if self.time:
            lines.append(
                f"computed again: {self.share(self.time):.2%} of the forward's time; no partition "
                f"within {bytes_text(self.limit)} does with less than {self.share(self.bound):.2%}"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the whole report as JSON."""
        return json.dumps(
            {
                "bytes": self.bytes,
                "time": self.time,
                "forward_time": self.forward_time,
                "bound": self.bound,
                "gap": self.gap if self.gap < float("inf") else None,
                "peaks": self.peaks,
                "saved": [asdict(r) | {"dtype": dtype_text(r.dtype)} for r in self.saved],
                "recomputed": [asdict(r) for r in self.recomputed],
                "anew": [asdict(r) for r in self.anew],
                "frontier": self.frontier,
            },
            indent=1,
        )

    def svg(self) -> str:
        """Draw the frontier as SVG: bytes saved, time computed again, the chosen point filled."""
        width, height, edge = 480, 320, 50
        points = [(c, t) for c, t, _ in self.frontier]
        most_bytes = max([b for b, _ in points] + [self.bytes, 1])
        most_time = max([t for _, t in points] + [self.time, 1e-9])

        def place(size: float, time: float) -> tuple[float, float]:
            x = edge + size / most_bytes * (width - 2 * edge)
            return round(x, 1), round(height - edge - time / most_time * (height - 2 * edge), 1)

        line = " ".join(f"{x},{y}" for x, y in (place(*p) for p in points))
        dots = [(p, "white") for p in points] + [((self.bytes, self.time), "black")]
        circles = "".join(
            f'<circle cx="{place(*p)[0]}" cy="{place(*p)[1]}" r="4" fill="{fill}" stroke="black">'
            f"<title>{bytes_text(int(p[0]))}, {self.share(p[1]):.1%}</title></circle>"
            for p, fill in dots
        )
        right, top, bottom = width - edge, edge, height - edge
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12">'
            f'<path d="M{edge},{top} V{bottom} H{right}" fill="none" stroke="gray"/>'
            f'<polyline points="{line}" fill="none" stroke="steelblue"/>{circles}'
            f'<text x="{right}" y="{bottom + 20}" text-anchor="end">saved, up to '
            f"{bytes_text(most_bytes)}</text>"
            f'<text x="{edge}" y="{top - 12}">computed again, up to {self.share(most_time):.0%} '
            "of the forward</text></svg>"
        )

    _repr_svg_ = svg  # how notebooks show it


def run_again(n: fx.Node, cost: Cost) -> Recomputed:
    """Return what another run of a node takes."""
    return Recomputed(n.name, str(n.target), cost.time(n), nbytes(n.meta["val"]), made_at(n))


def report_on(
    partition_fn: Callable, joint: fx.GraphModule, fw: fx.GraphModule, count: int, cost: Cost
) -> Report:
    """Return the report on the cut of a joint graph with ``count`` results that a partition
    function made, also one that is not ours: ``fw`` hands over values that have the joint graph's
    names. Raises PartitionError for others."""
    if "reasons" not in fw.meta:
        who = getattr(partition_fn, "__name__", repr(partition_fn))
        handed = [n for n in output_node(fw.graph).args[0][count:] if isinstance(n, fx.Node)]
        why = {n.name: "input" if n.op == "placeholder" else f"{who} saves it" for n in handed}
        fw.meta.update(num_fwd_outputs=count, reasons=why)
    named = {n.name: n for n in joint.graph.nodes}
    reasons: dict[str, str] = fw.meta["reasons"]
    if unknown := reasons.keys() - named.keys():
        raise PartitionError(f"no report: the joint graph has no {', '.join(sorted(unknown))}")
    problem = Problem(read_joint(joint.graph, count), cost, getattr(partition_fn, "policy", None))
    saved = {base(named[name]) for name in reasons}
    choice = problem.choice(np.array([n in saved for n in problem.nodes], dtype=bool))
    budget = getattr(partition_fn, "memory_budget", None)
    return Report(fw, Within(problem), choice, None if budget is None else as_budget(budget))


def residuals(fw: fx.GraphModule) -> list[Residual]:
    """Return what the forward graph of a partition hands to the backward, in order;
    :func:`default_partition` has an example."""
    reasons: dict[str, str] = fw.meta["reasons"]
    outputs: Any = next(iter(reversed(fw.graph.nodes))).args[0]
    found = []
    for (name, why), n in zip(reasons.items(), outputs[fw.meta["num_fwd_outputs"] :], strict=True):
        val = n.meta["val"]
        dtype = getattr(val, "dtype", None)
        shape = shape_of(val) if dtype is not None else ()
        found.append(Residual(name, shape, dtype, nbytes(val), made_at(n), why))
    return found


def table(rows: Iterable[Residual]) -> str:
    """Return the residuals as text, largest first, with the sum of those that the forward made."""
    rows = sorted(rows, key=lambda r: -r.bytes)
    made = [r for r in rows if r.reason not in GIVEN]
    cells = [
        (r.name, str(list(r.shape)), dtype_text(r.dtype), bytes_text(r.bytes), r.reason, shown(r))
        for r in made
    ]
    total = f"{len(made)} saved values, {bytes_text(sum(r.bytes for r in made))}"
    if len(made) < len(rows):
        total += (
            f"; and {len(rows) - len(made)} inputs and parameters, which the caller keeps anyway"
        )
    return "\n".join([*columns(("saved", "shape", "dtype", "bytes", "why", "line"), cells), total])


def again(rows: Sequence[Recomputed], forward_time: float, most: int = 20) -> str:
    """Return what is computed again as text, the dearest first."""
    rows = sorted(rows, key=lambda r: -r.time)
    share = lambda time: f"{time / forward_time:.2%}" if forward_time else "0%"
    cells = [(r.name, r.op, share(r.time), bytes_text(r.bytes), shown(r)) for r in rows[:most]]
    more = f", of which the {most} dearest are listed" if len(rows) > most else ""
    total = f"{len(rows)} ops computed again{more}"
    return "\n".join([*columns(("again", "op", "of forward", "bytes", "line"), cells), total])


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay lines of cells out in columns; the last cell has its own length."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    return [
        "  ".join([*[c.ljust(w) for c, w in zip(row, widths, strict=False)], row[-1]]).rstrip()
        for row in rows
    ]


def shown(r: Residual | Recomputed) -> str:
    return (r.line or "").strip()


def dtype_text(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_text(count: int) -> str:
    """Return a number of bytes with its unit, for people."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"

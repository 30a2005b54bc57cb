"""Choose the partition that a budget allows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.fx import Node

from ..errors import ArgumentError, PartitionError
from ..progress import with_progress
from .budget import Budget, Bytes, Peak, Share, Time
from .exact import StateGraph
from .frontier import Frontier
from .lower_peak import with_lower_peak
from .memory import Layout
from .order import schedule
from .problem import Choice, Problem
from .solve import INF

#: a choice may cost this share more than it must, and so many partial choices are made to find a
#: better one: some seconds' worth at most
QUICK, SHARP = (1e-3, 2e7), (1e-6, 5e7)
#: of more values than these only the cuts choose, unless asked for the exact best
MANY = 12_000
#: what the backward computes once more for a low peak takes at most this share of the forward
ANEW = 0.05


@dataclass
class RunOrder:
    """In what order the forward and the backward run their nodes, which memory is handed over, and
    what the two ``keep``."""

    layout: Layout
    early: list[int]
    late: list[int]
    saved: set[int]
    keep: tuple[set[int], set[int]]

    @cached_property
    def peaks(self) -> tuple[int, int]:
        """Return the most bytes that live at one time in each half: what it makes, and what was
        saved until it is read for the last time. Inputs and cotangents are not counted, nor what
        is in the host's memory, before it comes back."""
        early, late = self.keep
        return (
            self.layout.peak(self.early, set(), early),
            self.layout.peak(self.late, self.saved, late),
        )


class Within:
    """The choices within budgets for one joint graph, found when they are asked for."""

    def __init__(self, problem: Problem, exact: bool = False) -> None:
        self.problem, self.exact = problem, exact
        self.runs: dict[tuple[bytes, bool], RunOrder] = {}
        self.solved: dict[tuple[float, str], tuple[Choice | None, float]] = {}

    @cached_property
    def frontier(self) -> Frontier:
        return Frontier(self.problem)

    @cached_property
    def walk(self) -> StateGraph:
        return StateGraph(self.problem)

    def run(self, choice: Choice, low: bool) -> RunOrder:
        """Return how the halves of a choice run. If their peaks are to be ``low``, the backward
        computes some values once more."""
        if (key := (choice.saved.tobytes(), low)) in self.runs:
            return self.runs[key]
        joint, layout = self.problem.joint, self.problem.joint.layout
        held = {joint.index[self.problem.nodes[k]] for k in np.flatnonzero(choice.saved)}
        hosted = {joint.index[n] for n in self.problem.offloaded(choice)}
        early, late = schedule(joint, held, hosted)
        saved = {layout.owner[i] for i in held - hosted}
        results, grads = (
            {layout.owner[joint.index[o]] for o in outs if isinstance(o, Node)}
            for outs in (joint.early_outputs, joint.late_outputs)
        )
        if low:
            most = ANEW * self.problem.forward_time
            late = with_lower_peak(joint, late, saved | hosted, grads, self.problem.cost, most)
        self.runs[key] = RunOrder(layout, early, late, saved, (saved | results, grads))
        return self.runs[key]

    def run_under(self, choice: Choice, budget: Budget | None) -> RunOrder:
        """Return how a choice runs under a budget: where that is of peaks, with values that are
        computed once more, unless a ``Peak`` is met without."""
        match budget:
            case Peak():
                low = max(self.run(choice, False).peaks) > budget.limit
            case Share(share):
                low = share < 1
            case _:
                low = False
        return self.run(choice, low)

    def peak(self, choice: Choice) -> int:
        """Return the lowest peak of a choice that was found."""
        return max(self.run(choice, low=True).peaks)

    @cached_property
    def worthwhile(self) -> list[Choice]:
        """Return the choices that were cut, from the most bytes down, as long as the simulated
        peak does not rise: what is computed again lives in the backward, in the end all of it.
        What runs once more is no reason to save less."""
        found: list[Choice] = []
        least = lowest = INF
        for choice in with_progress("peaks of the frontier", self.frontier.choices[::-1]):
            peak = max(self.run(choice, low=False).peaks)
            if peak <= least and self.peak(choice) <= lowest:
                found.append(choice)
                least, lowest = peak, self.peak(choice)
        return found

    def choice(self, budget: Budget) -> Choice:
        """Return the best choice within the budget. Raises PartitionError if there is none."""
        match budget:
            case Share(1.0) | Time(0.0) if not self.exact:
                return self.problem.cheapest(INF)
            case Share(share):
                most, least = self.worthwhile[0], self.worthwhile[-1]
                limit = least.bytes + share * (most.bytes - least.bytes)
                if self.exact:
                    return self.limited(limit, "bytes")
                return next(c for c in self.worthwhile if c.bytes <= limit)
            case Peak():
                if self.exact:
                    raise ArgumentError("exact: peaks are simulated, and have no bound; drop it")
                choices = with_progress("peaks of the frontier", self.frontier.choices)
                peaks = [(self.peak(c), c) for c in choices]
                fit = [c for peak, c in peaks if peak <= budget.limit]
                if not fit:
                    raise too_little("a peak", budget.limit, min(peak for peak, _ in peaks))
                return min(fit, key=lambda c: c.time)
            case Bytes():
                return self.limited(budget.limit, "bytes")
            case Time(share):
                asked = self.frontier.ends[1].choice.time  # by checkpoints
                return self.limited(asked + share * self.problem.forward_time, "time")
        raise AssertionError(budget)

    def bound(self, limit: float, choice: Choice) -> float:
        """Return a time that no choice within so many bytes beats, of which this is one; the least
        time, or nearly, where it can be found."""
        return self.best(limit, "bytes", choice)[1]

    def best(self, limit: float, axis: str, known: Choice | None) -> tuple[Choice | None, float]:
        """Return the best choice that is found within a limit, none worse than the one that is
        ``known``, and a bound that no choice beats. What was found is remembered."""
        if (limit, axis) not in self.solved:
            bound, price = self.frontier.bound(limit, axis)
            gap, work = SHARP if self.exact else QUICK
            count = len(self.problem.nodes)
            cost = INF if known is None else cost_of(known, axis)
            if cost > (1 + gap) * bound and (self.exact or count <= MANY):
                known, found = self.walk.best(limit, axis, price, known, gap, work)
                bound = max(bound, found)
            self.solved[limit, axis] = known, bound
        return self.solved[limit, axis]

    def limited(self, limit: float, axis: str) -> Choice:
        choice, _ = self.best(limit, axis, self.frontier.within(limit, axis))
        if choice is None:
            raise too_little("saving", limit, self.frontier.ends[0].choice.bytes)
        return choice


def cost_of(choice: Choice, axis: str) -> float:
    """Return what is to be least where this axis is limited."""
    return choice.time if axis == "bytes" else choice.bytes


def too_little(what: str, limit: float, least: int) -> PartitionError:
    return PartitionError(
        f"memory_budget: {what} of at most {limit:.0f} bytes is not possible; the least is {least}"
    )

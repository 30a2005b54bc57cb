"""Which choice a budget buys."""

from __future__ import annotations

from functools import cached_property
from operator import attrgetter

import numpy as np

from ..errors import ArgumentError, PartitionError
from ..progress import along
from .budget import Budget, Bytes, Peak, Share, Time
from .exact import best
from .frontier import Frontier
from .memory import Simulation
from .problem import Choice, Problem
from .solve import INF

#: the integer program is asked where a choice among so many values costs this share more than the
#: bound of the cuts; of more values than these it is not
GAPS = {5_000: 0.05, 12_000: 0.01}


class Within:
    """The choices within budgets for one joint graph; what they need is found when it is asked
    for."""

    def __init__(self, problem: Problem, exact: bool = False) -> None:
        self.problem, self.exact = problem, exact
        self.solved: dict[tuple[float, str], tuple[Choice | None, float]] = {}

    @cached_property
    def frontier(self) -> Frontier:
        return Frontier(self.problem)

    @cached_property
    def simulation(self) -> Simulation:
        return Simulation(self.problem.joint)

    def peaks(self, choice: Choice) -> tuple[int, int]:
        """Return the simulated peaks of forward and backward."""
        index, nodes = self.problem.joint.index, self.problem.nodes
        held = [False] * len(index)
        for k in np.flatnonzero(choice.saved):
            held[index[nodes[k]]] = True
        return self.simulation.peaks(held, {index[n] for n in self.problem.offloaded(choice)})

    @cached_property
    def worthwhile(self) -> list[Choice]:
        """Yield the points of the frontier from the most bytes down, as long as the simulated peak
        does not rise: what is computed again lives in the backward, in the end all of it."""
        found: list[Choice] = []
        least = INF
        for choice in along("peaks of the frontier", self.frontier.points[::-1]):
            if (peak := max(self.peaks(choice))) <= least:
                found.append(choice)
                least = peak
        return found

    def choice(self, budget: Budget) -> Choice:
        """Return the best choice within the budget. Raises PartitionError if there is none."""
        match budget:
            case Share(1.0) if not self.exact:
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
                points = along("peaks of the frontier", self.frontier.points)
                peaks = [(max(self.peaks(c)), c) for c in points]
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

    def bound(self, size: float, time: float) -> float:
        """Return a time that no choice within so many bytes beats, and that is not far below the
        least, if it can be found, where it is far below this ``time``."""
        found = self.frontier.bound(size)
        return max(found, self.best(size, "bytes")[1]) if self.far(time, found) else found

    def far(self, cost: float, bound: float) -> bool:
        """Return whether the integer program is to be asked about a choice of this cost."""
        return self.exact or cost > (1 + self.gap) * bound

    @property
    def gap(self) -> float:
        """Return by how much a choice may cost more than the bound, as a share."""
        count = len(self.problem.nodes)
        return next((gap for many, gap in GAPS.items() if count <= many), INF)

    def best(self, limit: float, axis: str) -> tuple[Choice | None, float]:
        """Return what the integer program finds, which is asked once."""
        if (limit, axis) not in self.solved:
            gap, seconds = (5e-4, 10.0) if self.exact else (0.8 * self.gap, 2.0)
            self.solved[limit, axis] = best(self.problem, limit, axis, gap, seconds)
        return self.solved[limit, axis]

    def limited(self, limit: float, axis: str) -> Choice:
        first = self.frontier.within(limit, axis)
        found, other = [first], attrgetter("time" if axis == "bytes" else "bytes")
        if self.exact or (
            first is not None and self.far(other(first), self.frontier.bound(limit, axis))
        ):
            found.append(self.best(limit, axis)[0])
        fit = [c for c in found if c is not None and getattr(c, axis) <= limit]
        if not fit:
            raise too_little("saving", limit, self.frontier.ends[0].choice.bytes)
        return min(fit, key=other)


def too_little(what: str, limit: float, least: int) -> PartitionError:
    return PartitionError(
        f"memory_budget: {what} of at most {limit:.0f} bytes is not possible; the least is {least}"
    )

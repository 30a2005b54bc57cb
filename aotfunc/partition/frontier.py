"""Find the best choices: the fewest bytes for each time, and bounds that no choice beats.

For each price the cheapest cut is a point on the lower convex hull of all choices in the plane of
bytes and time, and the line of that price through it bounds all of them from below: by sweeping
the price one finds every such point, and the least time that any choice within a budget takes.

Layers that are alike switch together, so that there are few points. Times are therefore *tilted*
by up to TILT, and layers switch one by one: within each of 2 sqrt(n) stretches later values are
dearer, so that what is saved lies apart, and what is computed again for one value that the
backward reads is little. Bounds are of times as they are."""

from __future__ import annotations

import heapq
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..progress import doing
from .problem import Choice, Problem
from .solve import INF

#: how much dearer the last value of a stretch is than the first
TILT = 0.02
#: the sweep stops when points are this share of all bytes apart, or at so many cuts
NEAR, MANY = 0.04, 48


class Point(NamedTuple):
    """A cut: the bytes and the (tilted) time that it is made of, and the choice."""

    bytes: float
    time: float
    choice: Choice


class Frontier:
    """The cuts of a problem, found as they are asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        count = len(problem.nodes)
        stretches = int(2 * count**0.5)
        self.tilt = 1 + TILT * (np.arange(count) * stretches / max(count, 1) % 1)
        self.made = 0  # cuts so far

    @cached_property
    def ends(self) -> tuple[Point, Point]:
        """Return the two ends: the least bytes, and nothing computed twice that need not be."""
        return self.ends_of(self.tilt)

    def ends_of(self, tilt: np.ndarray) -> tuple[Point, Point]:
        problem = self.problem
        most = self.point(problem.network.cheapest(problem.save, problem.redo(INF)).saved, tilt)
        finite = problem.redo(1.0) * tilt
        # so low that time only decides among the choices with the least bytes
        price = 1e-6 * max(most.bytes, 1.0) / max(finite[finite < INF].sum(), 1.0)
        return self.cut(price, tilt, most)[0], most

    def point(self, saved: np.ndarray, tilt: np.ndarray) -> Point:
        problem = self.problem
        redo = problem.redo(1.0) * tilt
        late = problem.late(saved)
        choice = problem.choice(saved)
        return Point(float(problem.save[saved].sum()), float(redo[late].sum()), choice)

    def cut(self, price: float, tilt: np.ndarray, *known: Point) -> tuple[Point, float]:
        """Return the cheapest choice at a price, and a bound that no choice beats."""
        problem = self.problem
        bound = min([p.bytes + price * p.time for p in known])
        self.made += 1
        with doing(lambda: f"cut {self.made}"):
            redo = problem.redo(price) * tilt
            found = problem.network.cut(problem.save, redo, bound * (1 + 1e-9))
        return self.point(found.saved, tilt), found.bound

    def between(self, low: Point, high: Point) -> Point | None:
        """Return a point of the hull between two of its points, if there is one."""
        if low.time <= high.time or low.bytes >= high.bytes:
            return None
        price = (high.bytes - low.bytes) / (low.time - high.time)
        found, _ = self.cut(price, self.tilt, low, high)
        line = low.bytes + price * low.time
        better = found.bytes + price * found.time < line * (1 - 1e-7)
        inner = low.bytes < found.bytes < high.bytes
        return found if better and inner else None

    @cached_property
    def cuts(self) -> list[Point]:
        """Return points all along the hull, from the least bytes to the most."""
        low, high = self.ends
        points, apart = [low, high], NEAR * (high.bytes - low.bytes)
        gaps = [(low.bytes - high.bytes, low.bytes, low, high)]
        for _ in range(MANY):
            if not gaps or -gaps[0][0] <= apart:
                break
            _, _, a, b = heapq.heappop(gaps)
            if (c := self.between(a, b)) is not None:
                points.append(c)
                for p, q in ((a, c), (c, b)):
                    heapq.heappush(gaps, (p.bytes - q.bytes, p.bytes, p, q))
        return sorted(points, key=lambda p: p.bytes)

    @cached_property
    def points(self) -> list[Choice]:
        """Return choices that none beats in both bytes and time, the least bytes first."""
        return undominated([p.choice for p in self.cuts])

    def within(self, limit: float, axis: str) -> Choice | None:
        """Return the best choice whose ``axis``, "bytes" or "time", is at most ``limit``; None if
        there is none."""
        a, b = self.ends if axis == "bytes" else self.ends[::-1]
        fits = lambda p: getattr(p.choice, axis) <= limit
        found = [p.choice for p in (a, b) if fits(p)]
        if len(found) == 1:
            while (c := self.between(*ordered(a, b))) is not None:
                if fits(c):
                    found.append(c.choice)
                    a = c
                else:
                    b = c
        other = "time" if axis == "bytes" else "bytes"
        return min(found, key=lambda c: (getattr(c, other), getattr(c, axis)), default=None)

    def bound(self, limit: float, axis: str = "bytes") -> tuple[float, float]:
        """Return a bound that no choice beats, on the time within so many bytes, or the bytes
        within so much time; and its price, of a byte in time, or of time in bytes.

        The lines of all prices bound it; the best of them goes through the two points of the hull
        on either side of the limit."""
        problem = self.problem
        flat = np.ones(len(problem.nodes))
        low, high = self.ends_of(flat)
        # inputs and sizes cost next to nothing in the cut, and nothing here
        free = float(problem.save[problem.save < INF].sum() - problem.bytes.sum())
        best = 0.0, 0.0
        while low.time > high.time and low.bytes < high.bytes:
            price = (high.bytes - low.bytes) / (low.time - high.time)
            found, value = self.cut(price, flat, low, high)
            value -= free
            if axis == "bytes":
                best = max(best, ((value - limit) / price, 1 / price))
            else:
                best = max(best, (value - price * limit, price))
            inner = low.bytes < found.bytes < high.bytes
            if not inner or value + free >= (low.bytes + price * low.time) * (1 - 1e-6):
                break
            if (found.bytes <= limit) if axis == "bytes" else (found.time > limit):
                low = found
            else:
                high = found
        return best


def ordered(a: Point, b: Point) -> tuple[Point, Point]:
    return (a, b) if a.bytes <= b.bytes else (b, a)


def undominated(choices: list[Choice]) -> list[Choice]:
    """Return the choices that no other one beats in bytes or time without a loss in the other."""
    best: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.bytes, c.time)):
        if not best or c.time < best[-1].time:
            best.append(c)
    return best

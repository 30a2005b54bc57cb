"""Find the best choices: the fewest bytes for each time, and bounds that no choice beats.

For each price the cheapest cut is a point on the lower convex hull of all choices in the plane of
bytes and time, and the line of that price through it bounds all of them from below: by sweeping
the price one finds every such point, and the least time that any choice within a budget takes.

Layers that are alike switch together, so that there are few points. Between two of them times are
therefore *tilted* by up to TILT, and layers switch one by one: within each of 2 sqrt(n) stretches
later values are dearer, so that what is saved lies apart, and what is computed again for one value
that the backward reads is little. Those that are on the hull all the same are points of the
frontier, which nothing beats. Bounds are of times as they are."""

from __future__ import annotations

import heapq
from functools import cached_property
from itertools import count
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
        length = len(problem.nodes)
        stretches = int(2 * length**0.5)
        self.flat = np.ones(length)
        self.tilt = 1 + TILT * (np.arange(length) * stretches / max(length, 1) % 1)
        self.made = 0  # cuts so far

    @cached_property
    def ends(self) -> tuple[Point, Point]:
        """Return the two ends: the least bytes, and nothing computed twice that need not be."""
        problem = self.problem
        most = self.point(problem.cheapest(INF).saved, self.flat)
        # so low that time only decides among the choices with the least bytes
        price = max(1e-6 * most.bytes, 0.5) / max(problem.time[problem.time < INF].sum(), 1.0)
        return self.cut(price, self.flat, most)[0], most

    def point(self, saved: np.ndarray, tilt: np.ndarray) -> Point:
        problem = self.problem
        time = float((problem.time * tilt)[problem.twice(saved)].sum())
        return Point(float(problem.save[saved].sum()), time, problem.choice(saved))

    def cut(self, price: float, tilt: np.ndarray, *known: Point) -> tuple[Point, float]:
        """Return the cheapest choice at a price, and a bound that no choice beats."""
        problem = self.problem
        bound = min([p.bytes + price * p.time for p in known])
        self.made += 1
        with doing(lambda: f"cut {self.made}"):
            again = problem.again(price) * tilt
            found = problem.network.cut(problem.save, again, bound * (1 + 1e-9))
        return self.point(found.saved, tilt), found.bound

    def between(self, low: Point, high: Point, tilt: np.ndarray) -> Point | None:
        """Return a point of the hull below the line through two points, if there is one."""
        if low.time <= high.time or low.bytes >= high.bytes:
            return None
        price = (high.bytes - low.bytes) / (low.time - high.time)
        found, _ = self.cut(price, tilt, low, high)
        line = low.bytes + price * low.time
        return found if found.bytes + price * found.time < line * (1 - 1e-7) else None

    def tilted(self, point: Point) -> Point:
        return self.point(point.choice.saved, self.tilt)

    @cached_property
    def cuts(self) -> list[Point]:
        """Return points all along the hull, from the least bytes to the most."""
        low, high = self.ends
        points, apart = [low, high], NEAR * (high.bytes - low.bytes)
        order = count()
        gaps = [(low.bytes - high.bytes, next(order), low, high, self.flat)]
        for _ in range(MANY):
            if not gaps or -gaps[0][0] <= apart:
                break
            _, _, a, b, tilt = heapq.heappop(gaps)
            pairs = []
            if (c := self.between(a, b, tilt)) is not None:
                points.append(c)
                pairs = [(a, c), (c, b)]
            elif tilt is self.flat:
                tilt, pairs = self.tilt, [(self.tilted(a), self.tilted(b))]
            for p, q in pairs:
                heapq.heappush(gaps, (p.bytes - q.bytes, next(order), p, q, tilt))
        return points

    @cached_property
    def choices(self) -> list[Choice]:
        """Return the choices that no other cut beats in bytes or time without a loss in the other,
        the least bytes first."""
        return undominated([p.choice for p in self.cuts])

    @cached_property
    def points(self) -> list[Choice]:
        """Return those of the choices that nothing beats, for they are on the hull."""
        return on_hull(self.choices)

    def within(self, limit: float, axis: str) -> Choice | None:
        """Return the best choice whose ``axis``, "bytes" or "time", is at most ``limit``; None if
        there is none."""
        a, b = map(self.tilted, self.ends if axis == "bytes" else self.ends[::-1])
        fits = lambda p: getattr(p.choice, axis) <= limit
        found = [p.choice for p in (a, b) if fits(p)]
        if len(found) == 1:
            while (c := self.between(*ordered(a, b), self.tilt)) is not None:
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
        low, high = self.ends
        # inputs and sizes cost next to nothing in the cut, and nothing here
        free = float(problem.save[problem.save < INF].sum() - problem.bytes.sum())
        best = 0.0, 0.0
        while low.time > high.time and low.bytes < high.bytes:
            price = (high.bytes - low.bytes) / (low.time - high.time)
            found, value = self.cut(price, self.flat, low, high)
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
    best: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.bytes, c.time)):
        if not best or c.time < best[-1].time:
            best.append(c)
    return best


def on_hull(choices: list[Choice]) -> list[Choice]:
    """Return the undominated choices that are on the lower convex hull of all."""
    best: list[Choice] = []
    for c in choices:
        while len(best) > 1 and lies_above(best[-1], best[-2], c):
            best.pop()
        best.append(c)
    return best


def lies_above(b: Choice, a: Choice, c: Choice) -> bool:
    """Return whether ``b`` lies above the line through the two others."""
    price = (c.bytes - a.bytes) / (a.time - c.time)
    line = a.bytes + price * a.time
    return b.bytes + price * b.time > line * (1 + 1e-9)

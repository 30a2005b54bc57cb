"""Place a value in a kernel: for each of its dimensions an index, affine in the axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .ir import Expr, Unfit


@dataclass(frozen=True)
class Index:
    """``start``, plus a step along each axis or looked-up value, times its factor."""

    steps: tuple[tuple[int | Expr, int], ...] = ()
    start: int = 0

    def __add__(self, other: Index) -> Index:
        steps = dict(self.steps)
        for what, step in other.steps:
            steps[what] = steps.get(what, 0) + step
        order = sorted(steps, key=lambda w: w if isinstance(w, int) else math.inf)
        return Index(tuple([(w, steps[w]) for w in order if steps[w]]), self.start + other.start)

    def __mul__(self, n: int) -> Index:
        return Index(tuple([(w, s * n) for w, s in self.steps if n]), self.start * n)

    def shifted(self, n: int) -> Index:
        return Index(self.steps, self.start + n)

    @property
    def axes(self) -> list[int]:
        """Return the axes, the one with the longest steps first."""
        steps = [(-abs(s), w) for w, s in self.steps if isinstance(w, int)]
        return [k for _, k in sorted(steps)]

    @property
    def found(self) -> list[tuple[Expr, int]]:
        return [(w, s) for w, s in self.steps if not isinstance(w, int)]


Place = tuple[Index, ...]

#: the index of a dimension of size 1, or of a broadcast one
FIRST = Index()


class Split(Exception):
    """Raised for an axis to be split, the inner one of this extent: an index is affine then."""

    def __init__(self, axis: int, inner: int) -> None:
        self.axis, self.inner = axis, inner


def index_along(axis: int, step: int = 1) -> Index:
    return Index(((axis, step),))


def bounds(index: Index, extents: Sequence[int]) -> tuple[int, int]:
    """Return the least and the greatest value of an index that has no looked-up values."""
    ends = [s * (extents[k] - 1) for k, s in index.steps if isinstance(k, int)]
    return (
        index.start + sum([e for e in ends if e < 0]),
        index.start + sum([e for e in ends if e > 0]),
    )


def covers(index: Index, size: int, extents: Sequence[int]) -> bool:
    """Return whether an index takes each value below ``size`` once."""
    if index.start or index.found:
        return False
    reached = 1
    for k in reversed(index.axes):
        if dict(index.steps)[k] != reached:
            return False
        reached *= extents[k]
    return reached == size


def divide_index(index: Index, n: int, extents: Sequence[int]) -> tuple[Index, Index]:
    """Return quotient and remainder. Raises Split if that makes them affine, else Unfit."""
    start, rest = divmod(index.start, n)
    whole = Index(tuple([(w, s // n) for w, s in index.steps if s % n == 0]), start)
    part = Index(tuple([(w, s) for w, s in index.steps if s % n]), rest)
    if not part.found:
        low, high = bounds(part, extents)
        if low >= 0 and high < n:
            return whole, part
        for k, s in part.steps:
            assert isinstance(k, int)
            if s > 0 and n % s == 0 and extents[k] > n // s and extents[k] % (n // s) == 0:
                raise Split(k, n // s)
    raise Unfit("an index that is not affine")


def regrouped(
    place: Place, shape: Sequence[int], have: Sequence[int], extents: Sequence[int]
) -> Place:
    """Return the place of a value of shape ``have`` shown in ``shape``, or raise likewise."""
    found = [FIRST] * len(have)
    left = list(zip(place, shape, strict=True))
    flat, size = FIRST, 1
    for d in range(len(have) - 1, -1, -1):
        if have[d] == 1:
            continue
        while size % have[d]:
            index, n = left.pop()
            flat, size = flat + index * size, size * n
        if size == have[d]:
            found[d], flat = flat, FIRST
        else:
            flat, found[d] = divide_index(flat, have[d], extents)
        size //= have[d]
    return tuple(found)


def matched(sizes: Sequence[int], axes: Sequence[int], extents: Sequence[int]) -> Place | None:
    """Return the place of dimensions of these sizes, each along the next of the axes; None if
    sizes differ. Raises Split if an axis belongs to two dimensions."""
    rest = list(axes)
    found = []
    for size in sizes:
        taken = []
        n = 1
        while n < size and rest:
            k = rest.pop(0)
            outer = size // n
            if size % (n * extents[k]):
                if size % n == 0 and extents[k] % outer == 0:
                    raise Split(k, extents[k] // outer)
                return None
            n *= extents[k]
            taken.append(k)
        if n != size:
            return None
        index, step = FIRST, 1
        for k in reversed(taken):
            index, step = index + index_along(k, step), step * extents[k]
        found.append(index)
    return None if rest else tuple(found)

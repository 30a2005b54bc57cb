"""Find the best choice within a hard budget, by a walk along the graph.

A choice on the frontier is the best for its own bytes; between two of them others may be better.
The walk decides value by value, each soon after its inputs. What was decided matters to the rest
by its *state* only, which says of each value that is still to be read:

    EARLY   the forward computes it:   then it computes its inputs, too
    SAVED   it is saved:               then it is EARLY
    LATE    the backward computes it:  then its inputs are SAVED or LATE

SAVED takes bytes, EARLY and LATE together take time. Networks are narrow, few values wait at any
place, so that there are few states: hundreds at most in a transformer. From the end one finds the
least "cost + price x resource" of all that follows each state. From the start *partial choices*
(state, bytes, time) are extended, and dropped where another one of their state beats them in both,
or where what follows cannot make them better than the best choice known; this is Handler and
Zang's way to constrained shortest paths (Networks 10, 1980). Of more than a walk's width those
with the highest bounds are dropped; the lowest of these says what might have been lost, and wider
walks follow until nothing was. Work is counted in partial choices: the result does not depend on
the machine.

What can be saved at no cost is at hand, and what can be redone at no cost but not saved, as views,
is at hand with its inputs: neither has a place in states. Nor has a value with one reader that
takes no more bytes: it is never saved, and runs where its reader does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..progress import timed
from .problem import Choice, Problem
from .roles import ancestors
from .solve import INF

EARLY, SAVED, LATE = 1, 2, 4
TWICE = EARLY | LATE
#: three bits for each value that waits; a 64-bit integer has room for so many
_ROOM = 21
#: with more states than these in one place a graph is too wide to be walked along
STATES = 4096
#: partial choices kept in each place by the first walk, and how many times more by the next one
FIRST, WIDER = 64, 8


class Transitions(NamedTuple):
    """What may become of one value: transitions between states, sorted by where they start.
    ``first[s]`` is the first of state s."""

    value: int
    first: np.ndarray
    end: np.ndarray
    fate: np.ndarray
    bytes: np.ndarray
    time: np.ndarray


class Partial(NamedTuple):
    """Partial choices: their states, bytes and time, and lower bounds on the cost of all that can
    become of them; which partial choice each extends, by which transition."""

    state: np.ndarray
    bytes: np.ndarray
    time: np.ndarray
    bound: np.ndarray
    before: np.ndarray
    by: np.ndarray

    def at(self, places: np.ndarray) -> Partial:
        return Partial(*(a[places] for a in self))


class StateGraph:
    """The states of a problem and their transitions, ``steps``; None if there are too many."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.given = costless(problem)
        self.steps = self.walk()

    def walk(self) -> list[Transitions] | None:
        problem = self.problem
        inputs, needed = without_given(problem, self.given)
        values, inputs, unread, times = in_series(problem, inputs, needed)
        place: dict[int, int] = {}  # of a value that waits, among the bits of a state
        room = list(range(3 * (_ROOM - 1), -1, -3))
        states, steps, wanted = np.zeros(1, dtype=np.int64), [], set(needed)
        for v in narrow_order(values, inputs, problem.forward):
            fates = np.array(fates_of(problem, v, v in wanted, times[v] < INF))
            early, at_hand = np.ones((2, len(states)), dtype=bool)
            for u in inputs[v]:
                fate = states >> place[u]
                early &= fate & EARLY > 0
                at_hand &= fate & (SAVED | LATE) > 0
            reached = states
            waits = unread[v] > 0
            if waits:
                if not room:
                    return None
                place[v] = room.pop()
            for u in inputs[v]:
                unread[u] -= 1
                if not unread[u]:
                    reached = reached & ~(7 << place[u])
                    room.append(place.pop(u))
            able = early[:, None] | (fates & EARLY == 0)
            able &= at_hand[:, None] | (fates & LATE == 0)
            start, which = np.nonzero(able)
            became = fates[which]
            first = np.append(0, np.cumsum(able.sum(1)))
            end = reached[start] | (became << place[v] if waits else 0)
            states, end = np.unique(end, return_inverse=True)
            if len(states) > STATES:
                return None
            size = np.where(became & SAVED, problem.bytes[v], 0).astype(np.int64)
            time = np.where(became & TWICE == TWICE, times[v], 0.0)
            steps.append(Transitions(v, first, end, became, size, time))
        return steps

    @timed("best choice")
    def best(
        self, limit: float, axis: str, price: float, known: Choice | None, gap: float, work: float
    ) -> tuple[Choice | None, float]:
        """Return a choice within ``limit`` bytes that takes at most ``gap`` more time than it
        must, as a share, or the best one that is found by about so many partial choices, and a
        bound that no choice beats; for the axis "time" a choice of few bytes within that time.

        ``price`` is that of a byte in time, or of time in bytes, where the limit binds; ``known``
        a choice within the limit."""
        if self.steps is None:
            return known, 0.0
        # columns: prices of the resource, and the resource alone
        prices = price * np.array([0, 0.7, 0.9, 1, 1.1, 1.4])
        to_come = self.to_come(axis, np.append(prices, 1), np.append(np.ones(6), 0))
        cost = lambda c: getattr(c, "time" if axis == "bytes" else "bytes")
        best, bound, width = known, 0.0, FIRST
        while True:
            target = INF if best is None else cost(best) * (1 - gap)
            if bound >= target:
                break
            found, least, done = self.extend(limit, axis, prices, to_come, target, width)
            best = min([c for c in (best, found) if c is not None], key=cost, default=None)
            bound = max(bound, min(least, target))
            work -= done
            width *= WIDER
            if bound == target or work < 3 * width * len(self.steps):
                break
        return best, bound

    def to_come(self, axis: str, prices: np.ndarray, costs: np.ndarray) -> list[np.ndarray]:
        """Return, for each place and state, the least "cost x its weight + resource x price" of
        all that follows, one column for each price."""
        assert self.steps is not None
        found = [np.zeros((1, len(prices)))]
        for step in reversed(self.steps):
            resource, cost = criteria(axis, step.bytes, step.time)
            paid = found[-1][step.end] + np.outer(resource, prices) + np.outer(cost, costs)
            least = np.full((len(step.first) - 1, len(prices)), INF)
            leaves = np.flatnonzero(step.first[1:] > step.first[:-1])
            least[leaves] = np.minimum.reduceat(paid, step.first[leaves])
            found.append(least)
        return found[::-1]

    def extend(
        self,
        limit: float,
        axis: str,
        prices: np.ndarray,
        to_come: list[np.ndarray],
        target: float,
        width: int,
    ) -> tuple[Choice | None, float, int]:
        """Return the best choice below the ``target`` that a walk of this width finds, a cost that
        no other one below the target beats, and how many partial choices the walk made."""
        assert self.steps is not None
        zero = np.zeros(1, dtype=np.int64)
        now = Partial(zero, zero, np.zeros(1), np.zeros(1), zero, zero)
        trail, lost, work = [], INF, 0
        for step, ahead in zip(self.steps, to_come[1:], strict=True):
            begin, end = step.first[now.state], step.first[now.state + 1]
            before = np.repeat(np.arange(len(begin)), end - begin)
            by = np.arange(len(before)) + (end - np.cumsum(end - begin))[before]
            state, size = step.end[by], now.bytes[before] + step.bytes[by]
            time = now.time[before] + step.time[by]
            resource, cost = criteria(axis, size, time)
            bounds = cost[:, None] + np.outer(resource - limit, prices) + ahead[state, :-1]
            made = Partial(state, size, time, bounds.max(1), before, by)
            fits = resource + ahead[state, -1] <= limit
            work += len(by)
            now = undominated_by_state(made.at(np.flatnonzero(fits & (made.bound < target))))
            if len(now.state) > width:
                order = np.argpartition(now.bound, width)
                lost = min(lost, now.bound[order[width:]].min())
                now = now.at(np.sort(order[:width]))
            trail.append((now.before.astype(np.int32), step.fate[now.by].astype(np.int8)))
            if not len(now.state):
                return None, lost, work
        cost = criteria(axis, now.bytes, now.time)[1]
        place = int(np.argmin(cost))
        lost = min(lost, float(cost[place]))
        saved = self.given.copy()
        for step, (before, fate) in zip(reversed(self.steps), reversed(trail), strict=True):
            saved[step.value] |= bool(fate[place] & SAVED)
            place = before[place]
        return self.problem.choice(saved & self.problem.read(saved)), lost, work


def criteria(axis: str, size: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what is limited and what is to be least."""
    return (size, time) if axis == "bytes" else (time, size)


def undominated_by_state(found: Partial) -> Partial:
    """Return the partial choices that no other one of their state beats in bytes or time."""
    if not len(found.state):
        return found
    order = np.lexsort((found.bytes, found.time, found.state))
    # states descend, so that the least bytes so far are those of the same state
    size = (found.bytes - found.state * (found.bytes.max() + 1))[order]
    least = np.minimum.accumulate(size)
    return found.at(order[np.append(0, 1 + np.flatnonzero(size[1:] < least[:-1]))])


def fates_of(problem: Problem, v: int, wanted: bool, again: bool) -> list[int]:
    """Return what may become of a value that the backward reads, or another; ``again`` if it may
    run twice."""
    able, forward = problem.save[v] < INF, problem.forward[v]
    fates = [EARLY, EARLY | SAVED, TWICE] if forward else [0, EARLY, EARLY | SAVED, LATE, TWICE]
    if not able:
        fates = [f for f in fates if not f & SAVED]
    if not again:
        fates = [f for f in fates if not f & LATE]
    return [f for f in fates if f & (SAVED | LATE)] if wanted else fates


def narrow_order(values: list[int], inputs: list[list[int]], forward: np.ndarray) -> Iterator[int]:
    """Yield the values in an order in which few of them wait to be read: that of the forward, and
    what only the backward needs right after its last input."""
    when: dict[int, int] = {}
    for v in values:
        when[v] = v if forward[v] else max([when[u] for u in inputs[v]], default=v)
    yield from sorted(values, key=lambda v: (when[v], v))


def costless(problem: Problem) -> np.ndarray:
    """Return the values saved at no cost: no bytes, and nothing more runs for them."""
    found = (problem.save < INF) & (problem.bytes == 0)
    for v, inputs in enumerate(problem.inputs):
        found[v] &= problem.forward[v] or found[inputs].all()
    return found


def without_given(problem: Problem, given: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """Return the inputs of each value and what the backward needs, without the values that are
    ``given``, and with the inputs of those that can only be redone, at no cost, in their place."""
    passing = (problem.save == INF) & (problem.time == 0)
    inputs: list[list[int]] = []

    def stand_in(read: Iterable[int]) -> list[int]:
        found = [(inputs[u] if passing[u] else [u]) for u in read if not given[u]]
        return sorted({u for us in found for u in us})

    for v, read in enumerate(problem.inputs):
        once = problem.forward[v] and problem.time[v] == INF  # its inputs do not matter
        inputs.append([] if once else stand_in(read))
    return inputs, stand_in(problem.needed)


def in_series(
    problem: Problem, inputs: list[list[int]], needed: list[int]
) -> tuple[list[int], list[list[int]], list[int], list[float]]:
    """Return the values on which a choice depends, the inputs, number of readers and time of each.

    A value whose one reader takes no more bytes, or that cannot be saved, is one with that reader,
    of the time of both: instead of the value its reader is saved."""
    forward, bytes_, times = (a.tolist() for a in (problem.forward, problem.bytes, problem.time))
    able, inputs = (problem.save < INF).tolist(), list(inputs)
    values = [v for v, yes in enumerate(ancestors(inputs, needed)) if yes]
    readers, wanted, gone = [0] * len(inputs), set(needed), set()
    for v in values:
        for u in inputs[v]:
            readers[u] += 1

    def joins(u: int, v: int) -> bool:
        if readers[u] > 1 or u in wanted or forward[u] is not forward[v]:
            return False
        # the forward can compute the reader wherever it computes the value
        alone = forward[v] or all([w == u or forward[w] for w in inputs[v]])
        return not able[u] or (able[v] and bytes_[v] <= bytes_[u] and alone)

    for v in values:
        while found := [u for u in inputs[v] if joins(u, v)]:
            u = found[0]
            for p in set(inputs[u]).intersection(inputs[v]):
                readers[p] -= 1
            inputs[v] = sorted({*inputs[u], *inputs[v]} - {u})
            times[v] += times[u]
            gone.add(u)
    return [v for v in values if v not in gone], inputs, readers, times

"""Order the steps of a reverse walk that may keep few of their states.

Source: Griewank and Walther, "Algorithm 799: revolve" (2000), who show that no other order
recomputes fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import TypeVar

State = TypeVar("State")


def backwards(
    steps: int,
    slots: int,
    start: State,
    advance: Callable[[State], State],
    visit: Callable[[State], None],
) -> None:
    """Call ``visit`` with the state before each of so many steps, the last step first. At most
    ``slots`` states are kept, ``start`` among them; ``advance`` recomputes the others."""
    kept = [(0, start)]
    for wanted in reversed(range(steps)):
        while kept[-1][0] > wanted:
            kept.pop()
        at, state = kept[-1]
        while at < wanted:
            free = slots - len(kept)
            goal = at + stride(wanted + 1 - at, free + 1) if free else wanted
            for _ in range(goal - at):
                state = advance(state)
            at = goal
            if free:
                kept.append((at, state))
        visit(state)


def stride(steps: int, slots: int) -> int:
    """Return after how many of these steps, at least two, to keep the next state: the steps before
    it need ``slots``, those after it one less, and none is computed more often than necessary."""
    times = 1
    while steps_for(slots, times) < steps:
        times += 1
    return max(1, steps_for(slots, times - 2), steps - steps_for(slots - 1, times))


def steps_for(slots: int, times: int) -> int:
    """Return how many steps these slots serve, if each runs at most ``times`` times before."""
    return comb(slots + times, slots) if times >= 0 else 0

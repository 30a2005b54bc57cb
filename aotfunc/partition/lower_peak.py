"""Lower the peak of the backward: what lives there without being read is computed once more,
right before it is read next.

One value after another: of the largest ones that live, idle, at the first place where most bytes
live, one that is cheap to run again is freed there, if that makes the peak lower or shorter."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache
from heapq import nsmallest

from .cost import Cost
from .roles import Joint
from .solve import INF

#: how many ops at most run again for one value
LONG = 8
#: how many values are looked at in one place, how many are tried, and how many are freed
TRIED, MANY, ROUNDS = 8, 2, 12
#: the place of what did not run
NEVER = -2


def with_lower_peak(
    joint: Joint, order: list[int], given: set[int], kept: set[int], cost: Cost, most: float
) -> list[int]:
    """Return an order of the late part whose peak is lower, with nodes that run once more.

    ``given`` are the values that are there, ``kept`` those that stay; what runs once more costs at
    most ``most`` together."""
    time = cache(lambda i: cost.time(joint.nodes[i]))
    live, found = list(joint.layout.live(order, given, kept)), order
    for _ in range(ROUNDS if live else 0):
        top = max(live)
        heights = top, live.count(top)
        ways = Ways(joint, order, given, kept).around(live.index(top))
        priced = sorted([(sum(map(time, again)), again, reader) for again, reader in ways])
        for spent, again, reader in priced[:MANY]:
            if spent > most:
                break
            longer = [*order[:reader], *again, *order[reader:]]
            then = list(joint.layout.live(longer, given, kept))
            if (max(then), then.count(max(then))) < heights:
                order, live, most = longer, then, most - spent
                break
        else:
            break
        if max(live) < top:
            found = order
    return found


class Ways:
    """How values of the late part that live somewhere might be freed there; ``reads`` and ``runs``
    say where in the order a memory is read and a node runs."""

    def __init__(
        self, joint: Joint, order: Sequence[int], given: set[int], kept: set[int]
    ) -> None:
        self.joint, self.order, self.given, self.kept = joint, order, given, kept
        self.reads: dict[int, list[int]] = {}
        self.runs: dict[int, list[int]] = {}
        for place, i in enumerate(order):
            self.runs.setdefault(i, []).append(place)
            for o in {joint.layout.owner[p] for p in joint.inputs[i]}:
                self.reads.setdefault(o, []).append(place)

    def around(self, place: int) -> Iterator[tuple[list[int], int]]:
        """Yield, for values that live at a place and are neither made nor read there, the nodes
        that compute one again, and its next reader's place, before which they run. The largest
        come first, of several those that are read last."""
        owner, size = self.joint.layout.owner, self.joint.layout.size
        idle = []
        for o, reads in self.reads.items():
            ends, reader = self.after(self.runs, o, place), self.after(self.reads, o, place)
            free = size[o] and o not in self.given and o not in self.kept
            if free and place < reader < ends and self.before(o, place) > NEVER:
                idle.append((-size[o], -reader, o, [k for k in reads if reader <= k < ends]))
        for _, _, o, readers in nsmallest(TRIED, idle):
            again: dict[int, bool] = {}
            seen = {p for k in readers for p in self.joint.inputs[self.order[k]] if owner[p] == o}
            if all([self.redo(i, o, readers[0], again) for i in sorted(seen)]):
                yield [i for i, able in again.items() if able], readers[0]

    def redo(self, i: int, freed: int, place: int, again: dict[int, bool]) -> bool:
        """Return whether a node's value can be there at a place where one memory is freed; list
        which nodes must run for it, each after its inputs, and which would have to and cannot."""
        joint = self.joint
        if i in again:
            return again[i]
        if joint.layout.owner[i] != freed and self.is_there(i, place):
            return True
        again[i] = False
        able = joint.nodes[i].op == "call_function" and joint.may_run_later[i]
        able = able and len(again) <= LONG
        if able and all([self.redo(p, freed, place, again) for p in joint.inputs[i]]):
            del again[i]  # after its inputs
            again[i] = True
        return again[i]

    def is_there(self, i: int, place: int) -> bool:
        """Return whether a node's value lives at a place."""
        o = self.joint.layout.owner[i]
        if not NEVER < self.before(o, place) <= self.before(i, place):
            return False
        stays = o in self.kept or o in self.given or self.joint.nodes[o].op == "get_attr"
        return stays or self.after(self.reads, o, place) < self.after(self.runs, o, place)

    def before(self, i: int, place: int) -> float:
        """Return where a node ran last before a place."""
        runs = self.runs.get(i, [])
        if found := bisect_left(runs, place):
            return runs[found - 1]
        return -1 if i in self.given else NEVER

    def after(self, places: dict[int, list[int]], i: int, place: int) -> float:
        """Return the first of the places of a memory or node that is not before one."""
        found = bisect_left(mine := places.get(i, []), place)
        return mine[found] if found < len(mine) else INF

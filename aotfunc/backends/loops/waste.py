"""Refuse kernels that would compute values again and again, or read memory in large steps."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

from torch.fx import Node

from .ir import Unfit
from .places import Place
from .reductions import REDUCTIONS
from .views import static_shape

if TYPE_CHECKING:
    from .builder import KernelBuilder


def often(work: KernelBuilder, n: Node, outer: set[int]) -> None:
    """Raise Unfit if a value would be computed again and again."""
    points = 0
    for place, _ in work.places[n]:
        axes = work.reached(place)
        if (axes or n.target in REDUCTIONS) and not axes >= outer:
            raise Unfit("a value that would be computed again and again")
        points += math.prod([work.extents[k] for k in axes])
    most = 5 if n in work.slow or n.target in REDUCTIONS else 16
    if points * 4 > most * math.prod(static_shape(n)):
        raise Unfit("a value that would be computed several times")


def check_one_way(work: KernelBuilder) -> None:
    """Raise Unfit if a value is walked in two ways, as sums over its rows and over its columns do:
    one of them would take large steps through memory."""
    ways: dict[Node, set[Place]] = {
        n: {place for place, _ in places} for n, places in work.places.items()
    }
    for a, place in zip(work.accesses, work.walked, strict=True):
        ways.setdefault(a.tensor, set()).add(place)
    for places in ways.values():
        orders = {tuple([k for index in place for k in index.axes]) for place in places}
        for one, other in combinations(orders, 2):
            if [k for k in one if k in other] != [k for k in other if k in one]:
                raise Unfit("a value read in two orders")

"""The best choice within a hard budget, as an integer program.

A choice on the frontier is the best for its own bytes; between two of them others may be better.
Binary variables say of each value whether it is saved, computed in the backward, and, unless the
forward needs it anyway, computed in the forward:

    saved_v + late_v  >= 1          for each v that the backward reads
    saved_u + late_u  >= late_v     for each input u of v
    early_u >= early_v >= saved_v   for each input u of v
    twice_v >= early_v + late_v - 1

What can be saved at no cost is at hand, and what can be redone at no cost but not saved, as views,
is at hand with its inputs: neither has variables.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..progress import timed
from .problem import Choice, Problem
from .roles import ancestors
from .solve import INF


@timed("integer program")
def best(
    problem: Problem, limit: float, axis: str = "bytes", gap: float = 5e-4, seconds: float = 10.0
) -> tuple[Choice | None, float]:
    """Return a choice within ``limit`` bytes that takes at most ``gap`` more time than it must, as
    a share, or the best one that is found in so many seconds, and a bound that no choice beats;
    for the axis "time" a choice of few bytes within that time."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import
    from scipy.sparse import csr_array

    given = (problem.save < INF) & (problem.bytes == 0)
    inputs, needed = contracted(problem, given)
    values = np.flatnonzero(ancestors(inputs, needed)).tolist()
    if not values:
        return problem.choice(given & problem.read(given)), 0.0
    count, at = len(values), {v: k for k, v in enumerate(values)}
    forward = problem.forward[values]
    saved, late = np.arange(count), count + np.arange(count)
    early = 2 * count + np.cumsum(~forward) - 1  # of those that only the backward needs
    total = 2 * count + 2 * np.count_nonzero(~forward)
    twice = np.where(forward, late, early + np.count_nonzero(~forward))
    rows: list[tuple[list[int], list[int], float]] = []  # columns, signs, at least

    for v in needed:
        rows.append(([saved[at[v]], late[at[v]]], [1, 1], 1))
    for k, v in enumerate(values):
        for u in [at[p] for p in inputs[v]]:
            rows.append(([saved[u], late[u], late[k]], [1, 1, -1], 0))
            if not forward[u] and not forward[k]:
                rows.append(([early[u], early[k]], [1, -1], 0))
        if not forward[k]:
            rows.append(([early[k], saved[k]], [1, -1], 0))
            rows.append(([twice[k], early[k], late[k]], [1, -1, -1], -1))
    lengths = [len(columns) for columns, _, _ in rows]
    places = (np.repeat(np.arange(len(rows)), lengths), np.concatenate([c for c, _, _ in rows]))
    signs = np.concatenate([s for _, s, _ in rows])
    matrix = csr_array((signs, places), shape=(len(rows), total))

    size, time = problem.bytes[values], problem.time[values]
    upper = np.ones(total)
    upper[saved[problem.save[values] == INF]] = 0
    upper[late[time == INF]] = 0
    columns = {"bytes": (saved, size), "time": (twice, np.where(time < INF, time, 0.0))}
    weights = {name: np.zeros(total) for name in columns}
    units = {name: max(cost.sum(), 1.0) / 1e4 for name, (_, cost) in columns.items()}
    for name, (column, cost) in columns.items():
        weights[name][column] = cost / units[name]
    other = "time" if axis == "bytes" else "bytes"
    found = milp(
        weights[other],
        integrality=np.ones(total),
        bounds=Bounds(np.zeros(total), upper),
        constraints=[
            LinearConstraint(matrix, [least for _, _, least in rows]),
            LinearConstraint(weights[axis][None, :], ub=limit / units[axis]),
        ],
        # HiGHS's presolve was seen to return bounds above what a choice takes
        options={"time_limit": seconds, "mip_rel_gap": gap, "presolve": False},
    )
    bound = max(0.0, (found.mip_dual_bound or 0.0) * units[other])
    if found.x is None:
        return None, bound
    held = given.copy()
    held[values] |= found.x[saved] > 0.5
    return problem.choice(held & problem.read(held)), bound


def contracted(problem: Problem, given: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """Return the inputs of each value and what the backward needs, without the values that are
    ``given``, and with the inputs of those that can only be redone, at no cost, in their place."""
    passing = (problem.save == INF) & (problem.time == 0)
    inputs: list[list[int]] = []

    def stand_in(read: Iterable[int]) -> list[int]:
        found = [(inputs[u] if passing[u] else [u]) for u in read if not given[u]]
        return sorted({u for us in found for u in us})

    for v, read in enumerate(problem.inputs):
        inputs.append(stand_in(read) if problem.time[v] < INF else [])
    return inputs, stand_in(problem.needed)

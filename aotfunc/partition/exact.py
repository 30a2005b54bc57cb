"""The best choice within a hard budget, as an integer program.

A choice on the frontier is the best for its own bytes; between two of them others may be better.
Binary variables say of each value whether it is saved, computed in the backward, and, unless the
forward needs it anyway, computed in the forward:

    saved_v + late_v  >= 1          for each v that the backward reads
    saved_u + late_u  >= late_v     for each input u of v
    early_u >= early_v >= saved_v   for each input u of v
    twice_v >= early_v + late_v - 1
"""

from __future__ import annotations

import time

import numpy as np

from ..progress import doing
from .problem import Choice, Problem
from .solve import INF


def best(
    problem: Problem, limit: float, axis: str = "bytes", seconds: float = 10.0
) -> tuple[Choice | None, float]:
    """Return the choice with the least time within ``limit`` bytes that is found in so many
    seconds, and a bound that no choice beats; for the axis "time" the choice with the fewest bytes
    within that time."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import
    from scipy.sparse import csr_array

    count = len(problem.nodes)
    saved, late, early, twice = (k * count + np.arange(count) for k in range(4))
    rows: list[tuple[list[int], list[int], float]] = []  # columns, signs, at least

    for k in problem.needed:
        rows.append(([saved[k], late[k]], [1, 1], 1))
    for v, inputs in enumerate(problem.inputs):
        rows.append(([early[v], saved[v]], [1, -1], 0))
        rows.append(([twice[v], early[v], late[v]], [1, -1, -1], -1))
        for u in inputs:
            rows.append(([saved[u], late[u], late[v]], [1, 1, -1], 0))
            rows.append(([early[u], early[v]], [1, -1], 0))
    lengths = [len(columns) for columns, _, _ in rows]
    places = (np.repeat(np.arange(len(rows)), lengths), np.concatenate([c for c, _, _ in rows]))
    signs = np.concatenate([s for _, s, _ in rows])
    matrix = csr_array((signs, places), shape=(len(rows), 4 * count))

    costs = {
        "bytes": problem.bytes,
        "time": np.where(problem.time < INF, problem.time, 0.0),
    }
    columns = {"bytes": saved, "time": twice}
    weights = {name: np.zeros(4 * count) for name in costs}
    units = {name: max(cost.sum(), 1.0) / 1e4 for name, cost in costs.items()}
    for name, cost in costs.items():
        weights[name][columns[name]] = cost / units[name]
    other = "time" if axis == "bytes" else "bytes"

    upper = np.ones(4 * count)
    upper[saved[problem.save == INF]] = 0
    upper[late[problem.time == INF]] = 0
    lower = np.zeros(4 * count)
    lower[early] = problem.forward
    begun = time.monotonic()
    spent = lambda: f"{time.monotonic() - begun:.0f} of at most {seconds:.0f} s"
    with doing(lambda: f"integer program of {4 * count:,} variables, {spent()}"):
        found = milp(
            weights[other],
            integrality=np.ones(4 * count),
            bounds=Bounds(lower, upper),
            constraints=[
                LinearConstraint(matrix, [least for _, _, least in rows]),
                LinearConstraint(weights[axis][None, :], ub=limit / units[axis]),
            ],
            options={"time_limit": seconds, "mip_rel_gap": 5e-4},
        )
    bound = max(0.0, (found.mip_dual_bound or 0.0) * units[other])
    if found.x is None:
        return None, bound
    return problem.choice(found.x[saved] > 0.5), bound

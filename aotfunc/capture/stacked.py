"""Choose which values of a loop's body are stacked for the backward and which it recomputes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph import Program, dependents
from ..partition.cost import Roofline, nbytes
from ..partition.ops import base, is_single, is_view
from ..partition.problem import Problem
from ..partition.roles import read_joint
from ..partition.split import split
from .bodies import drawn, subprogram

if TYPE_CHECKING:
    from .scan import Scan

#: the cost of keeping a value that is there anyway: its sizes alone are not worth holding
THERE = 8.0


def halved_body(
    scan: Scan, joint: Program, n_early: int, n_late: int
) -> tuple[Program, Program, list[int]]:
    """Cut the joint program of a loop's body in two as :func:`halve` does, where "bytes stacked +
    traffic of recomputation" is least among the values that the loop's policy lets be saved.

    Rows of stacks, and values common to every step, are kept anyway; the carry is not. A view is
    stacked without the rest of its memory."""
    inputs = joint.placeholders
    first, last = scan.n_consts, scan.n_consts + scan.n_carry
    carry, stacked = inputs[first:last], joint.outputs[scan.n_carry : n_early]
    varying = dependents(joint.graph, [*inputs[first:], *drawn(joint)])
    problem = Problem(read_joint(joint.graph, n_early), Roofline(), scan.policy)
    asked = {n for n, yes in zip(problem.nodes, problem.asked, strict=True) if yes}
    for k, n in enumerate(problem.nodes):
        if n in carry or (is_view(n) and is_single(n) and base(n) not in asked):
            problem.save[k] = nbytes(n.meta["val"])
        elif n in stacked or n not in varying:
            problem.save[k] = min(problem.save[k], THERE)
    saved = list(problem.reasons(problem.cheapest(1.0)))
    direct = [n for n in saved if n.op == "placeholder"]
    computed = [n for n in saved if n not in direct]
    early, late = split(problem.joint, [*computed, *direct])
    count = len(saved) + n_late
    whole = Program(early, len(inputs) - n_late, n_early + len(saved), (), "forward")
    outs = whole.outputs[: n_early + len(computed)]
    back = Program(late, count, joint.n_outputs - n_early, (), "backward")
    return (
        subprogram(whole, early.nodes, outs),
        subprogram(back, late.nodes, back.outputs),
        [inputs.index(n) for n in direct],
    )

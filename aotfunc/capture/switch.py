"""Branches as one node of a graph; transforms make choices between other programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..graph import Program, n_ops
from ..trace.emit import Builder, paused_gc
from ..trace.shapes.sig import Sig
from ..trace.views import laid_out
from ..transforms.activity import flat_inputs, has_derivative, live
from ..transforms.fresh import fresh
from ..transforms.jvp import jvp
from ..transforms.linearize import halve
from ..transforms.vjp import vjp
from ..transforms.vmap import vmap
from ..transforms.walk import builder, filled_node
from .bodies import Flow, as_planned, dense, differing, emit_flow, results_as, returning
from .one_by_one import one_by_one
from .series import SeriesLayout, body_series, emit_series, has_coefficients

aten = torch.ops.aten


class Switch(Flow):
    """The target of a node ``(index, operands) -> results``: those of ``bodies[index]``, each a
    program of all operands. ``index`` has no dimensions and is an integer or a bool; results are
    contiguous, with memory of their own."""

    __name__ = "switch"

    def __init__(self, bodies: Sequence[Program]) -> None:
        self.bodies = tuple([p.once(branch, functools.partial(branch, p)) for p in bodies])

    def __repr__(self) -> str:
        count = sum(n_ops(body.graph) for body in self.bodies)
        return (
            f"<switch of {len(self.bodies)} branches: {self.bodies[0].signature}, {count} nodes>"
        )

    @property
    def vals(self) -> tuple:
        return tuple(self.bodies[0].vals)

    def with_bodies(self, bodies: Sequence[Program]) -> Switch:
        return Switch(bodies)

    def reading(self, read: set[int]) -> tuple[Switch, list[int]]:
        kept = sorted(read)
        return self.with_bodies([returning(body, kept) for body in self.bodies]), kept

    def run(self, bodies: Sequence[Callable], tensors: Sequence[Tensor]) -> list[Tensor]:
        chosen = int(tensors[0])
        planned = [p.meta["val"] for p in self.bodies[chosen].placeholders]
        return bodies[chosen](*map(as_planned, tensors[1:], planned))

    def form(self, args: Sequence[Any]) -> tuple[list, dict[str, Any]]:
        return [args[0], list(args[1:])], {}

    # ----- as a node -----------------------------------------------------------------------------

    def live(self, n: Node, active: Any) -> list[bool]:
        """Return which results of ``n`` have a derivative if its ``active`` arguments do."""
        wrt = tuple(i for i, a in enumerate(n.args[1:]) if a in active)
        return [
            any(flags) for flags in zip(*[live(body, wrt) for body in self.bodies], strict=True)
        ]

    def flat(self, n: Node) -> list[Node]:
        """Return the arguments of ``n`` by which all branches are flat."""
        operands = n.args[1:]
        wrt = tuple(i for i, a in enumerate(operands) if has_derivative(a.meta["val"]))
        found = set().union(*[s for body in self.bodies for s in flat_inputs(body, wrt)])
        return [operands[i] for i in found]  # type: ignore[misc]

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        """Let each branch also return residuals, and add a choice between their backwards."""
        operands = n.args[1:]
        wrt = tuple(i for i, a in enumerate(operands) if a in active)
        have = tuple(j in g for j in range(len(self.vals)))
        half, used = self.bodies[0].once(
            ("pull", self.bodies, wrt, have), lambda: self.pulled_halves(wrt, have)
        )
        cts = [laid_out(b, g[j], v, exactly=True) for j, v in enumerate(self.vals) if j in g]
        return [operands[i] for i in used], half.late_results(b, again, cts) if used else []

    def pulled_halves(self, wrt: tuple, have: tuple) -> tuple[BranchHalves, list[int]]:
        """Return the branches with their backwards, and the operands of ``wrt`` on which a branch
        depends, whose cotangents these return."""
        joints = [vjp(p, wrt, have) for p in self.bodies]
        grads = [p.outputs[p.n_outputs - len(wrt) : p.n_outputs] for p in joints]
        used = [i for i, *gs in zip(wrt, *grads, strict=True) if any(g is not None for g in gs)]
        inputs = self.bodies[0].placeholders
        sigs = [dense(inputs[i].meta["val"]) if i in used else None for i in wrt]
        return cut_branches(self, joints, sum(have), sigs), used

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        """Let each branch also return residuals, and add a choice between their tangents."""
        operands = n.args[1:]
        wrt = tuple(i for i, a in enumerate(operands) if a in tangents)
        flags = self.live(n, tangents)
        wanted = [v if yes else None for v, yes in zip(self.vals, flags, strict=True)]
        half = self.bodies[0].once(
            ("push", self.bodies, wrt),
            lambda: cut_branches(
                self, [jvp(p, wrt, zeros=False) for p in self.bodies], len(wrt), wanted
            ),
        )
        ts = [
            laid_out(b, tangents[operands[i]], p.meta["val"])
            for i, p in zip(wrt, half.backs[0].placeholders[-len(wrt) :], strict=True)
        ]
        found = iter(half.late_results(b, new, ts))
        return [next(found) if yes else None for yes in flags]

    def series(self, b: Builder, n: Node, given: Sequence[Sequence], order: int) -> list[list]:
        """Let each branch also return coefficients."""
        wrt = tuple([i for i, yes in enumerate(has_coefficients(given[1:])) if yes])
        flags = map(any, zip(*[live(body, wrt) for body in self.bodies], strict=True))
        inputs = SeriesLayout((range(len(given) - 1),), wrt, order)
        moving = tuple([j for j, yes in enumerate(flags) if yes])
        results = SeriesLayout((range(len(self.vals)),), moving, order)
        target = Switch([body_series(body, inputs, results) for body in self.bodies])
        return emit_series(b, target, given[1:], inputs, results, [given[0][0]])

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        met = [walk.has(a) for a in n.args[1:]]
        args = [walk.env[a] for a in n.args[1:]]
        apart = walk.randomness == "different"
        if not walk.has(n.args[0]):
            each = [differing(body, met, apart) for body in self.bodies]
            flags = list(map(any, zip(*each, strict=True)))
            bodies = [batched_body(walk, body, met, args, flags) for body in self.bodies]
            return emit_flow(walk.b, Switch(bodies), [walk.env[n.args[0]], *args]), flags
        if walk.maps:
            return one_by_one(walk, n)
        everything = [True] * len(self.vals)
        bodies = [batched_body(walk, body, met, args, everything) for body in self.bodies]
        if not walk.size:
            return walk.b.inlined(bodies[0], args), everything
        return chosen_rows(walk.b, walk.env[n.args[0]], bodies, met, args), everything


def branch(body: Program) -> Program:
    """Return the body with contiguous results that have memory of their own."""
    return fresh(results_as(body, [dense(v) for v in body.vals]), ())


def batched_body(
    walk: Any, body: Program, met: Sequence[bool], args: Sequence[Node], flags: Sequence[bool]
) -> Program:
    """Return a body for a batch; these arguments and results have the batch dimension."""
    sigs = tuple([a.meta["val"] for a in args])
    dims, outs = ([0 if yes else None for yes in found] for found in (met, flags))
    key = ("vmap", tuple(met), tuple(flags), sigs, walk.axis)
    return body.derived(key, lambda: vmap(body, dims, sigs, walk.axis, outs))


def chosen_rows(
    b: Builder, index: Node, bodies: Sequence[Program], met: Sequence[bool], args: Sequence[Node]
) -> list[Node]:
    """Return the results of a choice that each sample of a batch makes for itself. A branch runs
    if a sample takes it. The other samples pass it as copies of one that does, without a
    derivative, so that no NaN comes of them."""
    results: list[Node] = []
    for k, body in enumerate(bodies):
        mask = b.call(aten.eq.Scalar, index, k)
        of_mask = functools.partial(on_rows, body, mask, met)
        guarded = body.once(("rows", tuple(met)), of_mask)
        found = emit_flow(b, Switch(guarded), [b.call(aten.any.default, mask), mask, *args])
        if not k:
            results = found
            continue
        for j, (new, old) in enumerate(zip(found, results, strict=True)):
            results[j] = b.call(aten.where.self, spread_along(b, mask, new), new, old)
    return results


def on_rows(body: Program, mask: Node, met: Sequence[bool]) -> tuple[Program, Program]:
    """Return ``(mask, operands) -> results`` for no samples, and for those of the mask."""
    with paused_gc():
        programs = []
        for run in (False, True):
            b = builder()
            taken = b.placeholder("mask", mask.meta["val"])
            args = b.inputs(body.placeholders)
            if run:
                number = b.call(aten._to_copy.default, taken, dtype=torch.int64)
                row = b.call(aten.view.default, b.call(aten.argmax.default, number), [1])
                given = [
                    own_or_copied(b, taken, x, row) if yes else x
                    for x, yes in zip(args, met, strict=True)
                ]
                outs = b.inlined(body, given)
            else:
                outs = [filled_node(b, 0, v) for v in body.vals]
            name = body.name if run else "skipped"
            programs.append(Program(b.finish(outs), len(args) + 1, len(outs), (), name))
        return programs[0], programs[1]


def own_or_copied(b: Builder, mask: Node, x: Node, row: Node) -> Node:
    """Return the rows of ``x`` in the mask, with copies of one of them for the others."""
    copy = b.call(aten.detach.default, b.call(aten.index_select.default, x, 0, row))
    return b.call(aten.where.self, spread_along(b, mask, x), x, copy)


def spread_along(b: Builder, mask: Node, x: Node) -> Node:
    """Return a mask of rows in a shape that broadcasts with ``x``."""
    rank = x.meta["val"].ndim
    return b.call(aten.view.default, mask, [-1, *[1] * (rank - 1)]) if rank > 1 else mask


# ----- halves ------------------------------------------------------------------------------------


class BranchHalves(NamedTuple):
    """Branches that also return residuals, and their linear halves: programs of the operands
    ``read``, the residuals and the late inputs."""

    forwards: list[Program]
    backs: list[Program]
    read: list[int]
    n_slots: int

    def late_results(self, b: Builder, n: Node, late: Sequence[Node]) -> list[Node]:
        """Let ``n`` also return the residuals; return the results of a choice of ``backs``."""
        count = len(self.forwards[0].vals) - self.n_slots
        n.target = Switch(self.forwards)
        n.meta["val"] = n.target.vals
        slots = [b.item(n, count + i) for i in range(self.n_slots)]
        index, *operands = n.args
        args = [index, *[operands[i] for i in self.read], *slots, *late]
        return emit_flow(b, Switch(self.backs), args)


def cut_branches(
    switch: Switch, joints: Sequence[Program], n_late: int, wanted: Sequence[Sig | None]
) -> BranchHalves:
    """Cut the branches' joint programs in two. They share places of residuals, zeros if unneeded.
    ``wanted``: the late results' signatures, None for those left out."""
    count = len(switch.vals)
    parts = [halve(joint, count, n_late) for joint in joints]
    read = sorted({i for _, _, direct in parts for i in direct})
    slots: list[Sig] = []
    places = []
    for early, _, _ in parts:
        free = list(range(len(slots)))
        mine = []
        for v in early.vals[count:]:
            sig = dense(v)
            place = next((i for i in free if slots[i] is sig), None)
            if place is None:
                place = len(slots)
                slots.append(sig)
            else:
                free.remove(place)
            mine.append(place)
        places.append(mine)
    forwards, backs = [], []
    operands = switch.bodies[0].placeholders
    with paused_gc():
        for (early, late, direct), mine in zip(parts, places, strict=True):
            b = builder()
            inputs = b.inputs(early.placeholders)
            outs = b.inlined(early, inputs)
            kept = dict(zip(mine, outs[count:], strict=True))
            outs[count:] = [
                laid_out(b, kept[i], sig, exactly=True) if i in kept else filled_node(b, 0, sig)
                for i, sig in enumerate(slots)
            ]
            forwards.append(Program(b.finish(outs), len(inputs), len(outs), (), "forward"))
            b = builder()
            given = {i: b.placeholder("x", operands[i].meta["val"]) for i in read}
            saved = [b.placeholder("residual", sig) for sig in slots]
            rest = late.placeholders[len(late.placeholders) - n_late :]
            lates = [b.placeholder("late", p.meta["val"]) for p in rest]
            found = b.inlined(
                late, [*[saved[i] for i in mine], *[given[i] for i in direct], *lates]
            )
            results = [
                filled_node(b, 0, sig) if x is None else x
                for x, sig in zip(found[len(found) - len(wanted) :], wanted, strict=True)
                if sig is not None
            ]
            total = len(given) + len(saved) + len(lates)
            backs.append(Program(b.finish(results), total, len(results), (), "backward"))
    return BranchHalves(forwards, backs, read, len(slots))

"""Cut the derivative of a loop's body in two: the residuals that the loop computes, and the body
of the loop that is linear in tangents or cotangents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import Node

from ..graph import Program, dependents
from ..trace.emit import Builder, paused_gc
from ..trace.views import laid_out
from ..transforms.linearize import halve
from ..transforms.walk import builder, filled_node
from .bodies import dense, drawn, subprogram

if TYPE_CHECKING:
    from .scan import Scan

aten = torch.ops.aten


class Saved(NamedTuple):
    """A loop's residuals as arguments of another: constants if steps share them, or stacks."""

    consts: list[Node]
    rows: list[Node]


class Half:
    """A body's joint program in two: results and residuals, and what its last ``n_late`` inputs
    lead to. Residuals of constants alone are computed once, outside of the loop."""

    def __init__(
        self, scan: Scan, joint: Program, n_late: int, cuts: Callable[..., tuple] = halve
    ) -> None:
        count, last = scan.body.n_outputs, scan.n_consts + scan.n_carry
        early, self.late, direct = cuts(joint, count, n_late)
        inputs = early.placeholders
        varying = dependents(early.graph, [*inputs[scan.n_consts :], *drawn(early)])
        results, computed = list(early.outputs[:count]), list(early.outputs[count:])
        fixed = [r for r in computed if r not in varying and r.op != "placeholder"]
        self.fixed = subprogram(early, [n for n in early.graph.nodes if n not in varying], fixed)
        #: for each residual (kind, number within the kind)
        self.sources: list[tuple[str, int]] = []
        stacked: list[Node] = []
        for r in [*computed, *[inputs[i] for i in direct]]:
            i = inputs.index(r) if r in inputs else None
            if i is not None and not scan.n_consts <= i < last:
                self.sources.append(("argument", i))
            elif r in fixed:
                self.sources.append(("fixed", fixed.index(r)))
            elif r in results[scan.n_carry :]:
                self.sources.append(("stack", results.index(r, scan.n_carry)))
            else:
                self.sources.append(("stack", count + len(stacked)))
                stacked.append(r)
        #: for each residual whether every step has the same
        self.same = [
            k == "fixed" or (k == "argument" and i < scan.n_consts) for k, i in self.sources
        ]
        self.forward = subprogram(early, early.graph.nodes, [*results, *stacked])
        self.made: dict[Any, Any] = {}

    @property
    def weight(self) -> int:
        """Return its number of nodes, as a measure of memory."""
        return self.fixed.weight + self.forward.weight + self.late.weight

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def saved(self, b: Builder, n: Node, scan: Scan) -> Saved:
        """Make the node ``n`` a loop that also stacks the residuals, and return these."""
        n.target = scan.with_bodies([self.forward])
        n.meta["val"] = n.target.vals
        fixed = b.inlined(self.fixed, list(n.args))
        found = Saved([], [])
        for (kind, i), same in zip(self.sources, self.same, strict=True):
            part = {"argument": n.args, "fixed": fixed}.get(kind)
            node = b.item(n, i) if part is None else part[i]
            (found.consts if same else found.rows).append(node)
        return found

    def inputs(self, b: Builder) -> Callable[[], list[Node]]:
        """Add placeholders for the residuals to a body: now for those that are the same in every
        step; for the others, which are contiguous rows of stacks, when the returned function is
        called. This returns all in the order of ``late``."""
        sigs = [p.meta["val"] for p in self.late.placeholders[: len(self.sources)]]
        fixed = {
            i: b.placeholder("residual", sig)
            for i, (sig, same) in enumerate(zip(sigs, self.same, strict=True))
            if same
        }

        def rest() -> list[Node]:
            return [
                fixed[i] if same else b.placeholder("residual", dense(sigs[i]))
                for i, same in enumerate(self.same)
            ]

        return rest


def backward_body(
    scan: Scan, half: Half, wrt: tuple[int, ...], have: Sequence[bool]
) -> tuple[Program, list[int], list[int]]:
    """Return ``(residuals, cotangents of constants and carry, residuals, cotangents of rows) ->
    cotangents``, and of which constants and which rows these are."""
    with paused_gc():
        b = builder()
        consts, carries, rows = scan.parts(wrt)
        due = half.late.outputs[len(half.late.outputs) - len(wrt) :]
        consts = [i for i in consts if due[wrt.index(i)] is not None]
        sigs = [p.meta["val"] for p in scan.body.placeholders]
        rest = half.inputs(b)
        sums = [b.placeholder("sum", dense(sigs[i])) for i in consts]
        carry = {i: b.placeholder("ct", sigs[i]) for i in carries}
        residuals = rest()
        cts: list[Node] = []
        for j, v in enumerate(scan.body.vals):
            if have[j]:
                of_carry = j < scan.n_carry
                cts.append(carry[scan.n_consts + j] if of_carry else b.placeholder("ct", dense(v)))
        grads = b.inlined(half.late, [*residuals, *cts])
        of = dict(zip(wrt, grads[len(grads) - len(wrt) :], strict=True))
        outs = [b.call(aten.add.Tensor, s, of[i]) for i, s in zip(consts, sums, strict=True)]
        outs += [filled_node(b, 0, sigs[i]) if of[i] is None else of[i] for i in carries]
        stacked = [i for i in rows if of[i] is not None]
        outs += [of[i] for i in stacked]
        inputs = sum(n.op == "placeholder" for n in b.graph.nodes)
        return Program(b.finish(outs), inputs, len(outs), (), "backward"), consts, stacked


def linear_body(scan: Scan, half: Half, wrt: tuple[int, ...]) -> tuple[Program, list[int]]:
    """Return ``(residuals, tangents of constants and carry, residuals, tangents of rows) ->
    (tangents of the carry, of rows)``, and of which results the last are."""
    with paused_gc():
        b = builder()
        consts, carries, rows = scan.parts(wrt)
        sigs = [p.meta["val"] for p in scan.body.placeholders]
        late = dict(zip(wrt, half.late.placeholders[len(half.sources) :], strict=True))
        rest = half.inputs(b)
        ts = {i: b.placeholder("tangent", dense(sigs[i])) for i in consts}
        ts |= {i: b.placeholder("tangent", sigs[i]) for i in carries}
        residuals = rest()
        ts |= {i: b.placeholder("tangent", dense(sigs[i])) for i in rows}
        given = [laid_out(b, ts[i], late[i].meta["val"]) for i in wrt]
        pushed = b.inlined(half.late, [*residuals, *given])
        of_carry = [pushed[i - scan.n_consts] for i in carries]
        outs = [
            filled_node(b, 0, sigs[i]) if t is None else t
            for i, t in zip(carries, of_carry, strict=True)
        ]
        stacked = [j for j in range(scan.n_carry, len(pushed)) if pushed[j] is not None]
        outs += [pushed[j] for j in stacked]
        inputs = sum(n.op == "placeholder" for n in b.graph.nodes)
        return Program(b.finish(outs), inputs, len(outs), (), "linear"), stacked

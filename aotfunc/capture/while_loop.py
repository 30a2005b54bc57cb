"""A loop that runs while a predicate holds, as one node of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..debug import at
from ..errors import RuleError
from ..graph import Program, size
from ..trace.emit import Builder, paused_gc
from ..trace.shapes.sig import make_sig
from ..trace.views import laid_out
from ..transforms.activity import flat_inputs, has_derivative
from ..transforms.jvp import jvp
from ..transforms.vmap import vmap
from ..transforms.walk import builder, filled_node
from .bodies import Flow, as_planned, dense, differing, drawn, emit_flow, results_as
from .one_by_one import one_by_one
from .scan import Scan, own_memory
from .series import Groups, body_series, emit_series, moved
from .switch import Switch
from .unwind import emit_unwind

aten = torch.ops.aten


class While(Flow):
    """The target of a node ``(constants, carry) -> carry``: the ``body`` is called while the
    ``condition`` holds, at most ``max_steps`` times.

    Both are programs of all arguments; carried values are contiguous. With ``slots`` the first
    carried value counts the steps, and the backward keeps so many carries."""

    __name__ = "while_loop"

    def __init__(
        self,
        condition: Program,
        body: Program,
        n_consts: int,
        max_steps: int | None,
        slots: int | None = None,
    ) -> None:
        self.n_consts, self.max_steps, self.slots = n_consts, max_steps, slots
        carry = [p.meta["val"] for p in body.placeholders[n_consts:]]
        body = body.once(("carried", n_consts, len(carry)), lambda: results_as(body, carry))
        self.condition, self.body = self.bodies = condition, body
        self.n_carry, self.length, self.reverse = len(carry), max_steps, False

    def __repr__(self) -> str:
        most = "" if self.max_steps is None else f" of at most {self.max_steps} steps"
        return f"<while_loop{most}: {self.body.signature}, {size(self.body.graph)} nodes>"

    @property
    def vals(self) -> tuple:
        return tuple(self.body.vals)

    def with_bodies(self, bodies: Sequence[Program]) -> While:
        condition, body = bodies
        return self.of(condition, body, self.n_consts)

    def of(self, condition: Program, body: Program, n_consts: int) -> While:
        """Return a loop of other bodies with the same bound."""
        return While(condition, body, n_consts, self.max_steps, self.slots)

    def reading(self, read: set[int]) -> tuple[While, list[int]]:
        return self, list(range(len(self.vals)))

    def run(self, bodies: Sequence[Callable], tensors: Sequence[Tensor]) -> list[Tensor]:
        condition, body = bodies
        n, count = self.n_consts, 0
        planned = [p.meta["val"] for p in self.body.placeholders]
        start = [as_planned(t, sig) for t, sig in zip(tensors, planned, strict=True)]
        consts, carry = start[:n], start[n:]
        while count != self.max_steps and condition(*consts, *carry)[0]:
            carry = body(*consts, *carry)
            count += 1
        return own_memory(self.body, carry) if count else [x.clone() for x in carry]

    def form(self, args: Sequence[Any]) -> tuple[list, dict[str, Any]]:
        n = self.n_consts
        options = {"max_steps": self.max_steps} | ({"slots": self.slots} if self.slots else {})
        return [list(args[:n]), list(args[n:])], options

    # ----- as a node -----------------------------------------------------------------------------

    def live(self, n: Node, active: Any) -> list[bool]:
        """Return which results of ``n`` have a derivative if its ``active`` arguments do."""
        wrt = self.derivative([a in active for a in n.args])
        return [self.n_consts + k in wrt for k in range(len(self.vals))]

    def flat(self, n: Node) -> list[Node]:
        """Return the arguments of the node ``n`` by which the loop is flat."""
        vals = [a.meta["val"] for a in n.args]  # type: ignore[union-attr]
        wrt = tuple(i for i, val in enumerate(vals) if has_derivative(val))
        return [n.args[i] for i in set().union(*flat_inputs(self.body, wrt))]  # type: ignore

    def derivative(self, given: Sequence[bool]) -> tuple[int, ...]:
        """Return the inputs of the body with a derivative in some step if the ``given`` arguments
        have one."""
        return Scan(self.body, self.n_consts, len(self.vals), 1).derivative(given)[0]

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        """Make the loop one of ``max_steps`` steps, in which surplus steps do nothing. With
        ``slots`` leave it, and add a node that goes back from step to step."""
        if self.slots:
            if drawn(self.body):
                raise RuleError(
                    "reverse mode through while_loop(checkpoint='revolve') that draws random "
                    f"numbers{at(n.meta.get('line'))}: steps that are computed again would draw "
                    "others; draw them before the loop, and let it read them"
                )
            given = [i for i, a in enumerate(n.args) if a in active]
            cts = {self.n_consts + j: ct for j, ct in g.items()}
            found = emit_unwind(b, self, given, b.item(again, 0), again.args, cts)
            return [n.args[i] for i in found], list(found.values())
        if self.max_steps is None:
            raise RuleError(
                "reverse mode through a while_loop whose number of steps is not known"
                f"{at(n.meta.get('line'))}: say while_loop(..., max_steps=…), which bounds what "
                "is kept for the backward, or checkpoint='revolve', which does so by slots=…"
            )
        loop = again.target = Scan(self.guarded(), self.n_consts, len(self.vals), self.max_steps)
        return loop.pull(b, n, g, active, again)

    def guarded(self) -> Program:
        """Return ``(constants, carry) -> carry``: a step if the condition holds, else the same
        carry."""

        def make() -> Program:
            with paused_gc():
                b = builder()
                args = b.inputs(self.body.placeholders)
                [holds] = b.inlined(self.condition, args)
                skip = Builder()
                kept = skip.inputs(self.body.placeholders)[self.n_consts :]
                none = Program(skip.finish(kept), len(args), len(kept), (), "skipped")
                outs = emit_flow(b, Switch([none, self.body]), [holds, *args])
                return Program(b.finish(outs), len(args), len(outs), (), "guarded")

        return self.body.derived(("guarded", self.condition), make)

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        """Add a loop beside this one that carries the tangents with the values."""
        ts = {i: tangents[a] for i, a in enumerate(n.args) if a in tangents}
        loop, args, wrt = self.dual(b, new.args, ts)  # type: ignore[arg-type]
        k, count = self.n_consts, len(self.vals)
        outs = emit_flow(b, loop, args)
        found = dict(zip([i for i in wrt if i >= k], outs[count:], strict=True))
        return [found.get(k + j) for j in range(count)]

    def dual(
        self, b: Builder, args: Sequence[Node], ts: Mapping[int, Node]
    ) -> tuple[While, list[Node], tuple[int, ...]]:
        """Return the loop that carries tangents with the values, its arguments for the tangents
        ``ts`` by number of argument, and the arguments that have one in some step."""
        wrt = self.derivative([i in ts for i in range(len(args))])
        k, count = self.n_consts, len(self.vals)
        consts, carries = [i for i in wrt if i < k], [i for i in wrt if i >= k]
        condition, body = self.body.derived(
            ("pushed", self.condition, wrt), lambda: self.pushed(wrt)
        )
        sigs = [p.meta["val"] for p in body.placeholders]

        def tangent(i: int, place: int) -> Node:
            sig = sigs[place]
            return laid_out(b, ts[i], sig, exactly=True) if i in ts else filled_node(b, 0, sig)

        us = [tangent(i, k + j) for j, i in enumerate(consts)]
        vs = [tangent(i, k + len(consts) + count + j) for j, i in enumerate(carries)]
        loop = self.of(condition, body, k + len(consts))
        return loop, [*args[:k], *us, *args[k:], *vs], wrt

    def series(self, b: Builder, n: Node, given: Sequence[Sequence], order: int) -> list[list]:
        """Let the loop also carry coefficients."""
        one = Scan(self.body, self.n_consts, len(self.vals), 1)
        inputs, results = one.groups(moved(given), order)
        body = body_series(self.body, inputs, results)
        loop = self.of(without_coefficients(self.condition, body, inputs), body, inputs.count(0))
        return emit_series(b, loop, given, inputs, results)

    def pushed(self, wrt: tuple[int, ...]) -> tuple[Program, Program]:
        """Return the condition and the body with tangents of these inputs beside the values."""
        k, count = self.n_consts, len(self.vals)
        values = self.body.placeholders
        carries = [i for i in wrt if i >= k]

        def made(program: Program, with_tangents: bool) -> Program:
            b = builder()

            def tangents(chosen: list[int]) -> dict[int, Node]:
                sigs = {i: dense(values[i].meta["val"]) for i in chosen}
                return {i: b.placeholder("tangent", sig) for i, sig in sigs.items()}

            consts, of = b.inputs(values[:k]), tangents([i for i in wrt if i < k])
            carry, more = b.inputs(values[k:]), tangents(carries)
            inputs, of = len(values) + len(wrt), of | more
            if not with_tangents:
                outs = b.inlined(program, [*consts, *carry])
                return Program(b.finish(outs), inputs, len(outs), (), program.name)
            given = program.placeholders[len(values) :]
            ts = [laid_out(b, of[i], p.meta["val"]) for i, p in zip(wrt, given, strict=True)]
            outs = b.inlined(program, [*consts, *carry, *ts])
            outs[count:] = [
                filled_node(b, 0, values[i].meta["val"]) if t is None else t
                for i, t in [(i, outs[count + i - k]) for i in carries]
            ]
            return Program(b.finish(outs), inputs, len(outs), (), program.name)

        with paused_gc():
            joint = jvp(self.body, wrt, zeros=False)
            return made(self.condition, False), made(joint, True)

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        """Batch the steps. If the condition differs between samples, the loop runs while it holds
        for any, and each sample stops at its own step."""
        if walk.maps and self.met(walk, [walk.has(a) for a in n.args])[1]:
            return one_by_one(walk, n)
        loop, args, flags = self.batched(walk, n.args, [walk.has(a) for a in n.args])
        return emit_flow(walk.b, loop, args), flags

    def batched(
        self, walk: Any, given: Sequence[Any], met: Sequence[bool]
    ) -> tuple[While, list[Node], list[bool]]:
        """Return the loop of a batch, in which at least the arguments ``met`` differ between
        samples; its arguments, from the ``given`` ones; and which results differ."""
        b, k, body = walk.b, self.n_consts, self.body
        met, several = self.met(walk, met)
        if several:
            body = self.guarded()
            met = [*met[:k], *[True] * len(self.vals)]
        args = []
        for i, a in enumerate(given):
            new = walk.expanded(a) if met[i] else walk.env[a]
            if i >= k or met[i] != walk.has(a):
                new = laid_out(b, new, dense(new.meta["val"]), exactly=True)
            args.append(new)
        dims = [0 if yes else None for yes in met]
        sigs = tuple([a.meta["val"] for a in args])
        key = ("vmap", tuple(met), sigs, walk.axis, several)

        def make(program: Program, outs: Sequence[int | None]) -> Program:
            return program.derived(key, lambda: vmap(program, dims, sigs, walk.axis, outs))

        condition = make(self.condition, [0 if several else None])
        if several:
            condition = condition.once("any", lambda: of_any(condition))
        return self.of(condition, make(body, dims[k:]), k), args, met[k:]

    def met(self, walk: Any, given: Sequence[bool]) -> tuple[list[bool], bool]:
        """Return which inputs differ between samples in some step if the ``given`` ones do, and
        whether the condition does."""
        apart = walk.randomness == "different"
        met = Scan(self.body, self.n_consts, len(self.vals), 1).met(given, apart)[0]
        [several] = differing(self.condition, met, apart)
        return met, several


def counted(loop: While, slots: int) -> While:
    """Return the loop with ``slots``, whose first carried value is the number of steps."""
    k, [holds] = loop.n_consts, loop.condition.vals
    sig = make_sig((), (), torch.int64, holds.device)

    def beside(program: Program, more: int | None) -> Program:
        with paused_gc():
            b, inputs = builder(), program.placeholders
            consts, count = b.inputs(inputs[:k]), b.placeholder("count", sig)
            outs = b.inlined(program, [*consts, *b.inputs(inputs[k:])])
            outs = outs if more is None else [b.call(aten.add.Tensor, count, more), *outs]
            return Program(b.finish(outs), len(inputs) + 1, len(outs), (), program.name)

    return While(beside(loop.condition, None), beside(loop.body, 1), k, loop.max_steps, slots)


def of_any(condition: Program) -> Program:
    """Return a condition that holds if ``condition`` does for any sample of a batch."""
    with paused_gc():
        b = builder()
        [holds] = b.inlined(condition, b.inputs(condition.placeholders))
        graph = b.finish([b.call(aten.any.default, holds)])
        return Program(graph, condition.n_inputs, 1, (), "condition")


def without_coefficients(condition: Program, body: Program, inputs: Groups) -> Program:
    """Return the condition as a program of the inputs of a ``body`` that carries coefficients."""
    with paused_gc():
        b = builder()
        rows = inputs.parted(b.inputs(body.placeholders))
        outs = b.inlined(condition, [row[0] for row in rows])
        return Program(b.finish(outs), body.n_inputs, 1, (), condition.name)


def as_condition(program: Program) -> Program:
    """Return the program with its one result as a 0-dim bool."""

    def make() -> Program:
        with paused_gc():
            b = builder()
            [holds] = b.inlined(program, b.inputs(program.placeholders))
            holds = b.reshape(holds, [])
            if holds.meta["val"].dtype is not torch.bool:
                holds = b.call(aten.ne.Scalar, holds, 0)
            return Program(b.finish([holds]), program.n_inputs, 1, (), "condition")

    return program.once(as_condition, make)

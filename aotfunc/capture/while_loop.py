"""A loop that runs while a predicate holds, as one node of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..debug import at
from ..errors import RuleError
from ..graph import Program, n_ops
from ..trace.emit import Builder, paused_gc
from ..trace.shapes.sig import make_sig
from ..trace.views import laid_out
from ..transforms.activity import flat_arguments
from ..transforms.vmap import vmap
from ..transforms.walk import builder
from .bodies import as_planned, dense, differing, emit_flow, own_memory, results_as
from .one_by_one import one_by_one
from .scan import Scan
from .series import Loop, SeriesLayout
from .switch import Switch
from .unwind import pull_unwinding

aten = torch.ops.aten


class While(Loop):
    """The target of a node ``(constants, carry) -> carry``: the ``body`` is called while the
    ``condition`` holds, at most ``max_steps`` times.

    Both are programs of all arguments; carried values are contiguous. With ``slots`` the first
    carried value counts the steps, and the backward keeps so many carries."""

    __name__ = "while_loop"
    one_by_one = staticmethod(one_by_one)

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
        return f"<while_loop{most}: {self.body.signature}, {n_ops(self.body.graph)} nodes>"

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
        wrt, _ = self.derivative([a in active for a in n.args])
        return [self.n_consts + k in wrt for k in range(len(self.vals))]

    def flat(self, n: Node) -> list[Node]:
        """Return the arguments of the node ``n`` by which the loop is flat."""
        return flat_arguments(n, self.body)

    def derivative(self, given: Sequence[bool]) -> tuple[tuple[int, ...], list[bool]]:
        """Return ``(inputs, results)`` with a derivative in some step, from the ``given``."""
        return self.once().derivative(given)

    def once(self) -> Scan:
        """Return one step as a loop."""
        return Scan(self.body, self.n_consts, self.n_carry, 1)

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        """Make the loop one of ``max_steps`` steps, in which surplus steps do nothing. With
        ``slots`` leave it, and add a node that goes back from step to step."""
        if self.slots:
            return pull_unwinding(b, n, g, active, again, b.item(again, 0))
        if self.max_steps is None:
            raise RuleError(
                "reverse mode through a while_loop whose number of steps is not known"
                f"{at(n.meta.get('line'))}: say while_loop(..., max_steps=…), which bounds what "
                "is kept for the backward, or checkpoint='revolve', which does so by slots=…"
            )
        loop = again.target = Scan(self.guarded(), self.n_consts, len(self.vals), self.max_steps)
        return loop.pull(b, n, g, active, again)

    def guarded(self) -> Program:
        """Return ``(constants, carry) -> carry``: a step if the condition holds, else none."""

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

    def coefficients(
        self, given: Sequence[bool], order: int, made: Callable
    ) -> tuple[While, SeriesLayout, SeriesLayout]:
        """Return the loop whose body carries coefficients, as ``made`` makes it, if the ``given``
        arguments have some; and where they are among its inputs and its results."""
        inputs, results = self.once().groups(given, order)
        body = made(self.body, inputs, results)
        condition = without_coefficients(self.condition, body, inputs)
        return self.of(condition, body, inputs.count(0)), inputs, results

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        """Batch the steps. If the condition differs between samples, the loop runs while it holds
        for any, and each sample stops at its own step."""
        if walk.maps and self.met(walk, [walk.has(a) for a in n.args])[1]:
            return self.one_by_one(walk, n)
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
        met = self.once().met(given, apart)[0]
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


def without_coefficients(condition: Program, body: Program, inputs: SeriesLayout) -> Program:
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

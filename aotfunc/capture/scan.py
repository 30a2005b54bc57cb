"""A loop as one node of a graph: its body is a program, and each transform makes another loop of
another body. So a graph does not grow with the number of steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph import Program, n_ops
from ..partition.policies import Policy
from ..trace.emit import Builder
from ..trace.shapes.sig import Sig, make_sig
from ..trace.views import laid_out
from ..transforms.activity import flat_arguments, live
from ..transforms.jvp import jvp
from ..transforms.linearize import halve
from ..transforms.vjp import vjp
from ..transforms.vmap import inserted, vmap, with_dim_moved
from ..transforms.walk import filled_node
from .bodies import (
    as_planned,
    dense,
    differing,
    emit_flow,
    own_memory,
    results_as,
    returning,
    row_sig,
)
from .scan_halves import Half, backward_body, linear_body
from .series import Loop, SeriesLayout
from .stacked import halved_body
from .unwind import pull_unwinding

#: number of rows kept as separate tensors before they join their stack
ROWS = 256


class Scan(Loop):
    """The target of a node ``(constants, carry, stacks) -> (carry, stacks)``.

    ``body`` maps ``(constants, carry, one row of each stack)`` to ``(carry, one row of each
    result)`` and is called ``length`` times, at least once; with ``reverse`` from the last row to
    the first. A stack has its rows along dimension 0; carries and stacks are contiguous. With a
    ``policy`` a partition chooses, among the values that it lets be saved, those that reverse mode
    stacks; with ``slots`` it stacks none, keeps so many carries, and runs steps again."""

    __name__ = "scan"

    def __init__(
        self,
        body: Program,
        n_consts: int,
        n_carry: int,
        length: int,
        reverse: bool = False,
        policy: Policy | None = None,
        slots: int | None = None,
    ) -> None:
        carry = [p.meta["val"] for p in body.placeholders[n_consts : n_consts + n_carry]]
        self.body = body.once(("carried", n_consts, n_carry), lambda: results_as(body, carry))
        self.bodies = (self.body,)
        self.n_consts, self.n_carry, self.length, self.reverse = n_consts, n_carry, length, reverse
        self.policy, self.slots = policy, slots

    def __repr__(self) -> str:
        way = ", in reverse" if self.reverse else ""
        return (
            f"<scan of {self.length} steps{way}: {self.body.signature}, "
            f"{n_ops(self.body.graph)} nodes>"
        )

    @property
    def vals(self) -> tuple:
        """Return the signatures of its results."""
        vals = self.body.vals
        rows = [inserted(v, 0, self.length) for v in vals[self.n_carry :]]
        return (*vals[: self.n_carry], *rows)

    def with_bodies(self, bodies: Sequence[Program]) -> Scan:
        [body] = bodies
        return self.of(body, self.n_consts, self.n_carry)

    def of(self, body: Program, n_consts: int, n_carry: int) -> Scan:
        """Return a loop of another body with the same steps."""
        return Scan(body, n_consts, n_carry, self.length, self.reverse, self.policy, self.slots)

    def reading(self, read: set[int]) -> tuple[Scan, list[int]]:
        kept = [i for i in range(self.body.n_outputs) if i < self.n_carry or i in read]
        return self.with_bodies([returning(self.body, kept)]), kept

    def run(self, bodies: Sequence[Callable], tensors: Sequence[Tensor]) -> list[Tensor]:
        [body] = bodies
        first, last = self.n_consts, self.n_consts + self.n_carry
        planned = [p.meta["val"] for p in self.body.placeholders[:first]]
        consts = [as_planned(t, sig) for t, sig in zip(tensors[:first], planned, strict=True)]
        carry: Sequence[Tensor] = [t.contiguous() for t in tensors[first:last]]
        rows = [t.contiguous() for t in tensors[last:]]
        k = self.n_carry
        parts: list[list[Tensor]] = []
        for start in self.blocks():
            count = min(ROWS, self.length - start)
            part = [t[start : start + count].unbind(0)[:: -1 if self.reverse else 1] for t in rows]
            made = []
            for row in zip(*part, strict=True) if part else repeat((), count):
                outs = body(*consts, *carry, *row)
                carry = outs[:k]
                made.append(outs[k:])
            made = made[::-1] if self.reverse else made
            parts.append([torch.stack(y) for y in zip(*made, strict=True)])
        parts = parts[::-1] if self.reverse else parts
        ys = [y[0] if len(y) == 1 else torch.cat(y) for y in zip(*parts, strict=True)]
        return [*own_memory(self.body, carry), *ys]

    def blocks(self) -> range:
        """Return the first row of each part of the stacks, in the order of the steps."""
        starts = range(0, self.length, ROWS)
        return starts[::-1] if self.reverse else starts

    def form(self, args: Sequence[Any]) -> tuple[list, dict[str, Any]]:
        """Return its arguments and options in the form of the operator of its name."""
        first, last = self.n_consts, self.n_consts + self.n_carry
        groups = [list(args[:first]), list(args[first:last]), list(args[last:])]
        options = {"length": self.length, "reverse": self.reverse}
        return groups, options | ({"slots": self.slots} if self.slots else {})

    # ----- as a node -----------------------------------------------------------------------------

    def live(self, n: Node, active: Any) -> list[bool]:
        """Return which results of ``n`` have a derivative if its ``active`` arguments do."""
        return self.derivative([a in active for a in n.args])[1]

    def flat(self, n: Node) -> list[Node]:
        """Return the arguments of ``n`` by which the loop is flat."""
        return flat_arguments(n, self.body)

    def derivative(self, given: Sequence[bool]) -> tuple[tuple[int, ...], list[bool]]:
        """Return ``(inputs, results)`` with a derivative in some step, from the ``given``."""
        wrt = {i for i, yes in enumerate(given) if yes}
        while True:
            flags = live(self.body, tuple(sorted(wrt)))
            carried = {self.n_consts + k for k in range(self.n_carry) if flags[k]}
            if carried <= wrt:
                return tuple(sorted(wrt)), flags
            wrt |= carried

    def parts(self, wrt: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Return these inputs of the body as constants, carry, rows."""
        first, last = self.n_consts, self.n_consts + self.n_carry
        return (
            [i for i in wrt if i < first],
            [i for i in wrt if first <= i < last],
            [i for i in wrt if i >= last],
        )

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        """Let the loop also stack residuals, and add a loop that goes back. It carries the
        cotangents of the constants so far, and those of the carry. With ``slots`` leave it, and
        add a node that goes back from step to step."""
        if self.slots:
            steps = filled_node(b, self.length, make_sig((), (), torch.int64, self.vals[0].device))
            return pull_unwinding(b, n, g, active, again, steps)
        wrt, flags = self.derivative([a in active for a in n.args])
        k = self.n_carry
        cuts = halve if self.policy is None else functools.partial(halved_body, self)
        given = [j for j in range(k, len(flags)) if flags[j] and j in g]
        have = tuple([flags[j] if j < k else j in given for j in range(len(flags))])
        kept = self.body.once if self.policy is None else self.body.derived  # there may be many
        half = kept(
            ("pull", self.n_consts, k, wrt, have, self.policy),
            lambda: Half(
                self, vjp(self.body, wrt, have, recompute=cuts is halve), sum(have), cuts
            ),
        )
        _, carries, _ = self.parts(wrt)
        saved = half.saved(b, again, self)
        sigs = [p.meta["val"] for p in self.body.placeholders]
        back, consts, stacked = half.once(
            ("back", wrt, have), lambda: backward_body(self, half, wrt, have)
        )
        zero = lambda i: filled_node(b, 0, sigs[i])
        start = [zero(i) for i in consts]
        for i in carries:
            ct = g.get(i - self.n_consts)
            start.append(zero(i) if ct is None else laid_out(b, ct, sigs[i], exactly=True))
        vals = n.meta["val"]
        cts = [laid_out(b, g[j], vals[j], exactly=True) for j in given]
        args = [*saved.consts, *start, *saved.rows, *cts]
        count, way = len(saved.consts), not self.reverse
        loop = Scan(back, count, len(start), self.length, way, self.policy)
        outs = emit_flow(b, loop, args)
        found: dict[int, Any] = dict(zip((*consts, *carries, *stacked), outs, strict=True))
        return [n.args[i] for i in wrt], [found.get(i) for i in wrt]

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        """Let ``new`` also stack residuals, and add a loop for the tangents, which is linear in
        the tangents given. With ``slots`` add a loop that carries the tangents with the values."""
        if self.slots:
            return super().push(b, n, new, env, tangents)
        wrt, flags = self.derivative([a in tangents for a in n.args])
        half = self.body.once(
            ("push", self.n_consts, self.n_carry, wrt),
            lambda: Half(self, jvp(self.body, wrt, zeros=False), len(wrt)),
        )
        consts, carries, rows = self.parts(wrt)
        saved = half.saved(b, new, self)
        linear, stacked = half.once(("linear", wrt), lambda: linear_body(self, half, wrt))
        sigs = [a.meta["val"] for a in new.args]  # type: ignore[union-attr]

        def tangent(i: int, sig: Sig) -> Node:
            t = tangents.get(n.args[i])
            return filled_node(b, 0, sig) if t is None else laid_out(b, t, sig, exactly=True)

        args = [
            *saved.consts,
            *[tangent(i, dense(sigs[i])) for i in consts],
            *[tangent(i, sigs[i]) for i in carries],
            *saved.rows,
            *[tangent(i, sigs[i]) for i in rows],
        ]
        n_consts = len(saved.consts) + len(consts)
        loop = Scan(linear, n_consts, len(carries), self.length, self.reverse, self.policy)
        outs = emit_flow(b, loop, args)
        places = [*[i - self.n_consts for i in carries], *stacked]
        found: dict[int, Any] = dict(zip(places, outs, strict=True))
        return [found.get(j) if flags[j] else None for j in range(len(flags))]

    def coefficients(
        self, given: Sequence[bool], order: int, made: Callable
    ) -> tuple[Scan, SeriesLayout, SeriesLayout]:
        """Return the loop whose body carries and stacks coefficients, as ``made`` makes it, if the
        ``given`` arguments have some; and where they are among its inputs and its results."""
        inputs, results = self.groups(given, order)
        body = made(self.body, inputs, results)
        return self.of(body, inputs.count(0), results.count(0)), inputs, results

    def groups(self, given: Sequence[bool], order: int) -> tuple[SeriesLayout, SeriesLayout]:
        """Return the positions of coefficients beside inputs and results of the body, if these
        arguments have some."""
        first, last = self.n_consts, self.n_consts + self.n_carry
        wrt, flags = self.derivative(given)
        kinds = range(first), range(first, last), range(last, len(given))
        carried = [i - first for i in wrt if first <= i < last]
        moving = [*carried, *[j for j in range(self.n_carry, len(flags)) if flags[j]]]
        ends = range(self.n_carry), range(self.n_carry, len(flags))
        return SeriesLayout(kinds, wrt, order), SeriesLayout(ends, tuple(moving), order)

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        """Batch the steps; values common to all samples in every step stay unbatched."""
        loop, args, flags = self.batched(walk, n.args, [walk.has(a) for a in n.args])
        results = emit_flow(walk.b, loop, args)
        for j in range(self.n_carry, len(flags)):
            if flags[j]:
                results[j] = with_dim_moved(walk.b, results[j], 1, 0)
        return results, flags

    def batched(
        self, walk: Any, given: Sequence[Any], met: Sequence[bool]
    ) -> tuple[Scan, list[Node], list[bool]]:
        """Return the loop of a batch, in which at least the arguments ``met`` differ between
        samples; its arguments, from the ``given`` ones; and which results differ."""
        b, first, last = walk.b, self.n_consts, self.n_consts + self.n_carry
        met, flags = self.met(met, walk.randomness == "different")
        args = []
        for i, a in enumerate(given):
            new = walk.expanded(a) if met[i] else walk.env[a]
            if first <= i:
                new = with_dim_moved(b, new, 0, 1) if i >= last and met[i] else new
                new = laid_out(b, new, dense(new.meta["val"]), exactly=True)
            elif met[i] != walk.has(a):
                new = laid_out(b, new, dense(new.meta["val"]), exactly=True)
            args.append(new)
        sigs = tuple(
            a.meta["val"] if i < last else row_sig(a.meta["val"]) for i, a in enumerate(args)
        )
        dims = [0 if yes else None for yes in met]
        outs = [0 if yes else None for yes in flags]
        key = ("vmap", tuple(met), sigs, walk.axis)
        body = self.body.derived(key, lambda: vmap(self.body, dims, sigs, walk.axis, outs))
        return self.with_bodies([body]), args, flags

    def met(self, given: Sequence[bool], apart: bool) -> tuple[list[bool], list[bool]]:
        """Return which inputs and results of the body differ between samples in some step; with
        draws ``apart`` the drawn values do."""
        found = list(given)
        while True:
            flags = differing(self.body, found, apart)
            more = found.copy()
            for k in range(self.n_carry):
                more[self.n_consts + k] |= flags[k]
            if more == found:
                return found, [*found[self.n_consts :][: self.n_carry], *flags[self.n_carry :]]
            found = more

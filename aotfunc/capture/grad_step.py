"""Record ``torch.autograd.grad`` as a step: the reverse walk of what was recorded before."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ..cache import Cache
from ..debug import Line
from ..graph import Program, cut
from ..trace.emit import Builder, paused_gc, remap
from ..trace.functionalize import Functionalizer, input_nodes
from ..trace.marks import hidden_write
from ..trace.modes import without_modes
from ..trace.records import Record, instr_op
from ..trace.scalars import bits_of
from ..trace.shapes.instr import Instr
from ..trace.shapes.sig import Sig
from ..trace.traced import as_if_outside
from ..trace.tracer import Trace
from ..transforms.tidy import REWRITES, rebuilt
from ..transforms.vjp import reverse
from ..transforms.vmap import Axis, vmap
from ..transforms.walk import builder, filled_node, unknown
from .calls import CallStep, Step, on_eager
from .gradient_paths import path_from

aten = torch.ops.aten


#: how the derivative is called that PyTorch makes for the op behind ``w.data = y``
_BY_DATA = "GeneratedBackwardFor_aotfunc_hidden_write_default"


class GradStep(Step):
    """A call of ``torch.autograd.grad(outputs, inputs, grad_outputs)`` inside a function. With
    ``size`` it has ``is_grads_batched``: so many gradients per output and per input."""

    runs = False  # it reads the steps before it

    def __init__(
        self,
        outs: Sequence[Sig],
        n_outputs: int,
        given: tuple[bool, ...],
        create_graph: bool,
        size: int | None = None,
    ) -> None:
        super().__init__(outs)
        self.n_outputs, self.given = n_outputs, given
        self.create_graph, self.size = create_graph, size

    def replayed(self, trace: Trace, k: int) -> Record | None:
        """Return record ``k``, this step, as a call of a program of values before it; None if that
        would have to write, to draw, or to look into a Function."""
        _, refs, *rest = trace.records[k]
        if trace.mutates or trace.stand_ins:
            return None
        part, given, reads = path_from(trace, trace.records[:k], refs, len(self.outs))
        steps = [r[0] for r in part.records]
        if any(not isinstance(i, Instr | CallStep) or i.facts.random for i in steps):
            return None

        def make() -> CallStep:
            b = Builder(None, merge=False)
            f = Functionalizer(part, b, input_nodes(part, b))
            f.run()
            outs = self.nodes(f, given)
            program = Program(b.finish(outs), len(part.inputs), len(outs), (), "gradient")
            return CallStep(rebuilt(program, "gradient"), on_eager)

        with as_if_outside(), paused_gc(), without_modes(trace.dtype):
            call = _calls.once((part.key(), bits_of(part.numbers), self, given), make)
        return call, tuple(reads), *rest

    def nodes(self, f: Functionalizer, refs: Sequence[int]) -> list[Node]:
        """Return the nodes of the results."""
        first = f.number
        self.emit(f, refs, True, None)
        return [f.read(r) for r in range(first, f.number)]

    def live(self, given: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        return [self.create_graph] * len(self.outs), []

    def emit(self, f: Functionalizer, refs: Sequence[int], grad: bool, line: Line | None) -> None:
        n, m = self.n_outputs, sum(self.given)
        outputs = [f.read(r) for r in refs[:n]]
        cotangents = [f.read(r) for r in refs[n : n + m]]
        inputs = [before_hidden_writes(f.read(r)) for r in refs[n + m :]]
        feed = iter(
            cotangents if self.size is None else [unknown(f.b, o.meta["val"]) for o in outputs]
        )
        seeds = [
            next(feed) if yes else filled_node(f.b, 1, o.meta["val"])
            for o, yes in zip(outputs, self.given, strict=True)
        ]
        grads: Sequence[Any] = reverse(f.b, outputs, seeds, inputs)
        grads = [
            filled_node(f.b, 0, x.meta["val"]) if g is None else g
            for g, x in zip(grads, inputs, strict=True)
        ]
        if self.size is not None:
            grads = [
                f.fitted(g, sig)
                for g, sig in zip(for_each(f.b, seeds, grads, cotangents, self.size), self.outs)
            ]
        elif any(
            g.meta["val"].stride != sig.stride for g, sig in zip(grads, self.outs, strict=True)
        ):
            roots = f.trace.roots().of
            viewed = {
                roots.get(refs[0], refs[0])
                for instr, refs, *_ in f.trace.records
                if instr_op(instr) in BY_LAYOUT
            }
            grads = [
                f.fitted(g, sig) if ref in viewed else g
                for ref, (g, sig) in enumerate(zip(grads, self.outs, strict=True), f.number)
            ]
        self.bind(f, grads, grad and self.create_graph)


_calls = Cache(256)


def before_hidden_writes(n: Node) -> Node:
    """Return the value that writes hidden from autograd have replaced: all is computed from it
    that autograd takes to be computed from the tensor."""
    while True:
        made: Any = n.args[0] if n.target is operator.getitem else n
        if made.target is not hidden_write and getattr(made.target, "__name__", "") != _BY_DATA:
            return n
        n = made.args[0]


def builder_for(trace: Trace) -> tuple[Builder, bool]:
    """Return a builder for the program of a recording, and whether it is plain: a gradient inside
    tells equal nodes apart, so that they may be merged and rewritten only afterwards."""
    plain = any(r[0].__class__ is GradStep for r in trace.records)
    return Builder(None, merge=False) if plain else Builder(REWRITES), plain


#: views that only some layouts allow
BY_LAYOUT = frozenset(
    (aten.view.default, aten.view.dtype, aten.view_as_complex.default, aten.as_strided.default)
)


def for_each(
    b: Builder, inputs: Sequence[Node], outs: Sequence[Any], batch: Sequence[Node], size: int
) -> list[Node]:
    """Return ``outs``, which were computed from ``inputs``, for each of a batch of inputs."""
    _, nodes, residuals = cut(b.graph, inputs, (), outs)
    inner = builder()
    env = {n: inner.placeholder(n.name, n.meta["val"]) for n in (*inputs, *residuals)}
    count = len(env)
    inner.copy([n for n in nodes if n not in env], env)
    program = Program(inner.finish(remap(tuple(outs), env)), count, len(outs), (), "each")
    dims = [0] * len(inputs) + [None] * len(residuals)
    given = [*batch, *residuals]
    each = vmap(program, dims, [x.meta["val"] for x in given], Axis(size, "same"), [0] * len(outs))
    return b.inlined(each, given)

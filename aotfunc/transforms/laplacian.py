"""Sum a second derivative over a batch of directions as early as possible.

A program that is quadratic in its direction has values of degree 0, 1 and 2 in it. Those of degree
1 are batched; a product of two of them is summed over the batch at once, and what is linear in
that sum is computed for the sum alone: the forward Laplacian of Li et al., "A computational
framework for neural network-based variational Monte Carlo with Forward Laplacian" (2024), as a
rewriting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graph import Program, output_node
from ..trace.emit import Builder, drop_dead, paused_gc
from ..trace.shapes.sig import Sig
from .rules.table import entry_for
from .taylor import taylor
from .vmap import Axis, Batch
from .walk import builder

aten = torch.ops.aten

#: ops that keep the order of elements
RESHAPING = {
    *(aten.view.default, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
}


class Summed(Batch):
    """A batching walk that knows which values are already sums over the batch. Without ``early``
    none are, as in programs whose loops and branches carry values of all degrees. The rows of the
    input ``basis`` are all unit vectors, in order."""

    def __init__(self, b: Builder, size: int, early: bool, basis: Node | None) -> None:
        super().__init__(b, Axis(size, "same"))
        self.early, self.basis = early, {basis}
        self.sums: set[Node] = set()

    def walk(self, nodes: Any) -> None:
        self.b.copy(nodes, self.env, self.visit)

    def visit(self, b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        if any(i in self.sums for i in n._input_nodes):
            self.sums.add(n)  # linear in all arguments of degree 2 together
            terms = {i: self.total(i) if self.batched.get(i) else env[i] for i in n._input_nodes}
            return b.call_like(n, terms, moved=True)
        if not any(self.batched.get(i) for i in n._input_nodes):
            return NotImplemented
        columns = self.columns(n)
        new, self.batched[n] = self.batch(n) if columns is None else (columns, True)
        env[n] = new
        if n.target in RESHAPING and n.args[0] in self.basis:
            self.basis.add(n)
        if self.early and entry_for(n.target).bilinear and all(map(self.has, n.args[:2])):
            self.batched[n] = False
            self.sums.add(n)
            return b.call(aten.sum.dim_IntList, new, [0])
        return new

    def columns(self, n: Node) -> Any:
        """Return a matrix's products with unit vectors, its columns or rows, or None."""
        if n.target not in (aten.mv.default, aten.mm.default) or all(map(self.has, n.args)):
            return None
        (left, right), shape, b = n.args, n.meta["val"].shape, self.b
        if right in self.basis and shape[1:] in ((), (1,)):
            columns = b.call(aten.t.default, self.env[left])
            return columns if len(shape) == 1 else b.call(aten.unsqueeze.default, columns, 2)
        if left in self.basis and n.target is aten.mm.default and shape[0] == 1:
            return b.call(aten.unsqueeze.default, self.env[right], 1)
        return None

    def total(self, n: Any) -> Any:
        """Return the sum of a value of degree 2 over the batch."""
        if n in self.sums:
            return self.env[n]
        return self.b.call(aten.sum.dim_IntList, self.expanded(n), [0])


def summed(program: Program, direction: int, sig: Sig) -> Program:
    """Return the sums of the results of a program quadratic in its input ``direction`` over rows
    like ``sig`` in its place: unit vectors. Literal results stay."""
    with paused_gc():
        b = builder()
        early = not any(hasattr(n.target, "bodies") for n in program.graph.nodes)
        given = program.placeholders[direction]
        all_axes = sig.shape[0] == given.meta["val"].numel
        walk = Summed(b, sig.shape[0], early, given if all_axes else None)
        for i, p in enumerate(program.placeholders):
            val = sig if i == direction else p.meta["val"]
            walk.env[p] = b.placeholder(p.name, val, role=p.meta.get("role"))
            walk.batched[p] = i == direction
        walk.walk(program.graph.nodes)
        outs = [walk.total(o) if isinstance(o, Node) else o for o in program.outputs]
        return Program(b.finish(outs), program.n_inputs, len(outs), (), "summed")


def laplacian(program: Program, x: int, n_out: int, axes: Sig) -> Program:
    """Return ``(inputs, axes, closed-over) -> sums``, those of the second derivatives of the first
    ``n_out`` results along the rows of ``axes``; None for zero."""
    along = taylor(program, (x,), ((True, False),), 2, n_out)
    end = output_node(along.graph)
    end.args = (along.outputs[program.n_outputs + 1 :: 2],)
    drop_dead(along.graph, end)
    only = Program(along.graph, along.n_inputs, n_out, (), along.name)
    return summed(only, program.n_inputs, axes)

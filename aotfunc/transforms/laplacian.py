"""Second derivatives along a batch of directions, or their sum.

A sum is taken as early as possible. A program that is quadratic in its direction has values of
degree 0, 1 and 2 in it. Those of degree 1 are batched; a product of two of them is summed over the
batch at once, and what is linear in that sum is computed for the sum alone: the forward Laplacian
of Li et al., "A computational framework for neural network-based variational Monte Carlo with
Forward Laplacian" (2024), as a rewriting.

Without the sum, a number that is linear in products of values of degree 1 is the sum of these
products with its derivatives by them, which are the same along each direction.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..graph import Program, needed_for, output_node
from ..trace.emit import Builder, drop_dead, paused_gc
from ..trace.nested import leaves
from ..trace.shapes.sig import Sig
from .factors import sum_of
from .rules.table import entry_for
from .taylor import taylor
from .vjp import primals, reverse
from .vmap import Axis, Batch, inserted
from .walk import builder, filled_node

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


def along_axes(
    program: Program, direction: int, axes: Sig, vals: Sequence[Any], sums: bool, writes: bool
) -> Program:
    """Return the results, like ``vals``, of a program quadratic in its input ``direction`` for
    unit vectors in its place, the rows of ``axes``, or their ``sums``; None is zero. Without
    ``writes`` it leaves its inputs as they are."""
    with paused_gc():
        b = builder()
        early = sums and not any(hasattr(n.target, "bodies") for n in program.graph.nodes)
        given, size = program.placeholders[direction], axes.shape[0]
        all_axes = size == given.meta["val"].numel
        walk = Summed(b, size, early, given if all_axes else None)
        for i, p in enumerate(program.placeholders):
            val = axes if i == direction else p.meta["val"]
            walk.env[p] = b.placeholder(p.name, val, role=p.meta.get("role"))
            walk.batched[p] = i == direction
        walk.walk(program.graph.nodes)
        outs, n = program.outputs, program.n_outputs
        found = [
            filled_node(b, 0, v if sums else inserted(v, 0, size))
            if o is None
            else walk.total(o)
            if sums
            else walk.expanded(o)
            for o, v in zip(outs[:n], vals, strict=True)
        ]
        written = [walk.env[o] for o in outs[n:]] if writes else []
        mutated = program.mutated if writes else ()
        return Program(b.finish([*found, *written]), program.n_inputs, n, mutated, program.name)


def second(program: Program, x: int, n_out: int) -> Program:
    """Return ``(inputs, direction, closed-over) -> derivatives``, the second ones of the first
    ``n_out`` results; None for zero."""
    along = taylor(program, (x,), ((True, False),), 2, n_out)
    end = output_node(along.graph)
    outs, n = along.outputs, along.n_outputs
    end.args = ((*outs[program.n_outputs + 1 : n : 2], *outs[n:]),)
    drop_dead(along.graph, end)
    return Program(along.graph, along.n_inputs, n_out, along.mutated, "second")


def by_products(program: Program, direction: int) -> Program:
    """Return a program whose one result, a number quadratic in the input ``direction``, is a sum
    of products; the same program where it is not."""
    with paused_gc():
        b = builder()
        new = primals(b, program.placeholders)
        out, *written = b.inlined(program, new)
        nodes = list(b.graph.nodes)
        moved, products, linear = {new[direction]}, list[Node](), set[Node]()
        for n in nodes:
            if any(i in linear for i in n._input_nodes):
                linear.add(n)
            elif any(i in moved for i in n._input_nodes):
                square = entry_for(n.target).bilinear and moved.issuperset(n.args[:2])
                products.append(n) if square else moved.add(n)
                linear.update([n] if square else ())
        read = needed_for(nodes, [out]) & linear
        products = [n for n in products if n in read]
        if out not in linear or not all(plain(n, () if n in products else moved) for n in read):
            return program
        val = out.meta["val"]
        factors = reverse(b, [out], [filled_node(b, 1, val)], products)
        terms = [
            b.call(aten.sum.default, b.call(aten.mul.Tensor, n, factor), dtype=val.dtype)
            for n, factor in zip(products, factors, strict=True)
            if factor is not None
        ]
        total = sum_of(b, terms)
        found = total and b.call(aten.view.default, total, list(val.shape))
        graph = b.finish([found, *written])
        return Program(graph, program.n_inputs, 1, program.mutated, program.name)


def plain(n: Node, moved: Collection[Node]) -> bool:
    """Return whether a real value is that of an op that reads none of ``moved``."""
    return (
        (n.target is operator.getitem or isinstance(n.target, OpOverload))
        and n.target is not aten.detach.default
        and not any(i in moved for i in n._input_nodes)
        and not any(v.dtype.is_complex for v in leaves(n.meta["val"]))
    )


def laplacian(program: Program, x: int, n_out: int, axes: Sig, writes: bool) -> Program:
    """Return ``(inputs, axes, closed-over) -> sums``, those of the second derivatives of the first
    ``n_out`` results along the rows of ``axes``."""
    along, vals = second(program, x, n_out), program.vals[:n_out]
    return along_axes(along, program.n_inputs, axes, vals, True, writes)


def diagonal(program: Program, x: int, n_out: int, axes: Sig, writes: bool) -> Program:
    """Return ``(inputs, axes, closed-over) -> derivatives``, the second ones of the first
    ``n_out`` results along each of the rows of ``axes``."""
    along, vals = second(program, x, n_out), program.vals[:n_out]
    if n_out == 1 and along.outputs[0] is not None and vals[0].numel == 1:
        along = by_products(along, program.n_inputs)
    return along_axes(along, program.n_inputs, axes, vals, False, writes)

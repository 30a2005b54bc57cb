"""Jacobians: the backward half batched over a basis of cotangents, or the linear part over a basis
of tangents; residuals stay unbatched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import at
from ..errors import RuleError
from ..graph import Program, draws
from ..trace.emit import Builder, paused_gc
from ..trace.shapes.sig import Sig, contiguous_stride, make_sig
from .fresh import ANYTHING, fresh
from .linearize import halve, linear_program
from .lower import lowered
from .tidy import rebuilt
from .unhooked import unhooked
from .vjp import vjp
from .vmap import Axis, vmap
from .walk import builder, filled_node

aten = torch.ops.aten


def numbered_draws(program: Program) -> Program:
    """Return the program with numbered draws, so that copies of it share them."""
    inlined = lowered(program, frozenset({"calls"}))
    if not any(draws(n) for n in inlined.graph.nodes):
        return program
    for n in inlined.graph.nodes:
        if draws(n) and not isinstance(n.target, OpOverload):
            raise RuleError(
                f"{n.target.__name__} draws random numbers{at(n.meta.get('line'))}, and Jacobians "
                "need them several times: draw outside of it and pass them (as xs)"
            )
    program = rebuilt(inlined, "numbered_draws")
    for k, n in enumerate(program.graph.nodes):
        if n.op == "call_function" and draws(n):
            n.meta["draw"] = k
    return program


def assembled(b: Builder, outs: Sequence[Any], base: Program, name: str, own: range) -> Program:
    graph = b.finish(outs)
    for n in graph.nodes:
        n.meta.pop("draw", None)
    return fresh(
        Program(graph, base.n_inputs, len(outs) - len(base.mutated), base.mutated, name),
        [(i, ANYTHING) for i in own],
    )


def jacobian_rows(
    base: Program, wrt: tuple[int, ...], n_out: int, chunk: int | None, randomness: str
) -> Program:
    """Return, per output, the backward half over a basis of cotangents, one forward."""
    with paused_gc():
        base = numbered_draws(base)
        b = builder()
        inputs = b.inputs(base.placeholders)
        blocks: list = []
        outs = b.inlined(base, inputs)
        for i in range(n_out):
            late, residuals = backward_half(b, base, wrt, i, inputs)
            val = base.vals[i]
            found = rows_of_late(b, late, residuals, val, chunk, randomness)
            for x, rows in zip(wrt, found, strict=True):
                if rows.meta["val"].dtype.is_complex:  # the cotangent multiplies the conjugate
                    rows = b.call(aten.conj_physical.default, rows)
                shape = [*val.shape, *base.placeholders[x].meta["val"].shape]
                blocks.append(b.reshape(rows, shape))
        own = range(len(blocks), len(blocks) + base.n_outputs)
        return assembled(b, [*blocks, *outs[n_out:]], base, "jacrev", own)


def jacobian_columns(
    base: Program, wrt: tuple[int, ...], n_out: int, chunk: int | None, randomness: str
) -> Program:
    """Return, per argument, the linear part batched over a basis of its tangents."""
    with paused_gc():
        base = numbered_draws(base)
        b = builder()
        inputs = b.inputs(base.placeholders)
        outs = b.inlined(base, inputs)
        columns: list[list] = []
        for x in wrt:
            late, residuals = linear_half(b, base, x, n_out, inputs)
            val = base.placeholders[x].meta["val"]
            column = []
            for i, whole in enumerate(rows_of_late(b, late, residuals, val, chunk, randomness)):
                rank = len(base.vals[i].shape)
                whole = b.call(aten.permute.default, whole, [*range(1, rank + 1), 0])
                column.append(b.reshape(whole, [*base.vals[i].shape, *val.shape]))
            columns.append(column)
        blocks = [columns[k][i] for i in range(n_out) for k in range(len(wrt))]
        own = range(len(blocks), len(blocks) + base.n_outputs)
        return assembled(b, [*blocks, *outs[n_out:]], base, "jacfwd", own)


def jacobian_products(
    base: Program, x: int, seeds: Sequence[tuple[Sig, bool]], chunk: int | None
) -> Program:
    """Return ``(inputs, seeds, closed-over) -> (products, outputs)``: for each of the ``seeds``
    the products of the Jacobian of the first output by input ``x`` with its rows, or of its rows
    with the Jacobian where the flag is true, ``chunk`` at a time."""
    with paused_gc():
        base = numbered_draws(base)
        b, old, count = builder(), base.placeholders, len(seeds)
        given = b.inputs(old[: base.n_inputs])
        every = [b.placeholder("seeds", sig) for sig, _ in seeds]
        inputs = [*given, *b.inputs(old[base.n_inputs :])]
        outs, found = b.inlined(base, inputs), []
        for rows, (sig, from_left) in zip(every, seeds, strict=True):
            if from_left:
                late, residuals = backward_half(b, base, (x,), 0, inputs)
            else:
                late, residuals = linear_half(b, base, x, 1, inputs)
            pieces = []
            for start, n in chunks(sig.shape[0], chunk):
                whole = n == sig.shape[0]
                part = rows if whole else b.call(aten.slice.Tensor, rows, 0, start, start + n)
                pieces.append(rows_at_once(b, late, residuals, part, n, "error")[0])
            found.append(cat_pieces(b, pieces, 0))
        mutated = [i if i < base.n_inputs else i + count for i in base.mutated]
        wider = Program(base.graph, base.n_inputs + count, base.n_outputs, mutated, base.name)
        own = range(count, count + base.n_outputs)
        return assembled(b, [*found, *outs], wider, "products", own)


def backward_half(
    b: Builder, base: Program, wrt: tuple[int, ...], i: int, inputs: Sequence[Node]
) -> tuple[Program, list]:
    """Return what is left of the pullback of output ``i``, by the cotangent, and its residuals."""
    have = tuple(k == i for k in range(base.n_outputs))
    joint = unhooked(vjp(base, wrt, have, fill=True, keep=()))
    early, late, direct = halve(joint, 0, 1)
    return late, b.inlined(early, inputs)[: early.n_outputs] + [inputs[k] for k in direct]


def linear_half(
    b: Builder, base: Program, x: int, n_out: int, inputs: Sequence[Node]
) -> tuple[Program, list]:
    """Return what is left of the outputs' push-forward, by the tangent, and its residuals."""
    early, late, direct = halve(linear_program(base, (x,), n_out), base.n_outputs, 1)
    residuals = b.inlined(early, inputs)[base.n_outputs : early.n_outputs]
    return late, residuals + [inputs[k] for k in direct]


def rows_of_late(
    b: Builder,
    late: Program,
    residuals: Sequence[Any],
    val: Sig,
    chunk: int | None,
    randomness: str,
) -> list:
    """Return the results of ``late`` for each row of the identity over the elements of ``val``,
    stacked in front; ``chunk`` rows at a time."""
    pieces = []
    for start, count in chunks(val.numel, chunk):
        basis = basis_rows(b, val, start, count)
        pieces.append(rows_at_once(b, late, residuals, basis, count, randomness))
    return [cat_pieces(b, rows, 0) for rows in zip(*pieces, strict=True)]


def rows_at_once(
    b: Builder, late: Program, residuals: Sequence[Any], basis: Node, count: int, randomness: str
) -> list:
    """Return the results of ``late`` for each row of ``basis``; a single row needs no batch."""
    sig = basis.meta["val"]
    if count == 1:
        row = b.call(aten.view.default, basis, list(sig.shape[1:]))
        return [b.call(aten.unsqueeze.default, x, 0) for x in b.inlined(late, [*residuals, row])]
    dims = [None] * len(residuals) + [0]
    sigs = [r.meta["val"] for r in (*residuals, basis)]
    return b.inlined(vmap(late, dims, sigs, Axis(count, randomness)), [*residuals, basis])


def chunks(total: int, chunk: int | None) -> list[tuple[int, int]]:
    """Return ``(start, count)`` of each chunk."""
    step = total if chunk is None else chunk
    return [(i, min(step, total - i)) for i in range(0, total, step)] if total else [(0, 0)]


def basis_rows(b: Builder, sig: Sig, start: int, count: int) -> Node:
    """Return ``count`` rows of the identity from ``start``, each in the shape of ``sig``."""
    if sig.numel == 1 and count == 1:
        return filled_node(b, 1, make_dense((1, *sig.shape), sig))
    eye = b.call(aten.eye.default, sig.numel, dtype=sig.dtype, device=sig.device)
    if count != sig.numel:
        eye = b.call(aten.slice.Tensor, eye, 0, start, start + count)
    return b.call(aten.view.default, eye, [count, *sig.shape])


def make_dense(shape: tuple, sig: Sig) -> Sig:
    return make_sig(shape, contiguous_stride(shape), sig.dtype, sig.device)


def cat_pieces(b: Builder, pieces: Sequence[Node], dim: int) -> Node:
    return pieces[0] if len(pieces) == 1 else b.call(aten.cat.default, list(pieces), dim)

"""Run the steps of a loop that need nothing of one another in blocks: each block is a batch.

``map`` and its gradients are such loops. They may carry sums, of which a block adds its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..backends.loops.reductions import REDUCTIONS
from ..errors import AotfuncError
from ..graph import Program, acts, dependents, draws, n_ops, op_of
from ..partition.cost import nbytes
from ..trace.emit import Builder, paused_gc, remap
from ..trace.views import laid_out
from ..transforms.contractions import reassociated
from ..transforms.decompose import separate_outputs
from ..transforms.lower import CALLS, EVERYTHING, lowered, marked
from ..transforms.rewrites.constants import filled_with
from ..transforms.rules.schema import tensor_args
from ..transforms.rules.table import entry_for
from ..transforms.tidy import FINAL, rebuilt
from ..transforms.vmap import Axis, inserted, vmap
from ..transforms.walk import builder
from .bodies import Flow, dense, emit_flow, subprogram
from .scan import Scan
from .unrolled import emit_unrolled

aten = torch.ops.aten

#: most bytes that the values of a block take: they stay in the processor's cache
BLOCK = 1 << 20

#: fewer steps are not worth a batch
FEWEST = 4

#: most ops that the steps of a loop may have in all to stand one by one
FEW = 256

#: sums in these dtypes may be added in another order
SUMMED = frozenset((torch.float32, torch.float64, torch.complex64, torch.complex128))

#: ops of slices along dimensions, without errors or ties that depend on values
SLICES = {
    *(aten._softmax_backward_data.default, aten._log_softmax_backward_data.default),
    *(aten.var.correction, aten.std.correction),
    *(aten.var_mean.correction, aten.std_mean.correction),
    *(aten.linalg_vector_norm.default, aten.max.dim, aten.min.dim),
}


def in_blocks(program: Program) -> Program:
    """Return the program with blocks of steps in place of the steps of its loops, where that keeps
    draws, effects, errors and the user's choice of branches; sums differ by rounding."""
    if not any(isinstance(n.target, Flow) for n in program.graph.nodes):
        return program

    def inner(body: Program) -> Program:
        return body.once(in_blocks, lambda: in_blocks(body))

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        if not isinstance(n.target, Flow):
            return NotImplemented
        args = remap(n.args, env)
        if isinstance(n.target, Scan) and (outs := emit_blocks(b, n.target, args)) is not None:
            return outs
        return n.target.inline(b, args, inner)

    with paused_gc():
        b, env = Builder(FINAL, final=True), dict[Node, Any]()
        b.copy(program.graph.nodes, env, visit)
        outs = separate_outputs(b, program.outputs, env)
        graph = b.finish(outs)
    return Program(graph, program.n_inputs, program.n_outputs, program.mutated, "blocks")


def without_loops(program: Program) -> Program:
    """Return the program with batches for loops of independent steps, and with steps one by one
    for loops of few ops. Rules of the user's stay."""
    if not any(isinstance(n.target, Scan) for n in program.graph.nodes):
        return program

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        if not isinstance(n.target, Scan):
            return NotImplemented
        args, body = remap(n.args, env), without_loops(lowered(n.target.body, CALLS))
        loop = n.target.with_bodies([body])
        outs = None if marked(body) else emit_blocks(b, loop, args, loop.length)
        if outs is None and n_ops(body.graph) * loop.length <= FEW:
            outs = emit_unrolled(b, loop, args, loop.length)
        return NotImplemented if outs is None else outs

    return rebuilt(program, "without loops", visit)


def emit_blocks(
    b: Builder, loop: Scan, args: Sequence[Any], most: int | None = None
) -> list | None:
    """Add a loop over blocks of at most ``most`` steps of ``loop``, and the steps that remain; one
    block needs no loop. Return its results, None if its steps stay."""
    k, first = loop.n_carry, loop.n_consts
    body = lowered(loop.body, EVERYTHING)
    summands = body.once(("summands", first, k), lambda: without_sums(body, first, k))
    if summands is None or not separate(summands) or not has_planned_layouts(loop, args):
        return None
    consts, carry, rows = args[:first], args[first : first + k], args[first + k :]
    if most is None and keeps_all(summands, k):
        most = loop.length
    most = most or BLOCK // max(1, row_bytes(summands, first))
    if min(most, loop.length) < FEWEST:
        return None
    steps = even_size(loop.length, most)
    try:
        signed = tuple([may_be_minus_zero(c) for c in carry])
        of = functools.partial(block, summands, first, signed)
        count, left = divmod(loop.length, steps)
        bodies = [of(steps), *([of(left)] if left else [])]
    except AotfuncError:  # an op without a rule for batches
        return None
    if steps == loop.length:
        return b.inlined(bodies[0], args)
    blocks = [b.call(aten.slice.Tensor, x, 0, 0, loop.length - left) for x in rows]
    blocks = [b.reshape(x, [count, steps, *x.meta["val"].shape[1:]]) for x in blocks]
    outs = emit_flow(b, Scan(bodies[0], first, k, count), [*consts, *carry, *blocks])
    ys = [b.reshape(y, [count * steps, *y.meta["val"].shape[2:]]) for y in outs[k:]]
    if not left:
        return [*outs[:k], *ys]
    rest = [b.call(aten.slice.Tensor, x, 0, loop.length - left, loop.length) for x in rows]
    last = b.inlined(bodies[1], [*consts, *outs[:k], *rest])
    joined = [b.call(aten.cat.default, list(y)) for y in zip(ys, last[k:], strict=True)]
    return [*last[:k], *joined]


def has_planned_layouts(loop: Scan, args: Sequence[Node]) -> bool:
    """Return whether arguments have the layouts that the body was captured for."""
    vals = [a.meta["val"] for a in args]
    n = loop.n_consts
    own = [p.meta["val"].stride for p in loop.body.placeholders[:n]]
    return [v.stride for v in vals[:n]] == own and all(v is dense(v) for v in vals[n:])


def even_size(length: int, most: int) -> int:
    """Return the largest size of at most ``most`` steps into whose blocks the steps divide; if
    it is small, that of the fewest blocks."""
    if length <= most:
        return length
    fewest = -(-length // most)
    for count in range(fewest, 2 * fewest + 1):
        if length % count == 0:
            return length // count
    return length // fewest if length // fewest <= most else most


def without_sums(body: Program, n_consts: int, n_carry: int) -> Program | None:
    """Return the body without its carry, which are sums: each summand is the result in place of
    the new sum. None if it carries anything else."""
    inputs, outs = body.placeholders, list(body.outputs)
    carry, sums = inputs[n_consts : n_consts + n_carry], outs[:n_carry]
    for i, (c, o) in enumerate(zip(carry, sums, strict=True)):
        terms = [a for a in o.args[:2] if a is not c]
        if o.target is not aten.add.Tensor or o.kwargs or len(terms) != 1:
            return None
        term: Any = terms[0]
        own = set(c.users) == {o} and outs.count(o) == 1 and len(o.users) == 1
        if not own or not isinstance(term, Node) or c.meta["val"].dtype not in SUMMED:
            return None
        if term.meta["val"] is not dense(c.meta["val"]):
            return None
        outs[i] = term
    rest = [n for n in body.graph.nodes if n not in sums]
    return subprogram(body, rest, outs, [p for p in inputs if p not in carry])


def separate(body: Program) -> bool:
    """Return whether steps may run at once: the body draws nothing, has no
    effects and no branches, and errors do not depend on values."""
    return all(n.op != "call_function" or separate_node(n) for n in body.graph.nodes)


def separate_node(n: Node) -> bool:
    op: Any = n.target
    if isinstance(op, Scan):
        return not op.slots and separate(op.body)
    if not isinstance(op, OpOverload):
        return getattr(op, "__name__", "") == "getitem"
    rules = entry_for(op)
    return not (acts(n) or draws(n)) and (
        rules.elementwise
        or rules.along
        or torch.Tag.pointwise in op.tags
        or op in SLICES
        or op in REDUCTIONS
        or set(tensor_args(op)) <= set(rules.linear)
    )


def keeps_all(body: Program, n_sums: int) -> bool:
    """Return whether all that a step computes is among its results: blocks would not hold less at
    once than all steps do."""
    made = {op_of(o) for o in body.outputs if o.op == "call_function"}
    loops = any(isinstance(o.target, Flow) for o in made)
    return not (n_sums or loops) and n_ops(body.graph) == len(made)


def may_be_minus_zero(carry: Node) -> bool:
    """Return whether a carry may begin as -0.0, which a sum of -0.0 leaves as it is."""
    value = filled_with(carry)
    return value is None or math.copysign(1, value) < 0


def row_bytes(body: Program, n_consts: int) -> int:
    """Return the bytes of the values that a step has for itself."""
    return sum(
        [nbytes(n.meta["val"]) for n in dependents(body.graph, body.placeholders[n_consts:])]
    )


def block(body: Program, n_consts: int, signed: tuple[bool, ...], size: int) -> Program:
    """Return ``(constants, carry, rows of a block) -> (carry, rows of a block)``. A ``signed`` sum
    of -0.0 is -0.0, not 0.0. Raises an error for a body with an op that has no rule for
    batches."""
    n_carry = len(signed)

    def make() -> Program:
        given = [p.meta["val"] for p in body.placeholders]
        consts, rows = given[:n_consts], [inserted(v, 0, size) for v in given[n_consts:]]
        dims = [*[None] * n_consts, *[0] * len(rows)]
        batch = vmap(body, dims, [*consts, *rows], Axis(size, strict=True))
        with paused_gc():
            b = builder()
            inputs = b.inputs(batch.placeholders[:n_consts])
            carry = [b.placeholder("sum", dense(v)) for v in body.vals[:n_carry]]
            stacks = b.inputs(batch.placeholders[n_consts:])
            outs = b.inlined(batch, [*inputs, *stacks])
            sums = [
                (signed_sum if yes else row_sum)(b, x)
                for x, yes in zip(outs, signed, strict=False)
            ]
            added = [b.call(aten.add.Tensor, c, x) for c, x in zip(carry, sums, strict=True)]
            results = [laid_out(b, y, dense(y.meta["val"]), exactly=True) for y in outs[n_carry:]]
            results = [*added, *results]
            count = len(given) + n_carry
            return reassociated(Program(b.finish(results), count, len(results), (), "block"))

    return body.derived(("block", n_consts, signed, size), make)


def row_sum(b: Builder, x: Node) -> Node:
    return b.call(aten.sum.dim_IntList, x, [0])


def signed_sum(b: Builder, x: Node) -> Node:
    """Return the sum of rows, -0.0 where all are: sums begin with 0.0."""
    if x.meta["val"].dtype.is_complex:
        parts = signed_sum(b, b.call(aten.view_as_real.default, x))
        return b.call(aten.view_as_complex.default, parts)
    found = row_sum(b, x)
    negative = b.call(aten.all.dim, b.call(aten.signbit.default, x), 0)
    minus = b.call(aten.neg.default, b.call(aten.abs.default, found))
    return b.call(aten.where.self, negative, minus, found)

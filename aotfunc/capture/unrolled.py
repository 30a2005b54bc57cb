"""Put several steps of a loop in one body: fewer steps, each of which is longer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..graph import Program
from ..trace.emit import Builder, paused_gc
from ..transforms.vmap import inserted
from ..transforms.walk import builder
from .bodies import emit_flow
from .scan import Scan

aten = torch.ops.aten


def emit_unrolled(b: Builder, loop: Scan, args: Sequence[Any], unroll: int) -> list:
    """Add ``loop`` as a loop over blocks of ``unroll`` steps, and the remaining steps after it. If
    all steps are in one block, there is no loop. Return its results."""
    count, left = divmod(loop.length, unroll)
    if count == 1:
        count, left = 0, loop.length
    first, last = loop.n_consts, loop.n_consts + loop.n_carry
    consts, carry, rows = list(args[:first]), list(args[first:last]), args[last:]
    start, end = (left, loop.length) if loop.reverse else (0, loop.length - left)
    parts = []
    if count:
        body = several_steps(loop, unroll)
        blocks = [b.call(aten.slice.Tensor, x, 0, start, end) for x in rows]
        blocks = [b.reshape(x, [count, unroll, *x.meta["val"].shape[1:]]) for x in blocks]
        target = Scan(body, first, loop.n_carry, count, loop.reverse, loop.policy, loop.slots)
        outs = emit_flow(b, target, [*consts, *carry, *blocks])
        carry = outs[: loop.n_carry]
        ys = outs[loop.n_carry :]
        parts.append([b.reshape(y, [end - start, *y.meta["val"].shape[2:]]) for y in ys])
    if left:
        bounds = (0, left) if loop.reverse else (end, loop.length)
        over = [b.call(aten.slice.Tensor, x, 0, *bounds) for x in rows]
        outs = b.inlined(several_steps(loop, left), [*consts, *carry, *over])
        carry = outs[: loop.n_carry]
        parts.append(outs[loop.n_carry :])
    parts = parts[::-1] if loop.reverse else parts
    if len(parts) == 1:
        return [*carry, *parts[0]]
    return [*carry, *[b.call(aten.cat.default, list(y)) for y in zip(*parts, strict=True)]]


def several_steps(loop: Scan, steps: int) -> Program:
    """Return ``(constants, carry, rows of several steps) -> (carry, rows of several steps)``: the
    body of ``loop``, repeated ``steps`` times."""

    def make() -> Program:
        with paused_gc():
            b, last = builder(), loop.n_consts + loop.n_carry
            inputs = loop.body.placeholders
            given = b.inputs(inputs[:last])
            consts, carry = given[: loop.n_consts], given[loop.n_consts :]
            rows = [
                b.placeholder(p.name, inserted(p.meta["val"], 0, steps)) for p in inputs[last:]
            ]
            made = []
            for t in range(steps)[:: -1 if loop.reverse else 1]:
                row = [b.call(aten.select.int, x, 0, t) for x in rows]
                outs = b.inlined(loop.body, [*consts, *carry, *row])
                carry = outs[: loop.n_carry]
                made.append(outs[loop.n_carry :])
            made = made[::-1] if loop.reverse else made
            ys = [b.call(aten.stack.default, list(y)) for y in zip(*made, strict=True)]
            results = [*carry, *ys]
            return Program(b.finish(results), len(inputs), len(results), (), "steps")

    return loop.body.once(("steps", loop.n_consts, loop.n_carry, steps, loop.reverse), make)

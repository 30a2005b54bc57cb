"""Give inputs on which a tangent does not depend a gradient of zeros, where torch.func does. So
``hessian(f)(x).sum().backward()`` works where ``f`` is quadratic, and the ``y`` of ``x.floor() *
y`` has a gradient."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.fx import Node

from ..graph import Program
from ..trace.traced import current
from ..transforms.activity import active_nodes, sources
from ..transforms.rules.table import entry_for

aten = torch.ops.aten


def attached(
    base: Program, wrt: Sequence[int], tensors: Sequence[Tensor], tangents: Sequence[Any]
) -> list:
    """Return the tangents of the first outputs of ``base``, each attached to those inputs ``wrt``
    that require grad and it is not linear in, or a zero was multiplied with."""
    every = tuple([i for i, t in enumerate(tensors) if t.requires_grad])
    if not every or not torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return list(tangents)
    if current() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        return list(tangents)
    given = tuple([i for i in every if i in wrt])
    others = tuple([i for i in every if i not in wrt])
    bent = base.once(("bent", given), lambda: [bent_outputs(base, (i,)) for i in given])
    left = base.once(("left", tuple(wrt), others), lambda: left_out(base, wrt, others))
    found = []
    for k, (t, places) in enumerate(zip(tangents, left, strict=False)):
        if isinstance(t, Tensor) and t.is_floating_point():
            if by := [*(i for i, curved in zip(given, bent, strict=True) if curved[k]), *places]:
                t = Constant.apply(t, *[tensors[i] for i in by])
        found.append(t)
    return found


def bent_outputs(program: Program, wrt: tuple[int, ...]) -> list[bool]:
    """Return which outputs depend on ``wrt`` by an op not linear in its arguments."""
    inputs = program.placeholders
    bent: set[Any] = set()
    active = active_nodes(program.graph.nodes, [inputs[i] for i in wrt], zeros=True)
    for n in active:
        if n.op == "call_function" and (
            not straight(n, active) or not bent.isdisjoint(sources(n))
        ):
            bent.add(n)
    return [o in bent for o in program.outputs]


#: ops that are linear where one argument is active; a sum of two active values may be the
#: derivative of a product
SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.neg.default)


def straight(n: Node, active: Mapping[Node, None]) -> bool:
    """Return whether a node is linear, by all that is known, in what the function computed."""
    if not isinstance(n.target, OpOverload):
        return n.target is operator.getitem
    entry = entry_for(n.target)
    if n.target in SUMS:
        return sum(a in active for a in n.args) == 1
    return bool(entry.linear) and not entry.bilinear


def left_out(program: Program, wrt: Sequence[int], others: Sequence[int]) -> list[list[int]]:
    """Return, for each output, the inputs ``others`` that its tangent by ``wrt`` depends on if
    tangents that are zero are values like any other, and only then."""
    if not others:
        return [[] for _ in program.outputs]
    theirs, ours = (tangents_read(program, wrt, others, zeros) for zeros in (True, False))
    return [sorted(a - b) for a, b in zip(theirs, ours, strict=True)]


def tangents_read(
    program: Program, wrt: Sequence[int], others: Sequence[int], zeros: bool
) -> list[set[int]]:
    """Return which ``others`` each tangent depends on; ``zeros``: which zeros, too."""
    nodes, inputs = program.graph.nodes, program.placeholders
    values = {inputs[i]: {i} for i in others}
    for n in active_nodes(nodes, list(values), zeros=True):
        if n.op == "call_function":
            values[n] = set().union(*[values[a] for a in sources(n) if a in values])
    tangents: dict[Any, set[int]] = {inputs[i]: set() for i in wrt}
    for n in active_nodes(nodes, list(tangents), zeros=zeros):
        if n.op == "call_function":
            of = [a for a in sources(n) if a in tangents]
            read = [values[a] for a in factors_read(n, of) if a in values]
            flat = isinstance(n.target, OpOverload) and entry_for(n.target).zero
            tangents[n] = set() if flat else set().union(*[tangents[a] for a in of], *read)
    return [tangents.get(o, set()) for o in program.outputs]


def factors_read(n: Node, active: Sequence[Node]) -> list[Node]:
    """Return the arguments that a node's derivative by the ``active`` ones reads."""
    if n.target is operator.getitem or n.target in SUMS:
        return []
    entry = entry_for(n.target) if isinstance(n.target, OpOverload) else None
    if entry is None or not entry.linear:
        return [*sources(n)]
    if entry.jointly:
        return []
    return [a for a in sources(n) if len(active) > 1 or a is not active[0]]


class Constant(torch.autograd.Function):
    """A value with a derivative of zero by others."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:  # type: ignore[override]
        ctx.zeros = [(o.shape, {"dtype": o.dtype, "device": o.device}) for o in others]
        return value.detach()  # autograd refuses writes to views of inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        return g, *[torch.zeros(shape, **how) for shape, how in ctx.zeros]

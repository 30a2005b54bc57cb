"""Tangents that are the same at every point, of primals that require grad: as torch.func's they
require grad, with a gradient of zeros, so that ``hessian(f)(x).sum().backward()`` works where
``f`` is quadratic."""

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
    """Return the tangents of the first outputs of ``base``, constant ones attached to the inputs
    ``wrt`` that require grad. Sums, views and other linear ops leave a tangent detached."""
    given = tuple(i for i in wrt if tensors[i].requires_grad)
    if not given or not torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return list(tangents)
    if current() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        return list(tangents)
    bent = base.once(("bent", given), lambda: bent_outputs(base, given))
    return [
        Constant.apply(t, *[tensors[i] for i in given])
        if yes and isinstance(t, Tensor) and t.is_floating_point() and not t.requires_grad
        else t
        for t, yes in zip(tangents, bent, strict=False)
    ]


def bent_outputs(program: Program, wrt: tuple[int, ...]) -> list[bool]:
    """Return which outputs depend on the inputs ``wrt`` by an op that is not linear in all of its
    arguments together."""
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


class Constant(torch.autograd.Function):
    """A value with a derivative of zero by others."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:  # type: ignore[override]
        ctx.zeros = [(o.shape, {"dtype": o.dtype, "device": o.device}) for o in others]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:  # type: ignore[override]
        return None, *[torch.zeros(shape, **how) for shape, how in ctx.zeros]

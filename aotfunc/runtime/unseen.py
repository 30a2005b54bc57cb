"""Results of a branch, a compiled call's own, on which the caller registers hooks: autograd sees
the branch as one op, and not what it saves of its results or computes from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..capture.switch import Switch
from ..errors import AotfuncError
from ..graph import Program, op_of
from .meetings import behind, is_saved

aten = torch.ops.aten


class Unseen(NamedTuple):
    """Of one result: whether its own op saves it, and the ``others`` that are computed from it."""

    saved: bool
    others: frozenset[int]


def unseen_results(program: Program, live: Sequence[bool]) -> dict[int, Unseen]:
    """Return the live results of branches with something that autograd does not see."""
    places = {
        (op_of(o), o.args[1]): k
        for k, (o, yes) in enumerate(zip(program.outputs, live, strict=True))
        if yes and isinstance(op_of(o).target, Switch)
    }
    found: dict[int, Unseen] = {}
    for (op, j), k in places.items():
        saved, others = False, set[int]()
        for body in op.target.bodies:
            mine = copied_value(body.outputs[j])
            if isinstance(mine, Node) and mine.op == "call_function":
                saved = saved or is_saved(mine, {*body.graph.nodes})
                each = [
                    (i, copied_value(body.outputs[i])) for (m, i) in places if m is op and i != j
                ]
                others.update([places[op, i] for i, o in each if o is mine or mine in behind([o])])
        if saved or others:
            found[k] = Unseen(saved, frozenset(others))
    return found


def copied_value(n: Any) -> Any:
    """Return the value that a branch has copied to memory of its own."""
    return copied_value(n.args[0]) if isinstance(n, Node) and n.target is aten.clone.default else n


def watched(t: Tensor) -> OrderedDict:
    """Return the dictionary of the hooks that the caller will register on a result."""
    if t._backward_hooks is None:
        t._backward_hooks = OrderedDict()
    return t._backward_hooks


def check_hooks(ctx: Any, outs: Sequence[int]) -> None:
    """Refuse a backward of the results ``outs`` of a node where hooks would see more in eager."""
    for k, hooks in ctx.watched.items():
        unseen = ctx.halves.unseen[k]
        again = unseen.saved and k in outs and torch.is_grad_enabled()
        if hooks and (again or not unseen.others.isdisjoint(outs)):
            raise AotfuncError(
                f"a hook was registered on a result of a branch (cond, switch) in "
                f"{ctx.halves.call.__name__}, of shape {list(ctx.halves.vals[k].shape)}, from "
                "which the branch computes another result, or its second derivative "
                "(create_graph=True): register the hook on y.clone(), or inside of the branch"
            )

"""Results of which autograd does not see, when it has one node for several ops, that an op saves
them or computes another result from them: those of branches and loops, and of un-jitted
transforms. The caller's hooks on them would not act there."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from types import UnionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..capture.calls import CompiledCall
from ..capture.makers import UNREAD, made_in, maker
from ..capture.series import Loop
from ..capture.switch import Switch
from ..errors import AotfuncError
from ..graph import Program, op_of
from ..transforms.unhooked import inner_programs
from .meetings import behind, is_saved

aten = torch.ops.aten


class Unseen(NamedTuple):
    """Of one result: whether its own op saves it, and the ``others`` that are computed from it."""

    saved: bool
    others: frozenset[int]


def unseen_in_flow(
    program: Program, live: Sequence[bool], kinds: type | UnionType = Switch | Loop
) -> dict[int, Unseen]:
    """Return the live results of branches and loops, or nodes of other ``kinds`` with programs,
    with something that autograd does not see."""
    places = {
        (op_of(o), o.args[1]): k
        for k, o, yes in [*zip(itertools.count(), program.outputs, live)][::-1]
        if yes and isinstance(o, Node) and isinstance(op_of(o).target, kinds)
    }
    found: dict[int, Unseen] = {}
    for (op, j), k in places.items():
        saved, others = False, set[int]()
        loop = isinstance(op.target, Loop)
        if loop and j >= op.target.n_carry:
            continue  # a stack of what the steps return
        names = getattr(op.target, "made", ())[j : j + 1]
        for body in (op.target.body,) if loop else inner_programs(op.target):
            mine = copied_value(body.outputs[j])
            if isinstance(mine, Node) and mine.op == "call_function":
                if names and maker(mine) not in names:
                    continue  # another op makes it in eager mode
                saved = saved or is_saved(mine, {*body.graph.nodes})
                each = [
                    (i, copied_value(body.outputs[i])) for (m, i) in places if m is op and i != j
                ]
                others.update([places[op, i] for i, o in each if o is mine or mine in behind([o])])
        if saved or others:
            found[k] = Unseen(saved, frozenset(others))
    return found


def unseen_in_transform(program: Program) -> dict[int, Unseen]:
    """Return the results of a program that is one node with something that autograd does not see,
    and would in eager mode, where the same op makes the result."""
    outs, nodes = program.outputs, {*program.graph.nodes}
    results = {k: o for k, o in enumerate(outs) if isinstance(o, Node) and o.op == "call_function"}
    live = [k in results for k in range(len(outs))]
    found = unseen_in_flow(program, live, Switch | Loop | CompiledCall)
    for k, name in enumerate(made_in(program)):
        if k not in results or maker(o := outs[k]) != name or name == UNREAD:
            found.pop(k, None)
            continue
        after = {i for i, r in results.items() if r is not o and o in behind([r])}
        saved, others = found.get(k, (is_saved(o, nodes), frozenset()))
        if saved:  # the gradients pass it, though a partition may compute it again
            after |= {i for i, made in enumerate(made_in(program)) if made == UNREAD}
        if saved or after or others:
            found[k] = Unseen(saved, others | after)
    return found


def copied_value(n: Any) -> Any:
    """Return the value that a branch has copied to memory of its own."""
    return copied_value(n.args[0]) if isinstance(n, Node) and n.target is aten.clone.default else n


class Watched:
    """The hooks that the caller will register on a result, ``retain_grad()`` among them."""

    def __init__(self, t: Tensor) -> None:
        if t._backward_hooks is None:  # make the dictionary, and let autograd know it
            t.register_hook(lambda g: None).remove()
        self.hooks, self.result, self.shape = t._backward_hooks, weakref.ref(t), list(t.shape)

    def __bool__(self) -> bool:
        t = self.result()
        return bool(self.hooks) or (t is not None and t.retains_grad)

    def refuse(self, name: str) -> None:
        if self:
            raise AotfuncError(
                f"a hook was registered on a result of a branch (cond, switch), loop or transform "
                f"in {name}, of shape {self.shape}, from which another result is computed there, "
                "or its second derivative (create_graph=True): register the hook on y.clone(), or "
                "inside of it"
            )


def check_hooks(
    watched: dict[int, Watched], unseen: dict[int, Unseen], outs: Sequence[int], name: str
) -> None:
    """Refuse a backward of the results ``outs`` of a node where hooks would see more in eager."""
    for k, hooks in watched.items():
        again = unseen[k].saved and k in outs and torch.is_grad_enabled()
        if again or not unseen[k].others.isdisjoint(outs):
            hooks.refuse(name)


def guard(results: Sequence[Tensor], tensors: Sequence[Any], name: str) -> None:
    """Refuse a backward of ``tensors`` if hooks are registered on ``results``, which eager would
    pass there."""
    watched = [Watched(t) for t in results if t.__class__ is Tensor and t.grad_fn is not None]

    def check(_: Any) -> None:
        for hooks in watched:
            hooks.refuse(name)

    for t in tensors if watched else ():
        if t.__class__ is Tensor and t.grad_fn is not None:
            t.grad_fn.register_prehook(check)

"""Where the cotangents of a second derivative meet.

The backward of a user's Function need not be linear: ``g.clamp(-1, 1)`` must get the sum of all
cotangents. Under a second derivative those come from two nodes of autograd, the call and its
gradient. So a call has the results of such Functions among its own, its gradient reads them there,
and autograd adds."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..capture.calls import CompiledCall
from ..capture.custom_derivative import CustomDerivative, Later, RuleProgram
from ..graph import Program, needed_for
from ..trace.emit import Builder, paused_gc, remap
from ..trace.marks import once
from ..trace.nested import leaves
from ..transforms.activity import active_nodes, has_derivative
from ..transforms.rules.table import entry_for
from ..transforms.tidy import rebuilt

aten = torch.ops.aten


class Meeting(CustomDerivative):
    """``(result, the same one as autograd knows it) -> that``; the cotangent goes to the first."""

    hooked = True

    def __init__(self, val: Any) -> None:
        super().__init__("meeting", 1, (val,), (), None, (), None)

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        return [n.args[0]], [g[0]]


def opened(program: Program) -> Program:
    """Return the program without nested calls in which cotangents meet."""

    def nested(n: Node) -> Program:
        return n.target.program.flat()  # type: ignore[union-attr]

    def inside(n: Node) -> bool:
        if not isinstance(n.target, CompiledCall):
            return False
        return any(bent(m.target) or inside(m) for m in nested(n).graph.nodes)

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        args = remap(n.args, env)
        if n.target is operator.getitem:
            return b.item(*args)
        return b.inlined(opened(nested(n)), args) if inside(n) else b.call_like(n, env)

    if not any(map(inside, program.graph.nodes)):
        return program
    return rebuilt(program, program.name, visit, Builder(None, merge=False))


def meetings(program: Program, wrt: Sequence[int], live: Sequence[bool]) -> list[Node]:
    """Return the results of Functions on the way from the inputs ``wrt`` to live results, whose
    backward is not linear, and which something inside reads, that backward among it."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    found = {n for n in calls if bent(n.target)}
    if not found:
        return []
    links = {n.target.link for n in found if hasattr(n.target, "link")}
    found |= {n for n in calls if getattr(n.target, "link", None) in links}
    active = active_nodes(calls, [program.placeholders[i] for i in wrt], zeros=True)
    needed = needed_for(calls, [o for o, yes in zip(program.outputs, live, strict=True) if yes])
    return [
        u
        for u in calls
        if u.target is operator.getitem
        and u.args[0] in found
        and u in active
        and u in needed
        and has_derivative(u.meta["val"])
        and is_read(u)
    ]


def is_read(u: Node) -> bool:
    """Return whether a node, or the backward of the Function whose result it is, reads this."""
    n, i = u.args
    return i in n.target.saved or any(r.op != "output" for r in u.users)  # type: ignore


def with_results(program: Program, nodes: Sequence[Node]) -> Program:
    """Return the program with the values of these nodes as further results."""
    with paused_gc():
        b = Builder(None, merge=False)
        env = dict(zip(program.placeholders, b.inputs(program.placeholders), strict=True))
        b.copy(program.graph.nodes, env)
        outs = remap([*program.outputs, *nodes], env)
        return Program(b.finish(outs), program.n_inputs, len(outs), (), program.name)


def as_known(program: Program, nodes: Sequence[Node]) -> Program:
    """Return the program with the values of these nodes as further inputs, where autograd adds up
    their cotangents; :func:`parted` ends it after the reverse walk."""

    with paused_gc():
        b = Builder(None, merge=False)
        env = dict(zip(program.placeholders, b.inputs(program.placeholders), strict=True))
        given = dict(zip(nodes, b.inputs(nodes), strict=True))
        for n in program.graph.nodes:
            b.copy([n], env)
            if n in given:
                val = n.meta["val"]
                node = b.make("call_function", Meeting(val), (env[n], given[n]), {}, (val,))
                env[n] = b.item(node, 0)
        outs = remap(program.outputs, env)
        count = len(program.placeholders) + len(nodes)
        return Program(b.finish(outs), count, len(outs), (), program.name)


def parted(program: Program) -> Program:
    """Return the program with the values themselves where cotangents have met."""

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        return [remap(n.args[1], env)] if isinstance(n.target, Meeting) else NotImplemented

    return rebuilt(program, program.name, visit)


# ----- what is linear ----------------------------------------------------------------------------


def bent(target: Any) -> bool:
    """Return whether this is a derivative of the user's that is not linear, by all that is
    known: hooks of a module get the gradients of its inputs and outputs together."""
    if getattr(target, "hooks", None):
        return True
    return isinstance(target, CustomDerivative) and any(map(is_bent, target.rules))


def is_bent(rule: Any) -> bool:
    rule = rule.part() if isinstance(rule, Later) else rule
    if not isinstance(rule, RuleProgram):
        return False  # an error
    program = rule.program
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    if any(n.target is once for n in calls):
        return False  # there is no second derivative
    moved = set(program.placeholders[: len(program.placeholders) - rule.n_residuals])
    for n in calls:
        if not moved.isdisjoint(n._input_nodes):
            if not is_linear(n, moved):
                return True
            moved.add(n)
    return any(isinstance(o, Node) and o not in moved for o in program.outputs)


SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.neg.default)
QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
PARTS = (operator.getitem, aten.detach.default)


def is_linear(n: Node, moved: set[Node]) -> bool:
    """Return whether a node is linear in the ``moved`` ones that it reads together."""
    op: Any = n.target
    if op in PARTS:
        return True
    if op in SUMS:
        return all(a in moved for a in n.args[:2])
    if op is aten.where.self:
        return n.args[0] not in moved and all(a in moved or is_zero(a) for a in n.args[1:])
    if not isinstance(op, OpOverload):
        return False
    places = [i for i, a in enumerate(n.args) if not moved.isdisjoint(leaves(a))]
    if op in QUOTIENTS or op.__name__.split(".")[0].endswith("_backward"):
        return places == [0]
    rules = entry_for(op)
    whole = not rules.jointly or len(places) == len(rules.linear)
    return whole and rules.linear_in(places) and moved.issuperset(leaves(n.args[places[0]]))


def is_zero(n: Any) -> bool:
    if not isinstance(n, Node):
        return n == 0
    made = {aten.full.default: 1, aten.scalar_tensor.default: 0}.get(n.target)
    return n.target is aten.zeros.default or (made is not None and n.args[made] == 0)

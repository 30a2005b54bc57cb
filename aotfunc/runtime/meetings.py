"""Where the cotangents of a second derivative meet.

The backward of a user's Function need not be linear: ``g.clamp(-1, 1)`` must get the sum of all
cotangents. Under a second derivative those come from two nodes of autograd, the call and its
gradient. So a call has the results of such Functions among its own, its gradient reads them there,
and autograd adds."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..capture.calls import CompiledCall
from ..capture.custom_derivative import CustomDerivative, Later, RuleProgram
from ..capture.makers import maker, op_name
from ..graph import Program, needed_for, op_of
from ..trace.emit import Builder, mergeable, paused_gc, remap
from ..trace.marks import dead_end, hidden_write, once
from ..trace.nested import leaves
from ..transforms.activity import active_nodes, has_derivative, sources
from ..transforms.rules.table import entry_for
from ..transforms.tidy import rebuilt
from ..transforms.unhooked import inner_programs
from .chain_steps import saved_results

aten = torch.ops.aten


class Meeting(CustomDerivative):
    """``(result, the same one as autograd knows it) -> that``; the cotangent goes to the first."""

    hooked = stays = True
    name, n_values = "meeting", 1  # the last value gets the cotangent

    def __init__(self, val: Any) -> None:
        super().__init__(self.name, self.n_values, (val,), (), None, (), None)

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        return [n.args[self.n_values - 1]], [g[0]]


class Known(Meeting):
    """``(result, the same one as autograd knows it, that) -> that``; the cotangent goes there. The
    derivative of the op's other results reads it, though the program may not."""

    name, n_values = "known", 2


def without_meetings(program: Program) -> Program:
    """Return the program without nested calls in which cotangents meet, or results are kept."""

    def nested(n: Node) -> Program:
        return n.target.program.flat()  # type: ignore[union-attr]

    def inside(n: Node, outs: Sequence[Any]) -> bool:
        if not isinstance(n.target, CompiledCall):
            return False
        whole = nested(n)
        shown = [whole.outputs[u.args[1]] for u in n.users if u in outs]  # type: ignore
        nodes = whole.graph.nodes
        kept = [o for o in shown if isinstance(o, Node) and o.op == "call_function"]
        return any(bent(m.target) or inside(m, shown) for m in nodes) or any(
            is_saved(o, set(nodes)) for o in kept
        )

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        args = remap(n.args, env)
        if n.target is operator.getitem:
            return b.item(*args)
        if inside(n, program.outputs):
            return b.inlined(without_meetings(nested(n)), args)
        return b.call_like(n, env)

    if not any(inside(n, program.outputs) for n in program.graph.nodes):
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
    saved = getattr(n.target, "saved", ())  # type: ignore[union-attr]
    return i in saved or any(r.op != "output" for r in u.users)


class KeptResult(NamedTuple):
    """A result that second derivatives read: its ``value`` in the program, and what it has in
    common with the other results of its op, ``(op, how many results before it are the same)``."""

    value: Node
    group: tuple[Node, int]


def as_known(
    program: Program,
    further: Sequence[Node],
    known: Sequence[int] = (),
    keeping: Mapping[int, KeptResult] | None = None,
) -> Program:
    """Return the program with ``further`` results, and with the values of the results ``known`` as
    further inputs, where autograd adds up their cotangents; :func:`parted` ends it after the
    reverse walk. A result of an op has the op to itself: other values may have been merged with
    it."""
    with paused_gc():
        b, every, keeping = Builder(None, merge=False), [*program.outputs, *further], keeping or {}
        env = dict(zip(program.placeholders, b.inputs(program.placeholders), strict=True))
        given = dict(zip(known, b.inputs([every[k] for k in known]), strict=True))
        results = {k: keeping[k].value if k in keeping else every[k] for k in known}
        inside = {n: k for k, n in results.items() if not mergeable(op_of(n).target)}

        def meet(x: Node, k: int) -> Node:
            val = x.meta["val"]
            return b.item(b.make("call_function", Meeting(val), (x, given[k]), {}, (val,)), 0)

        for n in program.graph.nodes:
            b.copy([n], env)
            if n in inside:
                env[n] = meet(env[n], inside[n])
        outs = remap(every, env)
        ops: dict[Any, Any] = {}
        for k, n in results.items():
            if n not in inside:
                op = op_of(n)
                if keeping[k].group not in ops:
                    ops[keeping[k].group] = b.call_like(op, env)
                mine = ops[keeping[k].group]
                outs[k] = meet(mine if op is n else b.item(mine, n.args[1]), k)
        count = len(program.placeholders) + len(known)
        return Program(b.finish(outs), count, len(outs), (), program.name)


def kept_results(
    program: Program,
    wrt: Sequence[int],
    live: Sequence[bool],
    met: Sequence[Node],
    made: Sequence[str],
) -> dict[int, KeptResult]:
    """Return the live results, ``made`` by these ops, that are saved, or among ``met``."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    active = active_nodes(calls, [program.placeholders[i] for i in wrt], zeros=True)
    found: dict[int, KeptResult] = {}
    for k, (n, yes, name) in enumerate(zip(program.outputs, live, made, strict=False)):
        if not (yes and n in active and n.op == "call_function"):
            continue
        if n.target is aten.clone.default and name != op_name(n.target):
            n = n.args[0]  # two results that are merged have memory of their own
        if maker(n) == name and (n in met or is_saved(n, active)):
            same = sum(n is other.value for other in found.values())
            found[k] = KeptResult(n, (op_of(n), same))
    return found


def unhooked_value(n: Node) -> Node:
    """Return the value that the recorded hooks change into this one."""
    op: Any = op_of(n)
    if not getattr(op.target, "hooked", False):
        return n
    return unhooked_value(op.target.parts(op)[0][n.args[1]])


def is_saved(n: Node, active: Container[Node]) -> bool:
    """Return whether the op, or the Function, that computes a value keeps it for its derivative
    by the ``active`` ones of its arguments."""
    n = unhooked_value(n)
    op = op_of(n)
    i = 0 if op is n else n.args[1]
    if isinstance(op.target, CustomDerivative):
        return i in op.target.saved
    return i in saved_results(op, active)


def parted(program: Program) -> Program:
    """Return the program with the values themselves where cotangents have met."""

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        if n.target.__class__ is not Meeting:
            return NotImplemented
        x, known = unhooked_value(n.args[0]), env[n.args[1]]  # type: ignore[arg-type, index]
        op = op_of(x)
        if op is x or all(getattr(r.target, "hooked", False) for u in op.users for r in u.users):
            return [known]
        (val,) = n.target.vals
        return b.make("call_function", Known(val), (env[x], known, known), {}, (val,))

    return rebuilt(program, program.name, visit)


# ----- what is linear ----------------------------------------------------------------------------


def bent(target: Any) -> bool:
    """Return whether this is a derivative of the user's not known to be linear, or holds one: a
    module's hooks get the gradients of inputs and outputs together."""
    if getattr(target, "hooks", None):
        return True
    if isinstance(target, CustomDerivative):
        return any(map(is_bent, target.rules))
    return any(map(has_bent, inner_programs(target)))


def has_bent(program: Program) -> bool:
    """Return whether a program, its bodies or nested calls have such a derivative."""

    def find() -> bool:
        return any(bent(n.target) for n in program.graph.nodes if n.op == "call_function")

    return program.once(has_bent, find)


def bent_nodes(program: Program, bodies: bool) -> list[Node]:
    """Return the nodes that are such derivatives, or contain one; only those with ``bodies``."""

    def find() -> list[Node]:
        calls = [n for n in program.graph.nodes if n.op == "call_function" and bent(n.target)]
        return [n for n in calls if not (bodies and isinstance(n.target, CustomDerivative))]

    return program.once((bent_nodes, bodies), find)


def reaches_bent(
    program: Program, wrt: Sequence[int], outs: Sequence[int], bodies: bool = False
) -> bool:
    """Return whether gradients of ``outs`` by ``wrt`` pass through :func:`bent_nodes`."""

    def find() -> bool:
        nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        active = active_nodes(nodes, [program.placeholders[i] for i in wrt], zeros=True)
        mine = behind([program.outputs[k] for k in outs])
        return any(n in active and is_reached(n, mine) for n in bent_nodes(program, bodies))

    if not bent_nodes(program, bodies):
        return False
    return program.once((reaches_bent, *wrt, None, *outs, bodies), find)


def behind(outs: Sequence[Node]) -> set[Node]:
    """Return the nodes that the derivatives of ``outs`` pass through."""
    found, queue = set[Node](), [*outs]
    while queue:
        n = queue.pop()
        if n not in found and n.target not in (aten.detach.default, dead_end):
            found.add(n)
            queue += n.args[1:2] if isinstance(n.target, Known) else sources(n)  # type: ignore
    return found


def is_reached(n: Node, needed: Container[Node]) -> bool:
    """Return whether such a derivative is behind the ``needed`` results of a node."""
    target: Any = n.target
    if not hasattr(target, "reading"):
        return n in needed
    read = {u.args[1] for u in n.users if u in needed}
    return bool(read) and bent(target.reading(read)[0])


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
        if is_given(n, moved):
            moved.add(n)
        elif isinstance(n.target, CustomDerivative):
            continue  # its results are what it is given
        elif n.users and not moved.isdisjoint(n._input_nodes):  # a check has none
            if not is_linear(n, moved):
                return True
            moved.add(n)
    return any(isinstance(o, Node) and o not in moved for o in program.outputs)


def is_given(n: Node, moved: set[Node]) -> bool:
    """Return whether a user's derivative, given a ``moved`` value, makes this node."""
    op: Any = op_of(n)
    if op is n or not isinstance(op.target, CustomDerivative):
        return False
    return op.target.parts(op)[0][n.args[1]] in moved


SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.neg.default)
QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
PARTS = (operator.getitem, aten.detach.default)
#: ops that are linear in one argument, without a rule that says so: its place
ALONE = {
    aten._linalg_solve_ex.default: 1,
    aten.linalg_solve_triangular.default: 1,
    aten.cholesky_solve.default: 0,
}
#: ops that put a value into the first argument: where the value is
FILLS = {
    aten.masked_fill.Scalar: 2,
    aten.masked_fill.Tensor: 2,
    aten.index_fill.int_Scalar: 3,
    aten.scatter.value: 3,
    aten.constant_pad_nd.default: 2,
}


def is_linear(n: Node, moved: set[Node]) -> bool:
    """Return whether a node is linear in the ``moved`` ones that it reads together."""
    op: Any = n.target
    if op in PARTS:
        return True
    if op in (*SUMS, hidden_write):
        return all(a in moved or is_zero(a) for a in n.args[:2])
    if op is aten.where.self:
        return n.args[0] not in moved and all(a in moved or is_zero(a) for a in n.args[1:])
    if not isinstance(op, OpOverload):
        return False
    places = [i for i, a in enumerate(n.args) if not moved.isdisjoint(leaves(a))]
    if op in QUOTIENTS or op.__name__.split(".")[0].endswith("_backward"):
        return places == [0]
    if op in FILLS:
        return places == [0] and all(map(is_zero, n.args[FILLS[op] :][:1]))
    if op in ALONE:
        return places == [ALONE[op]]
    if op is aten.convolution.default:
        return places in ([0], [1]) and n.args[2] is None
    rules = entry_for(op)
    whole = not rules.jointly or all(i in places or is_zero(n.args[i]) for i in rules.linear)
    return whole and rules.linear_in(places) and moved.issuperset(leaves(n.args[places[0]]))


def is_zero(n: Any) -> bool:
    if not isinstance(n, Node):
        return n == 0
    if n.target is aten.masked_fill.Scalar:
        return is_zero(n.args[0]) and is_zero(n.args[2])
    made = {aten.full.default: 1, aten.scalar_tensor.default: 0}.get(n.target)
    return n.target is aten.zeros.default or (made is not None and n.args[made] == 0)

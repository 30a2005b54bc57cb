"""The backward of a loop that keeps few of its steps, as one node of a graph: it recomputes the
others.

Its derivatives are nodes of its kind. With the Jacobian ``J`` of the loop it is ``Jᵀa``, for
cotangents ``a``, and ``<v, Jᵀa> = <a, Jv>``: so its pull along ``v`` is the backward of the loop
that carries the tangents ``v``. As second derivatives are symmetric, so is its tangent.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import at
from ..errors import RuleError
from ..graph import Program, size
from ..partition.ops import TRUSTED
from ..trace.emit import Builder, paused_gc
from ..trace.marks import fail, no_tangent
from ..trace.views import laid_out
from ..transforms.lower import CALLS, lowered
from ..transforms.vjp import vjp
from ..transforms.walk import builder, filled_node
from .bodies import Flow, as_planned, dense, emit_flow, results_as
from .custom_derivative import CustomDerivative
from .one_by_one import one_by_one
from .revolve import backwards
from .scan import own_memory

if TYPE_CHECKING:
    from .while_loop import While

aten = torch.ops.aten


class Unwind(Flow):
    """The target of a node ``(steps, constants, carry, cotangents) -> cotangents``: those of the
    inputs ``wrt`` of ``loop``, for those of its last carry, after ``steps`` steps from
    ``carry``."""

    __name__ = "unwind"

    def __init__(
        self, loop: While, wrt: Sequence[int], bodies: Sequence[Program] | None = None
    ) -> None:
        self.loop, self.wrt = loop, tuple(wrt)
        self.carries = [i for i in wrt if i >= loop.n_consts]
        self.bodies = tuple(bodies or (*loop.bodies, backward_step(loop, self.wrt)))

    def __repr__(self) -> str:
        *_, body, back = self.bodies
        count = size(body.graph) + size(back.graph)
        return f"<unwind of {self.loop.slots} slots: {body.signature}, {count} nodes>"

    @property
    def vals(self) -> tuple:
        sigs = [p.meta["val"] for p in self.loop.body.placeholders]
        return tuple([dense(sigs[i]) for i in self.wrt])

    @property
    def draws(self) -> bool:
        """Return False: loops whose steps draw are refused, and no condition is run again."""
        return False

    def with_bodies(self, bodies: Sequence[Program]) -> Unwind:
        return Unwind(self.loop, self.wrt, bodies)

    def reading(self, read: set[int]) -> tuple[Unwind, list[int]]:
        return self, list(range(len(self.wrt)))

    def parts(self, args: Sequence[Any]) -> tuple[Any, list, list]:
        """Return its arguments as ``(steps, inputs of the loop, cotangents)``."""
        last = 1 + len(self.loop.body.placeholders)
        return args[0], list(args[1:last]), list(args[last:])

    def run(self, bodies: Sequence[Callable], tensors: Sequence[Tensor]) -> list[Tensor]:
        _, body, back = bodies
        n, planned = self.loop.n_consts, [p.meta["val"] for p in self.bodies[2].placeholders]
        steps, inputs, given = self.parts(tensors)
        inputs = list(map(as_planned, inputs, planned))
        consts, start = inputs[:n], inputs[n:]
        sums = [torch.zeros_like(inputs[i]) for i in self.wrt if i < n]
        found = [*sums, *map(as_planned, given, planned[len(planned) - len(given) :])]

        def visit(carry: Sequence[Tensor]) -> None:
            found[:] = back(*consts, *carry, *found)

        count = max(steps.flatten().tolist(), default=0)  # each sample stops at its own step
        slots = self.loop.slots
        assert slots is not None
        backwards(count, slots, start, lambda carry: body(*consts, *carry), visit)
        return own_memory(self.bodies[2], found) if count else [x.clone() for x in found]

    def form(self, args: Sequence[Any]) -> tuple[list, dict[str, Any]]:
        steps, inputs, given = self.parts(args)
        n, loop = self.loop.n_consts, self.loop
        options = {"wrt": list(self.wrt), "max_steps": loop.max_steps, "slots": loop.slots}
        return [steps, inputs[:n], inputs[n:], given], options

    # ----- as a node -----------------------------------------------------------------------------

    def live(self, n: Node, active: Any) -> list[bool]:
        return [True] * len(self.wrt)

    def flat(self, n: Node) -> list[Node]:
        return []

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        """Carry tangents along the cotangents given. Those of the results are the cotangents of
        the ``cotangents``; the loop's own backward has those of its inputs."""
        self.check_rules(n, symmetric=False)
        _, inputs, given = self.parts(n.args)
        steps, values, cts = self.parts(again.args)
        dual = Dual(b, self.loop, values, {self.wrt[j]: ct for j, ct in g.items()})
        pushed = dual.results()
        read = [i for i, a in enumerate(inputs) if a in active]
        found = dual.unwound(steps, read, dual.of_tangents(self.carries, cts))
        args = [*[inputs[i] for i in read], *given]
        return args, [*[found.get(i) for i in read], *[pushed.get(i) for i in self.carries]]

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        """Go back through the loop that also carries tangents; or, if only cotangents have some,
        through the same loop along these."""
        _, inputs, given = self.parts(n.args)
        steps, values, cts = self.parts(new.args)
        ts = {i: tangents[a] for i, a in enumerate(inputs) if a in tangents}
        of_cts = {
            i: tangents[a] for i, a in zip(self.carries, given, strict=True) if a in tangents
        }
        if not ts:
            found = emit_unwind(b, self.loop, self.wrt, steps, values, of_cts)
        else:
            self.check_rules(n, symmetric=True)
            dual = Dual(b, self.loop, values, ts)
            of_cts = {dual.places[i]: t for i, t in of_cts.items()}
            of_cts |= dual.of_tangents(self.carries, cts)
            found = dual.unwound(steps, self.wrt, of_cts)
        return [found.get(i) for i in self.wrt]

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        """Go back through the loop of the batch; each sample has cotangents of its own."""
        if walk.maps and walk.has(n.args[0]):
            return one_by_one(walk, n)
        _, inputs, given = self.parts(n.args)
        met = [walk.has(a) or i in self.wrt for i, a in enumerate(inputs)]
        loop, args, _ = self.loop.batched(walk, inputs, met)
        cts = dict(zip(self.carries, map(walk.expanded, given), strict=True))
        found = emit_unwind(walk.b, loop, self.wrt, walk.env[n.args[0]], args, cts)
        return [found[i] for i in self.wrt], [True] * len(self.wrt)

    def check_rules(self, n: Node, symmetric: bool) -> None:
        """Refuse derivatives of the backward if the condition draws, or if a rule of the user's
        may differ from the transpose of another, or, for ``symmetric`` second derivatives, from
        the derivative."""
        if self.loop.draws:
            raise RuleError(
                "a second derivative of while_loop(checkpoint='revolve') whose condition draws "
                f"random numbers{at(n.meta.get('line'))}: the loop of tangents would draw others; "
                "draw them before the loop, and let it read them"
            )
        body = self.loop.body
        rule = body.once((own_rule, symmetric), lambda: own_rule(body, symmetric))
        if rule:
            raise RuleError(
                f"a second derivative of while_loop(checkpoint='revolve'){at(n.meta.get('line'))} "
                f"goes through {rule}, whose own rule need not have the derivative of what it "
                "belongs to: say while_loop(..., max_steps=…) without checkpoint"
            )


class Dual:
    """A loop that carries tangents beside its values: ``ts`` by number of argument."""

    def __init__(
        self, b: Builder, loop: While, args: Sequence[Node], ts: Mapping[int, Node]
    ) -> None:
        self.b, self.n_values = b, len(loop.vals)
        self.loop, self.args, self.wrt = loop.dual(b, args, ts)
        n = loop.n_consts
        shift = self.loop.n_consts - n
        #: input of the loop -> its position here; carried input -> the position of its tangent
        self.places = {i: i if i < n else i + shift for i in range(len(args))}
        carried = [i for i in self.wrt if i >= n]
        first = self.loop.n_consts + self.n_values
        self.tangents = {i: first + j for j, i in enumerate(carried)}

    def results(self) -> dict[int, Node]:
        """Return the tangents after the loop, by number of the input that is carried."""
        outs = emit_flow(self.b, self.loop, self.args)
        return {i: outs[place - self.loop.n_consts] for i, place in self.tangents.items()}

    def of_tangents(self, carries: Sequence[int], cts: Sequence[Node]) -> dict[int, Node]:
        """Return the cotangents of the carried values as those of their tangents."""
        pairs = zip(carries, cts, strict=True)
        return {self.tangents[i]: ct for i, ct in pairs if i in self.tangents}

    def unwound(
        self, steps: Node, read: Sequence[int], cts: Mapping[int, Node]
    ) -> dict[int, Node]:
        """Return the cotangents of the inputs ``read`` of the loop."""
        wanted = {self.places[i]: i for i in read}
        found = emit_unwind(self.b, self.loop, wanted, steps, self.args, cts)
        return {wanted[place]: ct for place, ct in found.items() if place in wanted}


def emit_unwind(
    b: Builder,
    loop: While,
    given: Collection[int],
    steps: Node,
    args: Sequence[Node],
    cts: Mapping[int, Node],
) -> dict[int, Node]:
    """Add the backward of a loop from ``args``; return the cotangents by number of argument, of
    those ``given`` and of what is carried, for the cotangents ``cts`` of results, numbered as the
    inputs that they are next."""
    target = Unwind(loop, loop.derivative([i in given for i in range(len(args))]))
    sigs = [dense(p.meta["val"]) for p in loop.body.placeholders]
    last = [
        laid_out(b, cts[i], sigs[i], exactly=True) if i in cts else filled_node(b, 0, sigs[i])
        for i in target.carries
    ]
    return dict(zip(target.wrt, emit_flow(b, target, [steps, *args, *last]), strict=True))


def backward_step(loop: While, wrt: tuple[int, ...]) -> Program:
    """Return ``(constants, carry, sums, cotangents) -> (sums, cotangents)`` for one step: add to
    ``sums`` the cotangents of the constants, and map the cotangents of the new carry to those of
    the old one."""

    def make() -> Program:
        n, inputs = loop.n_consts, loop.body.placeholders
        joint = vjp(loop.body, wrt, [n + j in wrt for j in range(len(loop.vals))])
        sigs = [dense(inputs[i].meta["val"]) for i in wrt]
        with paused_gc():
            b = builder()
            values = b.inputs(inputs)
            given = [b.placeholder("sum" if i < n else "ct", s) for i, s in zip(wrt, sigs)]
            cts = [x for i, x in zip(wrt, given, strict=True) if i >= n]
            grads = b.inlined(joint, [*values, *cts])[joint.n_outputs - len(wrt) :]
            outs = []
            for i, x, grad, sig in zip(wrt, given, grads, sigs, strict=True):
                if grad is None:
                    outs.append(x if i < n else filled_node(b, 0, sig))
                else:
                    outs.append(b.call(aten.add.Tensor, x, grad) if i < n else grad)
            program = Program(b.finish(outs), len(inputs) + len(wrt), len(wrt), (), "backward")
        return results_as(program, sigs)

    return loop.body.once(("backward step", loop.n_consts, wrt), make)


def own_rule(body: Program, symmetric: bool) -> str:
    """Return the name of an op in a body with rules of the user's for both modes, or, if
    ``symmetric``, for any mode; else "". Hooks act on cotangents alone, so forward mode is no
    transpose of theirs."""
    for n in lowered(body, CALLS).graph.nodes:
        target: Any = n.target
        if n.op != "call_function" or target is operator.getitem:
            continue
        if isinstance(target, OpOverload):
            own = target in (no_tangent, fail) or (symmetric and target.namespace not in TRUSTED)
        elif isinstance(target, CustomDerivative):
            own = symmetric or target.forward is not None or target.hooked
        else:
            inner = getattr(target, "bodies", None)
            own = inner is None or any(own_rule(p, symmetric) for p in inner)
        if own:
            return n.name
    return ""

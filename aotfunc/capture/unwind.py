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
from ..graph import Program, n_ops
from ..partition.ops import TRUSTED
from ..trace.emit import Builder, paused_gc
from ..trace.marks import fail, no_tangent
from ..trace.shapes.sig import Sig
from ..trace.views import laid_out
from ..transforms.activity import live
from ..transforms.lower import CALLS, lowered
from ..transforms.vjp import vjp
from ..transforms.vmap import inserted, with_dim_moved
from ..transforms.walk import builder, filled_node
from .bodies import Flow, as_planned, dense, drawn, emit_flow, own_memory, results_as
from .custom_derivative import CustomDerivative
from .revolve import backwards
from .series import Tangents

if TYPE_CHECKING:
    from .scan import Scan
    from .while_loop import While

aten = torch.ops.aten

#: loops that keep values of every step
WITHOUT = {"scan": "scan(...)", "while_loop": "while_loop(..., max_steps=…)"}


class Unwind(Flow):
    """The target of a node ``(steps, constants, carry, stacks, cotangents) -> cotangents``: those
    of the inputs ``wrt`` of ``loop``, for those of its results ``given``, after ``steps`` steps
    from ``carry``."""

    __name__ = "unwind"

    def __init__(
        self, loop: While | Scan, wrt: Sequence[int], bodies: Sequence[Program] | None = None
    ) -> None:
        self.loop, self.wrt = loop, tuple(wrt)
        n, k, flags = loop.n_consts, loop.n_carry, live(loop.body, self.wrt)
        self.given = [j for j, yes in enumerate(flags) if (n + j in wrt if j < k else yes)]
        #: how many of the results are sums or cotangents of the carry, not stacks
        self.n_kept = sum(i < n + k for i in wrt)
        self.bodies = tuple(bodies or (*loop.bodies, backward_step(loop, self.wrt, self.given)))

    def __repr__(self) -> str:
        *_, body, back = self.bodies
        count = n_ops(body.graph) + n_ops(back.graph)
        return f"<unwind of {self.loop.slots} slots: {body.signature}, {count} nodes>"

    @property
    def vals(self) -> tuple:
        sigs = loop_sigs(self.loop, [p.meta["val"] for p in self.loop.body.placeholders])
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
        *_, body, back = bodies
        loop, planned = self.loop, [p.meta["val"] for p in self.bodies[-1].placeholders]
        n, last = loop.n_consts, loop.n_consts + loop.n_carry
        steps, inputs, given = self.parts(tensors)
        count = max(steps.flatten().tolist(), default=0)  # each sample stops at its own step
        inputs[:last] = map(as_planned, inputs[:last], planned)
        consts, start, rows = inputs[:n], inputs[n:last], inputs[last:]
        k = sum(j < loop.n_carry for j in self.given)
        sums = [torch.zeros_like(inputs[i]) for i in self.wrt if i < n]
        found = [*sums, *map(as_planned, given[:k], planned[len(inputs) + len(sums) :])]
        stacks = [torch.empty_like(inputs[i]) for i in self.wrt[self.n_kept :]]

        def at(t: int, stacks: Sequence[Tensor]) -> list[Tensor]:
            return [x[count - 1 - t if loop.reverse else t] for x in stacks]

        def advance(state: tuple) -> tuple:
            t, carry = state
            return t + 1, body(*consts, *carry, *at(t, rows))[: loop.n_carry]

        def visit(state: tuple) -> None:
            t, carry = state
            outs = back(*consts, *carry, *at(t, rows), *found, *at(t, given[k:]))
            found[:] = outs[: self.n_kept]
            for row, ct in zip(at(t, stacks), outs[self.n_kept :], strict=True):
                row.copy_(ct)

        assert loop.slots is not None
        backwards(count, loop.slots, (0, start), advance, visit)
        kept = own_memory(self.bodies[-1], found) if count else [x.clone() for x in found]
        return [*kept, *stacks]

    def form(self, args: Sequence[Any]) -> tuple[list, dict[str, Any]]:
        steps, inputs, given = self.parts(args)
        groups, options = self.loop.form(inputs)
        return [steps, *groups, given], {"wrt": list(self.wrt), **options}

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
        dual = Tangents(b, self.loop, values, {self.wrt[j]: ct for j, ct in g.items()})
        pushed = dual.emit()
        read = [i for i, a in enumerate(inputs) if a in active]
        found = unwound(b, dual, steps, read, self.of_tangents(dual, cts))
        args = [*[inputs[i] for i in read], *given]
        return args, [*[found.get(i) for i in read], *[pushed[j] for j in self.given]]

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        """Go back through the loop with tangents; if only cotangents have some, along these."""
        _, inputs, given = self.parts(n.args)
        steps, values, cts = self.parts(new.args)
        ts = {i: tangents[a] for i, a in enumerate(inputs) if a in tangents}
        of_cts = {j: tangents[a] for j, a in zip(self.given, given, strict=True) if a in tangents}
        if not ts:
            found = emit_unwind(b, self.loop, self.wrt, steps, values, of_cts)
        else:
            self.check_rules(n, symmetric=True)
            dual = Tangents(b, self.loop, values, ts)
            of_cts = {dual.results[j][0]: t for j, t in of_cts.items()}
            of_cts |= self.of_tangents(dual, cts)
            found = unwound(b, dual, steps, self.wrt, of_cts)
        return [found.get(i) for i in self.wrt]

    def of_tangents(self, dual: Tangents, cts: Sequence[Node]) -> dict[int, Node]:
        """Return the cotangents of the results as those of their tangents."""
        pairs = zip(self.given, cts, strict=True)
        return {place: ct for j, ct in pairs if (place := dual.results[j][1]) is not None}

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        """Go back through the loop of the batch; each sample has cotangents of its own."""
        if walk.maps and walk.has(n.args[0]):
            return self.loop.one_by_one(walk, n)  # type: ignore[union-attr]  # no scan's differ
        b, k, last = walk.b, self.loop.n_carry, self.loop.n_consts + self.loop.n_carry
        _, inputs, given = self.parts(n.args)
        met = [walk.has(a) or i in self.wrt for i, a in enumerate(inputs)]
        loop, args, _ = self.loop.batched(walk, inputs, met)
        cts = {
            j: ct if j < k else with_dim_moved(b, ct, 0, 1)
            for j, ct in zip(self.given, map(walk.expanded, given), strict=True)
        }
        found = emit_unwind(b, loop, self.wrt, walk.env[n.args[0]], args, cts)
        outs = [found[i] if i < last else with_dim_moved(b, found[i], 1, 0) for i in self.wrt]
        return outs, [True] * len(self.wrt)

    def check_rules(self, n: Node, symmetric: bool) -> None:
        """Refuse derivatives of the backward if the condition draws, or a user's rule may not be
        another's transpose or, for ``symmetric`` second ones, the derivative."""
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
                f"a second derivative of {self.loop.__name__}(checkpoint='revolve')"
                f"{at(n.meta.get('line'))} goes through {rule}, whose own rule need not have the "
                "derivative of what it belongs to: say "
                f"{WITHOUT[self.loop.__name__]} without checkpoint"
            )


def pull_unwinding(
    b: Builder, n: Node, g: Mapping[int, Node], active: Any, again: Any, steps: Node
) -> tuple[list, list]:
    """Add the backward of the loop ``n`` of so many ``steps``; return its arguments and their
    cotangents. Raises RuleError for one that draws."""
    loop: Any = n.target
    if drawn(loop.body):
        raise RuleError(
            f"reverse mode through {loop.__name__}(checkpoint='revolve') that draws random "
            f"numbers{at(n.meta.get('line'))}: steps that are computed again would draw "
            "others; draw them before the loop, and let it read them"
        )
    given = [i for i, a in enumerate(n.args) if a in active]
    found = emit_unwind(b, loop, given, steps, again.args, g)
    moved = changed(loop, found)
    return [n.args[i] for i in moved], [found[i] for i in moved]


def unwound(
    b: Builder, dual: Tangents, steps: Node, read: Sequence[int], cts: Mapping[int, Node]
) -> dict[int, Node]:
    """Return the cotangents of the inputs ``read`` of the loop without tangents."""
    wanted = {dual.places[i][0]: i for i in read}
    found = emit_unwind(b, dual.loop, wanted, steps, dual.args, cts)
    return {wanted[place]: found[place] for place in changed(dual.loop, found) if place in wanted}


def emit_unwind(
    b: Builder,
    loop: While | Scan,
    given: Collection[int],
    steps: Node,
    args: Sequence[Node],
    cts: Mapping[int, Node],
) -> dict[int, Node]:
    """Add the backward of a loop from ``args``; return the cotangents by number of argument, of
    those ``given`` and of what is carried, for the cotangents ``cts`` of results, by number."""
    target = Unwind(loop, loop.derivative([i in given for i in range(len(args))])[0])
    sigs = [dense(v) for v in loop.vals]
    last = [
        laid_out(b, cts[j], sigs[j], exactly=True) if j in cts else filled_node(b, 0, sigs[j])
        for j in target.given
    ]
    return dict(zip(target.wrt, emit_flow(b, target, [steps, *args, *last]), strict=True))


def changed(loop: While | Scan, wrt: Collection[int]) -> list[int]:
    """Return the inputs of ``wrt`` without the constants on which no step depends: their sums
    stay as they are."""
    outs = Unwind(loop, tuple(wrt)).bodies[-1].outputs
    return [i for i, o in zip(wrt, outs, strict=True) if o.op != "placeholder"]


def loop_sigs(loop: While | Scan, sigs: Sequence[Sig]) -> list[Sig]:
    """Return the signatures of the loop's arguments, of which ``sigs`` says those of one step."""
    last = loop.n_consts + loop.n_carry
    length: Any = loop.length
    return [sig if i < last else inserted(sig, 0, length) for i, sig in enumerate(sigs)]


def backward_step(loop: While | Scan, wrt: tuple[int, ...], given: Sequence[int]) -> Program:
    """Return ``(constants, carry, row, sums, cotangents) -> (sums, cotangents)`` for one step: add
    to ``sums`` the cotangents of the constants, and map the cotangents of the results to those of
    the carry and of the row."""

    def make() -> Program:
        n, inputs, vals = loop.n_consts, loop.body.placeholders, loop.body.vals
        joint = vjp(loop.body, wrt, [j in given for j in range(len(vals))])
        sigs = [dense(inputs[i].meta["val"]) for i in wrt]
        with paused_gc():
            b = builder()
            values = b.inputs(inputs)
            sums = {i: b.placeholder("sum", s) for i, s in zip(wrt, sigs, strict=True) if i < n}
            cts = [b.placeholder("ct", dense(vals[j])) for j in given]
            grads = b.inlined(joint, [*values, *cts])[joint.n_outputs - len(wrt) :]
            outs = []
            for i, grad, sig in zip(wrt, grads, sigs, strict=True):
                if grad is None:
                    outs.append(sums[i] if i < n else filled_node(b, 0, sig))
                else:
                    outs.append(b.call(aten.add.Tensor, sums[i], grad) if i < n else grad)
            count = len(values) + len(sums) + len(cts)
            program = Program(b.finish(outs), count, len(wrt), (), "backward")
        return results_as(program, sigs)

    return loop.body.once(("backward step", loop.n_consts, loop.n_carry, wrt), make)


def own_rule(body: Program, symmetric: bool) -> str:
    """Return an op in a body with rules of the user's for both modes (``symmetric``: any), by
    name, or "". Hooks act on cotangents alone: forward mode is no transpose of theirs."""
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

"""The derivative that a user wrote for an ``autograd.Function``, as a graph node.

Such a node passes values through and marks them as having the derivative that it says. The
Function's ``backward`` (and ``jvp``) are recorded with it (see :mod:`.function_rules`), as
programs of the cotangents (tangents) and of what the context saved. So a custom derivative is
itself a graph: transformed like any other, to any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import AotfuncError, CaptureError, OpError
from ..graph import Program
from ..trace.emit import Builder, remap
from ..trace.marks import fail, number_of
from ..transforms.hooked_rules import behind_hooks
from ..transforms.vjp import reverse
from ..transforms.vmap import inserted, vmap
from ..transforms.walk import filled_node, output, unknown

aten = torch.ops.aten


class RuleProgram(NamedTuple):
    """A recorded rule: a program of given values and ``n_residuals`` from ``first`` on."""

    program: Program
    first: int
    n_residuals: int


class Later:
    """A RuleProgram recorded on demand: a backward may apply its own Function."""

    def __init__(self, make: Callable[[], Any], first: int, n_residuals: int) -> None:
        self.make, self.first, self.n_residuals = make, first, n_residuals
        self.made: Any = None

    def part(self) -> Any:
        """Return the program, or the error that recording it raised."""
        if self.made is None:
            self.made, self.make = self.make(), None  # type: ignore[assignment]
        return self.made


def depend(unknowns: Sequence[Node], results: Sequence[Any]) -> bool:
    """Return whether a transpose reads values that only a map that is not linear asks for."""
    seen, queue = set(unknowns), list(unknowns)
    while queue:
        new = [user for user in queue.pop().users if user not in seen]
        seen.update(new)
        queue += new
    return not seen.isdisjoint(r for r in results if r is not None)


class CustomDerivative:
    """The target of a node ``(inputs, values, residuals) -> outputs``: the values, with a
    derivative of the user's.

    ``backward`` maps the pattern of cotangents that are there (None: any, absent ones as zeros) to
    a RuleProgram ``(cotangents, residuals) -> gradients of the inputs``, or to the error that
    recording it raised; ``forward`` is one ``(tangents, residuals) -> tangents``, an error or
    None.
    ``saved[k]`` is the output that residual k is, or None. ``batching`` is the Function's own
    :class:`~aotfunc.capture.own_rule.OwnRule`, and the node's last arguments are its
    operands. ``narrow`` is ``(mask, backward)``, recorded for where only inputs of the mask need a
    gradient. ``unguarded`` are the residuals that autograd would let be written to until the
    backward reads them."""

    #: autograd takes the result for the first input: an op that saves the input saves the result
    hooked = False

    def __init__(
        self,
        name: str,
        n_inputs: int,
        vals: tuple,
        backward: tuple,
        forward: RuleProgram | Later | Exception | None,
        saved: tuple,
        batching: Any,
        narrow: tuple[tuple[bool, ...], tuple] | None = None,
        unguarded: tuple[int, ...] = (),
    ) -> None:
        self.__name__, self.n_inputs, self.vals, self.n_outputs = name, n_inputs, vals, len(vals)
        self.backward: dict[Any, Any] = dict(backward)
        self.forward, self.saved, self.batching, self.narrow = forward, saved, batching, narrow
        self.unguarded = unguarded

    def __call__(self, *args: Tensor) -> tuple:
        return args[self.n_inputs : self.n_inputs + self.n_outputs]

    @property
    def rules(self) -> list:
        """Return all rules that were recorded of the user's backward."""
        return [*self.backward.values(), *(p for _, p in (self.narrow[1] if self.narrow else ()))]

    dissolved_with = "customs"

    def inline(self, b: Builder, args: Sequence[Any], inner: Callable[[Program], Program]) -> list:
        return list(args[self.n_inputs : self.n_inputs + self.n_outputs])

    def parts(self, n: Node) -> tuple[list, list, list]:
        i, o = self.n_inputs, self.n_inputs + self.n_outputs
        return list(n.args[:i]), list(n.args[i:o]), list(n.args[o:])

    def backward_for(self, wanted: Sequence[bool]) -> dict[Any, Any]:
        """Return the backward for gradients of these inputs."""
        if self.narrow is not None and all(
            m or not w for m, w in zip(self.narrow[0], wanted, strict=True)
        ):
            return dict(self.narrow[1])
        return self.backward

    def part(self, backward: dict[Any, Any], have: tuple[bool, ...]) -> RuleProgram | Exception:
        """Return the program for these cotangents, or what the user's backward raised."""
        part = backward.get(have, backward.get(None))
        if part is None:
            raise CaptureError(f"{self.__name__} has no backward")
        part = part.part() if isinstance(part, Later) else part
        if is_ours(part):
            raise part
        return part

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        inputs, _, _ = self.parts(n)
        _, _, residuals = self.parts(again)
        residuals = [
            r if k is None else behind_hooks(b, output(b, n, k), output(b, again, k))
            for r, k in zip(residuals, self.saved, strict=True)
        ]
        if not self.backward and (forward := self.forward_rule()) is not None:
            return inputs, self.transposed_forward(b, forward, g, inputs, active, residuals)
        places = [i for i, v in enumerate(self.vals) if v.differentiable]
        have = tuple(i in g for i in places)
        backward = self.backward_for([x in active for x in inputs])
        part = self.part(backward, have)
        if isinstance(part, Exception):
            return inputs, failing(b, part, g, inputs)
        if have in backward:
            cts = [g[i] for i in places if i in g]
        else:
            cts = [g[i] if i in g else filled_node(b, 0, self.vals[i]) for i in places]
        return inputs, splice_rule(b, part, cts, residuals)

    def forward_rule(self) -> RuleProgram | None:
        """Return the user's jvp, if there is one; raises what recording it raised."""
        forward = self.forward.part() if isinstance(self.forward, Later) else self.forward
        if isinstance(forward, Exception):
            raise forward
        return forward

    def transposed_forward(
        self,
        b: Builder,
        forward: RuleProgram,
        g: dict[int, Node],
        inputs: list,
        active: Any,
        residuals: list,
    ) -> list:
        """Return the cotangents by the transpose of the jvp, which is linear in the tangents."""
        tangents = {
            x: unknown(b, x.meta["val"]) if x in active else filled_node(b, 0, x.meta["val"])
            for x in inputs
            if x.meta["val"].differentiable
        }
        wanted = [x for x in tangents if x in active]
        outs = splice_rule(b, forward, [tangents[x] for x in inputs if x in tangents], residuals)
        pairs = [(outs[i], g[i]) for i in g if isinstance(outs[i], Node)]
        back = reverse(
            b, [o for o, _ in pairs], [c for _, c in pairs], [tangents[x] for x in wanted]
        )
        if depend([tangents[x] for x in wanted], back):
            raise CaptureError(
                f"reverse mode of {self.__name__} is the transpose of its forward rule, which is "
                "not linear in the tangents; state a reverse rule (defvjp), too"
            )
        found = dict(zip(wanted, back, strict=True))
        return [found.get(x) for x in inputs]

    def zeros(self, b: Builder) -> dict[int, Node] | None:
        """Return the cotangents that the backward gets if autograd calls it without any."""
        if None not in self.backward:
            return None
        return {i: filled_node(b, 0, v) for i, v in enumerate(self.vals) if v.differentiable}

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        inputs, _, residuals = self.parts(n)
        residuals = [
            remap(r, env) if k is None else b.item(new, k)
            for r, k in zip(residuals, self.saved, strict=True)
        ]
        if (forward := self.forward_rule()) is not None:
            ts = [
                tangents[x] if x in tangents else filled_node(b, 0, x.meta["val"])
                for x in inputs
                if x.meta["val"].differentiable
            ]
            return splice_rule(b, forward, ts, residuals)
        # the transpose of the backward, which is linear in the cotangents
        diff = [v for v in self.vals if v.differentiable]
        part = self.part(self.backward_for([x in tangents for x in inputs]), (True,) * len(diff))
        if isinstance(part, Exception):
            raise part
        dummies = [unknown(b, v) for v in diff]
        grads = splice_rule(b, part, dummies, residuals)
        pairs = [
            (gr, tangents[x])
            for gr, x in zip(grads, inputs, strict=True)
            if isinstance(gr, Node) and x in tangents
        ]
        back = reverse(b, [p[0] for p in pairs], [p[1] for p in pairs], dummies)
        if depend(dummies, back):
            raise CaptureError(
                f"forward mode of {self.__name__} is the transpose of its backward, which is not "
                "linear in the cotangents; state a forward rule (defjvp, or jvp of a Function), "
                "or use reverse mode alone: jacrev(jacrev(f)) is a Hessian, too"
            )
        found = iter(back)
        return [next(found) if v.differentiable else None for v in self.vals]

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        b = walk.b
        inputs, raw, residuals = self.parts(n)
        if self.batching is not None:
            operands = n.args[len(n.args) - len(self.batching.operands.places) :]
            return self.batching(walk, operands, n.meta.get("line"))
        new = [walk.expanded(a) for a in (*inputs, *raw)]
        flags = [walk.has(r) for r in residuals]
        rest = [remap(r, walk.env) for r in residuals]

        def batched(part: Any) -> Any:
            if isinstance(part, Later):
                return Later(lambda: batched(part.part()), part.first, part.n_residuals)
            if not isinstance(part, RuleProgram):
                return part
            program, here = part.program, slice(part.first, part.first + part.n_residuals)
            given = program.placeholders[: len(program.placeholders) - part.n_residuals]
            dims = [0] * len(given) + [0 if yes else None for yes in flags[here]]
            sigs = [
                *(inserted(p.meta["val"], 0, walk.size) for p in given),
                *(r.meta["val"] for r in rest[here]),
            ]
            outs = [0 if isinstance(o, Node) else None for o in program.outputs]
            whole = Program(program.graph, len(dims), program.n_outputs, (), program.name)
            return RuleProgram(
                vmap(whole, dims, sigs, walk.axis, outs), part.first, part.n_residuals
            )

        d = self.batched(walk, tuple(x.meta["val"] for x in new[len(inputs) :]), batched)
        return b.make("call_function", d, (*new, *rest), {}, d.vals), [True] * self.n_outputs

    def batched(self, walk: Any, vals: tuple, batched: Callable[[Any], Any]) -> CustomDerivative:
        """Return the same derivative with each part ``batched``."""
        each = lambda backward: tuple((have, batched(part)) for have, part in backward)
        narrow = (self.narrow[0], each(self.narrow[1])) if self.narrow is not None else None
        backward, forward = each(self.backward.items()), batched(self.forward)
        return type(self)(
            self.__name__, self.n_inputs, vals, backward, forward, self.saved, None, narrow
        )


def is_ours(part: Any) -> bool:
    """Return whether an error is ours, raised at once; the backward raises the user's."""
    return isinstance(part, AotfuncError) and not isinstance(part, OpError)


def failing(b: Builder, error: Exception, g: dict[int, Node], inputs: Sequence[Node]) -> list:
    """Return gradients of ``inputs`` that raise an error if the cotangents ``g`` are there."""
    never = b.call(aten.sum.default, b.call(fail, next(iter(g.values())), number_of(error)))
    if never.meta["val"].dtype.is_complex:
        never = b.call(aten.abs.default, never)
    return [
        b.call(aten.add.Tensor, filled_node(b, 0, x.meta["val"]), never)
        if x.meta["val"].differentiable
        else None
        for x in inputs
    ]


def splice_rule(
    b: Builder, part: RuleProgram, given: Sequence[Node], residuals: Sequence[Node]
) -> list:
    """Put a rule's program into the builder, and return its results."""
    inputs = [*given, *residuals[part.first : part.first + part.n_residuals]]
    return b.inlined(part.program, inputs)

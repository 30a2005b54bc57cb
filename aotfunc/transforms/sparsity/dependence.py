"""Find which elements of a result depend on which elements of an input, by the graph.

Each value of the graph has a Boolean matrix, a row for each of its elements and a column for each
element of the input. An elementwise op joins the rows of its arguments. An op that is linear in an
argument is run on numbers that name elements: where it moves, sums up or leaves out elements, the
results say which. Others have rules (:mod:`.along`, :mod:`.products`, :mod:`.windows`), or keep
the samples of a batch apart; of any other op every element depends on all that its arguments
do."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ...graph import Program, draws
from ...trace.marks import hidden_write
from ...trace.nested import leaves, mapped
from ...trace.shapes.sig import contiguous_stride
from ..activity import active_nodes
from ..apart import part_rule_for
from ..apart.parts import Mixed, OpCall, Part, Walk
from ..lower import CALLS, lowered
from ..rules.schema import call_op, full_args, tensor_args
from ..rules.table import entry_for
from ..vjp import vjp
from . import windows  # noqa: F401
from .along import ALONG, LIKE, NORMALISED, slices
from .pattern import Pattern, in_groups, joined, named_rows, picks, selection_pattern, shared, tags
from .products import RULES


def dependence(program: Program, wrt: int, tensors: Sequence[Tensor]) -> tuple[Pattern, set[int]]:
    """Return the pattern of the Jacobian of a program's result by its input ``wrt``, and the
    arguments whose values it depends on. Rules of the user's may have another Jacobian than their
    functions: then it is the transpose of the cotangents' pattern."""
    program, n = lowered(program, CALLS), program.n_inputs
    if not any(getattr(m.target, "dissolved_with", "") == "customs" for m in program.graph.nodes):
        found = Dependence(program, wrt, tensors)
        return found.of(found.outputs[0]), found.read
    joint = vjp(program, [wrt], fill=True, keep=(), recompute=False)
    sig = joint.placeholders[n].meta["val"]
    given = [*tensors[:n], torch.zeros(sig.shape, dtype=sig.dtype), *tensors[n:]]
    found = Dependence(joint, n, given)
    return found.of(found.outputs[0]).T, {i - (i > n) for i in found.read}


class Dependence:
    """The patterns of a program's values by its input ``wrt``, for arguments ``tensors``."""

    def __init__(self, program: Program, wrt: int, tensors: Sequence[Tensor]) -> None:
        program = lowered(program, frozenset({"calls", "customs"}))
        self.placeholders, self.outputs = program.placeholders, program.outputs
        self.values: dict[Node, Any] = dict(zip(self.placeholders, tensors, strict=True))
        self.input = self.placeholders[wrt]
        self.count = self.input.meta["val"].numel
        self.active = active_nodes(program.graph.nodes, [self.input])
        #: what depends on random numbers: a value that no other run repeats, so it is never read
        self.drawn: set[Node] = set()
        for n in program.graph.nodes:
            if n.op == "call_function" and (draws(n) or not self.drawn.isdisjoint(n._input_nodes)):
                self.drawn.add(n)
        self.patterns: dict[Any, Pattern] = {}
        #: the arguments whose values the pattern depends on: indices, and factors with zeros
        self.read: set[int] = set()

    def of(self, n: Any) -> Pattern:
        """Return the pattern of a value, with a row for each of its elements."""
        if n not in self.patterns:
            self.patterns[n] = self.found(n)
        return self.patterns[n]

    def found(self, n: Any) -> Pattern:
        if not isinstance(n, Node) or n not in self.active:
            rows = n.meta["val"].numel if isinstance(n, Node) else 1
            return sparse.csr_array((rows, self.count), dtype=bool)
        if n is self.input:
            return sparse.eye_array(self.count, dtype=bool, format="csr")
        if n.target is hidden_write:
            return self.of(n.args[0])
        call, item = n.args if n.target is operator.getitem else (n, None)
        if not isinstance(call.target, OpOverload):
            return self.everything(call, n)
        op, args = call.target, full_args(call.target, call.args, call.kwargs)
        if op in LIKE:
            op, count = LIKE[op]
            args = full_args(op, tuple(args[:count]), {})
        moving = [a for a in leaves(args) if isinstance(a, Node) and a in self.active]
        rules = entry_for(op)
        if rules.elementwise or torch.Tag.pointwise in op.tags:
            return joined([named_rows(a, n) @ self.of(a) for a in moving])
        if (rule := RULES.get(op)) is not None:
            found = rule(self, n, *args)
            return self.everything(call, n) if found is None else found
        if rules.along or op in ALONG:
            groups, dims = slices(moving[0].meta["val"].shape, args[ALONG.get(op, 1)])
            given, here = tuple(groups.shape), tuple(n.meta["val"].shape)
            kept = tuple(1 if i in dims else k for i, k in enumerate(given))
            numbers = torch.arange(math.prod(kept))
            rows = numbers.view(kept).expand(here) if len(here) == len(given) else numbers
            return in_groups(joined([self.of(a) for a in moving]), groups, rows)
        if op in NORMALISED and (item or 0) < (1 if "backward" in op._schema.name else 3):
            found = self.normalised(n, *NORMALISED[op](*args))
            return self.everything(call, n) if found is None else found
        places = [i for i in tensor_args(op) if any(a in self.active for a in leaves(args[i]))]
        unseen = lambda a: self.hidden(a) or self.strided(op, a)
        if not rules.linear_in(places) or draws(call) or any(map(unseen, leaves(args))):
            return self.everything(call, n)
        parts = [self.linear(op, args, item, a) for a in dict.fromkeys(moving)]
        if any(p is None for p in parts):
            return self.everything(call, n)
        return joined(parts)

    def normalised(
        self, n: Node, full: Any, stats: Any, scales: Any, groups: Tensor, channels: Tensor
    ) -> Pattern | None:
        """Return the pattern of a normalisation or of its statistics; None for others."""

        def rows(some: Sequence[Any], places: Tensor) -> list[Pattern]:
            own = [a for a in some if isinstance(a, Node) and a in self.active]
            if len(places):  # statistics that a mode does not use have no elements
                own = [a for a in own if a.meta["val"].numel]
            return [picks(places, a.meta["val"].numel) @ self.of(a) for a in own]

        size = n.meta["val"].numel
        mixed = [*rows(full, torch.arange(len(groups))), *rows(stats, groups)]
        scaled, whole = rows(scales, channels), size == len(groups)
        if not (whole or (mixed and size == int(groups.max()) + 1)):
            return None
        if len(full) > 1:  # the cotangent is scaled before
            mixed, scaled = mixed + scaled, []
        places = groups if whole else torch.arange(size)
        parts = [in_groups(joined(mixed), groups, places)] if mixed else []
        return joined([*parts, *(scaled if whole else ())])

    def everything(self, call: Node, n: Node) -> Pattern:
        """Return the pattern in which an element depends on all that the elements of an argument
        depend on, or on those of its own sample where the op keeps samples apart."""
        while call.target is operator.getitem:  # an item of a list
            call = call.args[0]  # type: ignore[assignment]
        parts = [sparse.csr_array((n.meta["val"].numel, self.count), dtype=bool)]
        for a in call._input_nodes:
            if a in self.active:
                shapes = a.meta["val"].shape, n.meta["val"].shape
                parts.append(shared(self.of(a), *shapes, self.apart(call, n, a)))
        return joined(parts)

    def apart(self, call: Node, n: Node, a: Node) -> dict[int, int]:
        """Return the dimensions along which an op keeps samples apart, with its result's."""
        target, given = call.target, a.meta["val"]
        found: dict[int, int] = {}
        rule = part_rule_for(target) if isinstance(target, OpOverload) else None
        if rule is None or isinstance(given, tuple):
            return found
        for dim, size in enumerate(given.shape):
            alike = {
                x: Part(dim)
                for x in call._input_nodes
                if x.meta["val"].ndim == given.ndim and x.meta["val"].shape[dim] == size
            }
            for held in (alike, {a: Part(dim)}):
                walk = Walk(size, multiples=False)
                walk.parts = {x: held.get(x) for x in call._input_nodes}
                try:
                    part = rule(OpCall(walk, call))
                except Mixed:
                    continue
                part = part[n.args[1]] if isinstance(part, list) else part  # type: ignore[index]
                if part and part == Part(part.dim) and n.meta["val"].shape[part.dim] == size:
                    found[dim] = part.dim
                    break
        return found

    def linear(self, op: OpOverload, args: list, item: int | None, x: Node) -> Pattern:
        """Return the pattern by ``x`` of an op linear in it; None if it mixes elements."""

        def run(t: Tensor) -> Tensor:
            zero = lambda a: t.new_zeros(a.meta["val"].shape, dtype=tags(a.meta["val"].dtype))
            put = lambda a: (
                tags(a)
                if not isinstance(a, Node)
                else t
                if a is x
                else zero(a)
                if a in self.active
                else self.value(a)
            )
            result = call_op(op, mapped(put, args))
            return result if item is None else result[item]

        try:
            picked = selection_pattern(run, x)
        except RuntimeError:  # it reads memory around the value
            return None
        return None if picked is None else picked @ self.of(x)

    def hidden(self, a: Any) -> bool:
        """Return whether an argument is random, and none that the pattern follows."""
        return a in self.drawn and a not in self.active

    def strided(self, op: OpOverload, a: Any) -> bool:
        """Return whether an op reads memory but a copy's, or autograd derives it wrongly."""
        name = op._schema.name
        if "as_strided" not in name or not isinstance(a, Node):
            return False
        val = a.meta["val"]
        return "scatter" in name or bool(val.stride != contiguous_stride(val.shape))

    def value(self, n: Any) -> Any:
        """Return the value of a node that does not depend on the input, nor on random numbers;
        floating numbers are float64, complex ones complex128."""
        if not isinstance(n, Node):
            return n
        if n.op == "placeholder":
            self.read.add(self.placeholders.index(n))
        if n not in self.values:
            op: Any = n.target
            args = mapped(self.value, list(n.args))
            self.values[n] = op(*args, **{k: self.value(v) for k, v in n.kwargs.items()})
        x = self.values[n]
        return x.to(tags(x.dtype)) if isinstance(x, Tensor) else x

    def nonzero(self, n: Any) -> Any:
        """Return where a factor may be nonzero: all, if it depends on the input or draws."""
        if n in self.active or n in self.drawn:
            return np.ones(n.meta["val"].shape, bool)
        return (self.value(n) != 0).numpy(force=True)

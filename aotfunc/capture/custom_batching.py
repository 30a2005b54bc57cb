"""The batching rule that a user wrote for a function, as a graph node.

Such a node passes the function's results through, with their derivatives. Under ``vmap`` it
becomes the rule's results on the batched arguments.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..debug import Line
from ..graph import Program
from ..trace.emit import Builder
from ..trace.functionalize import Functionalizer
from ..trace.traced import current
from .autograd_function import BEGIN
from .calls import Step, interned
from .own_rule import OwnRule
from .tree import Operands


class CustomBatching:
    """The target of a node ``(results, operands) -> results`` that ``rule``, a function of the
    operands, batches. Of its arguments the ``n_inputs`` results have derivatives."""

    dissolved_with = "customs"

    def __init__(self, name: str, n_results: int, rule: OwnRule) -> None:
        self.__name__, self.n_inputs, self.rule = name, n_results, rule

    def __repr__(self) -> str:
        return f"the batching rule of {self.__name__}"

    def __call__(self, *args: Tensor) -> tuple:
        return args[: self.n_inputs]

    def inline(self, b: Builder, args: Sequence[Any], inner: Callable[[Program], Program]) -> list:
        return list(args[: self.n_inputs])

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        return list(n.args[: self.n_inputs]), [g.get(i) for i in range(self.n_inputs)]

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        return [tangents.get(a) for a in n.args[: self.n_inputs]]

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        return self.rule(walk, n.args[self.n_inputs :], n.meta.get("line"))


class BatchedBy(Step):
    """The end of a function with a batching rule, ``(results, operands) -> results``; a Begin has
    kept the operands from before the function may write to them."""

    def __init__(self, target: CustomBatching, vals: tuple) -> None:
        super().__init__(vals)
        self.target = target

    def emit(self, f: Functionalizer, refs: Sequence[int], grad: bool, line: Line | None) -> None:
        operands, count = f.snapshots.pop(), len(self.outs)
        results = [f.read(r, grad) for r in refs[:count]]
        vals = tuple([r.meta["val"] for r in results])
        node = f.b.make("call_function", self.target, (*results, *operands), {}, vals)
        self.bind(f, [f.b.item(node, i) for i in range(count)], grad)

    def live(self, given: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        return list(given[: len(self.outs)]), []

    def handed(self, refs: Sequence[int]) -> Sequence[int]:
        return refs[len(self.outs) :]

    def run(self, values: list[Tensor]) -> list[Tensor]:
        return values[: len(self.outs)]


def with_batching(args: tuple, rule: Callable, call: Callable[[], tuple[Any, list]]) -> list:
    """Record ``owner, leaves = call()``; return the leaves, batched by ``owner.vmap``, by the
    user's ``rule`` on ``args``. What ``rule`` closes over are operands, too."""
    trace = current()
    assert trace is not None
    closed = closed_over(rule)
    operands = [*Operands(args).tensors, *closed]
    trace.record(BEGIN, operands)
    owner, leaves = call()
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    vals = tuple(trace.ref_of(leaves[i])[1] for i in places)
    own = OwnRule.of(owner, args, closed)
    target = interned(CustomBatching, owner.__name__, len(places), own)
    step = interned(BatchedBy, target, vals)
    results = trace.record(step, [*(leaves[i] for i in places), *operands])
    for i, new in zip(places, results, strict=True):
        leaves[i] = new
    return leaves


def closed_over(f: Callable) -> list[Tensor]:
    """Return the tensors that a function and those of its module that it calls read."""
    tensors: dict[int, Tensor] = {}
    functions = {id(f): f}
    queue: list[Any] = [f]
    while queue:
        g = getattr(g := queue.pop(), "__func__", g)
        if not isinstance(g, types.FunctionType):
            continue
        try:
            cells = inspect.getclosurevars(g)
        except ValueError:  # a variable without a value yet
            continue
        for x in (*cells.nonlocals.values(), *cells.globals.values(), *(g.__defaults__ or ())):
            if isinstance(x, Tensor):
                tensors[id(x)] = x
            elif getattr(x, "__module__", "") == f.__module__ and id(x) not in functions:
                functions[id(x)] = x
                queue.append(x)
    return list(tensors.values())

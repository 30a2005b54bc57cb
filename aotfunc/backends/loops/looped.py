"""Run loops without Python between the steps: if bodies consist of launches, native code
(``loop.cpp``) runs them. Any other loop runs its compiled bodies in Python.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx import Node

from ...graph import output_node
from ...native.fastcall import python_function
from . import native
from .ir import Requirement
from .launch import TENSORS, Launch, bytes_of, native_form
from .matmul import viewed_again
from .tasks import InRange, LaidOut
from .views import VIEWS

LAUNCH, COPY, SHOW, SWITCH, CHECK, LOOP = range(6)

flat = chain.from_iterable

#: most bytes that a loop holds beside its results
MOST = 1 << 25

#: values begin at a cache line of the processor
LINE = 64

#: loop.cpp counts with 64 bits
FOREVER = (1 << 63) - 1


class Unsteady(Exception):
    """Raised for a step that native code cannot run."""


class Step:
    """The slots of a loop's steps. Each holds the address of a value; some values are constants,
    and some have memory of their own."""

    def __init__(self, vals: Sequence[Tensor]) -> None:
        self.vals = list(vals)
        self.constants: dict[int, Tensor] = {}
        self.made: set[int] = set()
        self.buffers = 0

    def slot(self, val: Tensor) -> int:
        self.vals.append(val)
        return len(self.vals) - 1

    def new(self, val: Tensor) -> int:
        """Return the slot of a value that the step makes."""
        slot = self.slot(val)
        self.made.add(slot)
        return slot

    def constant(self, value: Tensor) -> int:
        slot = self.slot(value)
        self.constants[slot] = value
        return slot

    def code(self, graph: fx.Graph | None, inputs: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the instructions of a body, and the slots of its results. Raises Unsteady."""
        if graph is None:
            raise Unsteady
        words: list[int] = []
        at: dict[Node, Any] = {}
        given = iter(inputs)
        for n in graph.nodes:
            if n.op == "placeholder":
                at[n] = next(given)
                if n.users and not alike(n.meta["val"], self.vals[at[n]]):
                    raise Unsteady
            elif n.op == "get_attr":
                at[n] = self.constant(getattr(graph.owning_module, n.target))
            elif n.target is operator.getitem:
                at[n] = at[n.args[0]][n.args[1]]
            elif isinstance(n.target, Launch):
                more, outs = self.launch(n.target, [at[a] for a in n.args])
                words += more
                at[n] = outs if isinstance(n.meta["val"], tuple) else outs[0]
            elif isinstance(n.target, InRange):
                at[n] = at[n.args[0]]
                words += self.check(at[n], n.target.check)
            elif isinstance(n.target, LaidOut):
                at[n] = at[n.args[0]]
            elif (start := start_of_view(n)) is not None:
                at[n] = self.slot(n.meta["val"])
                words += instruction(SHOW, [at[n], at[n.args[0]], start])
            elif n.target in CONSTANTS:
                at[n] = self.constant(n.target(*n.args, **n.kwargs))
            elif hasattr(n.target, "flow"):
                target, bodies = n.target.flow  # type: ignore[union-attr]
                if target.__name__ == "unwind":
                    raise Unsteady
                flow = self.loop if hasattr(target, "n_consts") else self.switch
                more, at[n] = flow(target, list(map(steady, bodies)), [at[a] for a in n.args])
                words += more
            elif n.op != "output":
                raise Unsteady
        return words, [at[o] for o in results_of(graph)]

    def launch(self, target: Launch, inputs: Sequence[int]) -> tuple[list[int], list[int]]:
        kernel, rows, sizes, outputs, order, grain = target.plain.args
        outs = [
            self.new(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))
            for shape, stride, dtype in outputs
        ]
        slots = [*inputs, *outs]
        self.buffers = max(self.buffers, len(order))
        largest = max([self.vals[s].numel() for s in slots])
        grain = grain or max(1, native.GRAIN * rows // max(1, largest))
        divided = grain if rows > grain else 0
        words = [kernel.address, rows, divided, len(order), *[slots[i] for i in order], *sizes]
        return instruction(LAUNCH, words), outs

    def check(self, slot: int, check: Requirement) -> list[int]:
        shape, strides, start = check.window
        low, high = check.low, check.high
        itemsize = self.vals[slot].element_size()
        if itemsize not in (4, 8):
            raise Unsteady
        return instruction(CHECK, [slot, itemsize, low, high, start, len(shape), *shape, *strides])

    def switch(
        self, target: Any, bodies: Sequence[fx.Graph | None], inputs: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        index, *operands = inputs
        itemsize = self.vals[index].element_size()
        if itemsize not in (1, 8):
            raise Unsteady
        outs = [self.new(o.meta["val"]) for o in results_of(bodies[0])]
        branches = []
        for body in bodies:
            words, results = self.code(body, operands)
            for out, s in zip(outs, results, strict=True):
                words += instruction(COPY, [out, s, width(self.vals[out])])
            branches.append(words)
        lengths = [len(words) for words in branches]
        return instruction(SWITCH, [index, itemsize, len(bodies), *lengths, *flat(branches)]), outs

    def loop(
        self, target: Any, bodies: Sequence[fx.Graph | None], inputs: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        *condition, body = bodies
        results = results_of(body)
        assert body is not None
        given = [n.meta["val"] for n in body.find_nodes(op="placeholder")]
        first, k = target.n_consts, target.n_carry
        last = first + k
        length = FOREVER if target.length is None else target.length
        carried, rows = given[first:last], given[last:]
        stacked = [o.meta["val"] for o in results[k:]]
        planned = [*given[:last], *[stack(v, length) for v in rows]]
        if not all(map(alike, planned, [self.vals[s] for s in inputs])) or not all(
            v.is_contiguous() and v.numel() for v in (*carried, *rows, *stacked)
        ):
            raise Unsteady
        own = [self.slot(v) for v in given]
        test, holds = self.code(condition[0], own[:last]) if condition else ([], [-1])
        step, outs = self.code(body, own)
        homes, copies, following = self.placed(outs, own[first:last])
        self.made -= homes.keys()
        ends = [self.new(v) for v in (*carried, *[stack(v, length) for v in stacked])]
        spare = [(self.new(stack(v, 2)), width(v)) for v in carried]
        sizes = [width(v) for v in (*carried, *stacked)]
        words = [first, k, len(rows), len(stacked), length, int(target.reverse), *holds]
        words += [*inputs, own[0], *ends]
        words += [*map(width, rows), *sizes[k:], *flat(spare), *following]
        words += [len(homes), *flat(homes.items())]
        words += [len(copies), *flat([(d, s, sizes[d]) for d, s in copies])]
        words += [len(test), len(step), *test, *step]
        return instruction(LOOP, words), ends

    def placed(
        self, outs: Sequence[int], carried: Sequence[int]
    ) -> tuple[dict[int, int], list[tuple[int, int]], list[int]]:
        """Return ``(homes, copies, following)`` for a step's results, carried ones first: the
        slots written in a result's memory, the results copied from slots, and for each carried
        value the result that replaces it, -1 if it stays."""
        homes: dict[int, int] = {}
        copies: list[tuple[int, int]] = []

        def place(d: int) -> None:
            if outs[d] in self.made and outs[d] not in homes:
                homes[outs[d]] = d
            else:
                copies.append((d, outs[d]))

        for d in range(len(carried), len(outs)):
            place(d)
        following = []
        for d, slot in enumerate(carried):
            if outs[d] != slot and outs[d] not in homes:
                place(d)
            following.append(-1 if outs[d] == slot else homes.get(outs[d], d))
        return homes, copies, following


def results_of(graph: fx.Graph | None) -> Sequence[Node]:
    """Return a body's results. Raises Unsteady for one that is not contiguous."""
    results: Any = graph and output_node(graph).args[0]
    if graph is None or not all(
        isinstance(o, Node) and o.meta["val"].is_contiguous() for o in results
    ):
        raise Unsteady
    return results


def instruction(kind: int, words: Sequence[int]) -> list[int]:
    return [kind, len(words) + 2, *words]


#: ops without tensor arguments
CONSTANTS = frozenset((torch.ops.aten.full.default,))


def steady(body: Any) -> fx.Graph | None:
    """Return the graph of a compiled body that consists of launches."""
    return getattr(body, "steady", None)


def consists_of_launches(graph: fx.Graph) -> bool:
    """Return whether a graph calls only launches and ops of which a step knows the result."""
    return all(
        not isinstance(n.target, OpOverload)
        or n.target in CONSTANTS
        or start_of_view(n) is not None
        for n in graph.nodes
    )


def start_of_view(n: Node) -> int | None:
    """Return how many bytes after its argument a view begins; None if ``n`` is no view, or is not
    contiguous."""
    if n.target not in VIEWS or not n.meta["val"].is_contiguous():
        return None
    [source] = n.all_input_nodes
    val = source.meta["val"]
    base = torch.empty_strided(val.shape, val.stride(), device="meta")
    view = viewed_again(n, source, base)
    if view.untyped_storage()._cdata != base.untyped_storage()._cdata:
        return None
    return view.storage_offset() * val.element_size()


def alike(one: Tensor, other: Tensor) -> bool:
    facts = [(t.shape, t.stride(), t.dtype) for t in (one, other)]
    return facts[0] == facts[1]


def width(val: Tensor) -> int:
    """Return the bytes of a value."""
    return bytes_of(val.shape, val.stride(), val.dtype)


def stack(row: Tensor, count: int) -> Tensor:
    return torch.empty((count, *row.shape), dtype=row.dtype, device="meta")


def looped(target: Any, bodies: Sequence[Callable], plain: Callable) -> Callable:
    """Return ``plain``, which runs control flow with compiled bodies, or native code for loops
    whose steps consist of launches."""
    quick = native_form()
    if quick is None or not hasattr(target, "n_consts"):
        return plain
    try:
        words, constants = packed(target, list(map(steady, bodies)), quick.dtypes)
    except Unsteady:
        return plain
    data = (array("q", words).tobytes(), plain, constants)
    run = python_function(target.__name__, quick.loop, data, __name__)

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        for t in tensors:
            if t.__class__ not in TENSORS or t.is_neg() or t.is_conj():
                return plain(*tensors)
        return run(*tensors)

    return call


def packed(
    target: Any, bodies: Sequence[fx.Graph | None], dtypes: Mapping
) -> tuple[list[int], list[Tensor]]:
    """Return the words of a loop in the format of ``loop.cpp``, and the constants whose addresses
    are among them. Raises Unsteady."""
    if bodies[-1] is None:
        raise Unsteady
    given = [n.meta["val"] for n in bodies[-1].find_nodes(op="placeholder")]
    last = target.n_consts + target.n_carry
    inputs = [*given[:last], *[stack(v, target.length) for v in given[last:]]]
    step = Step(inputs)
    code, ends = step.loop(target, bodies, range(len(inputs)))
    results = [step.vals[s] for s in ends]
    fixed = [(s, c.data_ptr()) for s, c in step.constants.items()]
    memory, size = [], 1
    for s in step.made.difference(ends):
        memory.append((s, size := -(-size // LINE) * LINE))
        size += width(step.vals[s])
    if size > MOST or not all(v.dtype in dtypes for v in results):
        raise Unsteady
    words = [len(step.vals), size, step.buffers, len(inputs), len(results)]
    for v in inputs:
        words += [v.dim(), *v.stride()]
    for s, v in zip(ends, results, strict=True):
        words += [s, dtypes[v.dtype], v.dim(), *v.shape, *v.stride()]
    for pairs in (fixed, memory):
        words += [len(pairs), *flat(pairs)]
    return [*words, len(code), *code], list(step.constants.values())

"""Run loops without Python between the steps: if bodies consist of launches, the loop is printed
as one C++ function, with the kernels inlined, which ``loop.cpp`` calls. Any other loop runs its
compiled bodies in Python.
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

from ...errors import CompilerError
from ...graph import output_node
from ...native.fastcall import python_function
from . import native
from .ir import Requirement
from .launch import TENSORS, Launch, bytes_of, native_form
from .matmul import viewed_again
from .tasks import InRange, LaidOut
from .views import VIEWS

flat = chain.from_iterable

#: most bytes that a loop holds beside its results
MOST = 1 << 25

#: values begin at a cache line of the processor
LINE = 64

#: steps are counted with 64 bits
FOREVER = (1 << 63) - 1


class UnfitStep(Exception):
    """Raised for a step that native code cannot run."""


class LoopStep:
    """The values of a loop's steps, and the C++ that computes them. The address of a value is a
    variable, ``v`` and its slot. Some values are constants, and some have memory of their own."""

    def __init__(self, vals: Sequence[Tensor]) -> None:
        self.vals = list(vals)
        self.constants: dict[int, Tensor] = {}
        self.made: set[int] = set()
        #: text of a kernel that is inlined -> its name
        self.kernels: dict[str, str] = {}
        #: sizes, lengths and addresses, which the text reads from ``numbers``: it is the same for
        #: all of them
        self.numbers: list[int] = []

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

    def number(self, n: int) -> str:
        return f"*({self.array([n])})"

    def array(self, values: Sequence[int]) -> str:
        self.numbers += values
        return f"numbers + {len(self.numbers) - len(values)}"

    def code(self, graph: fx.Graph | None, inputs: Sequence[int]) -> tuple[list[str], list[int]]:
        """Return the statements of a body, and the slots of its results. Raises Unsteady."""
        if graph is None:
            raise UnfitStep
        lines: list[str] = []
        at: dict[Node, Any] = {}
        given = iter(inputs)
        for n in graph.nodes:
            if n.op == "placeholder":
                at[n] = next(given)
                if n.users and not laid_alike(n.meta["val"], self.vals[at[n]]):
                    raise UnfitStep
            elif n.op == "get_attr":
                at[n] = self.constant(getattr(graph.owning_module, n.target))
            elif n.target is operator.getitem:
                at[n] = at[n.args[0]][n.args[1]]
            elif isinstance(n.target, Launch):
                line, outs = self.launch(n.target, [at[a] for a in n.args])
                lines.append(line)
                at[n] = outs if isinstance(n.meta["val"], tuple) else outs[0]
            elif isinstance(n.target, InRange):
                at[n] = at[n.args[0]]
                lines.append(self.check(at[n], n.target.check))
            elif isinstance(n.target, LaidOut):
                at[n] = at[n.args[0]]
            elif (start := start_of_view(n)) is not None:
                at[n] = self.slot(n.meta["val"])
                lines.append(f"v{at[n]} = v{at[n.args[0]]} + {self.number(start)};")
            elif n.target in CONSTANTS:
                at[n] = self.constant(n.target(*n.args, **n.kwargs))
            elif hasattr(n.target, "flow"):
                target, bodies = n.target.flow  # type: ignore[union-attr]
                if target.__name__ == "unwind":
                    raise UnfitStep
                flow = self.loop if hasattr(target, "n_consts") else self.switch
                more, at[n] = flow(target, list(map(launches, bodies)), [at[a] for a in n.args])
                lines += more
            elif n.op != "output":
                raise UnfitStep
        return lines, [at[o] for o in results_of(graph)]

    def launch(self, target: Launch, inputs: Sequence[int]) -> tuple[str, list[int]]:
        kernel, rows, sizes, outputs, order, grain = target.plain.args
        outs = [
            self.new(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))
            for shape, stride, dtype in outputs
        ]
        slots = [*inputs, *outs]
        largest = max([self.vals[s].numel() for s in slots])
        grain = grain or max(1, native.GRAIN * rows // max(1, largest))
        buffers = ", ".join([f"v{slots[i]}" for i in order])
        if rows > grain:
            split = f"{self.number(rows)}, {self.number(grain)}"
            call = f"run.divide((Kernel){self.number(kernel.address)}, {split}"
        elif kernel.text:
            count = "1" if rows == 1 else self.number(rows)
            call = f"{self.inlined(kernel)}(0, {count}"
        else:
            call = f"((Kernel){self.number(kernel.address)})(0, {self.number(rows)}"
        return f"{{ void *const b[] = {{{buffers}}}; {call}, {self.array(sizes)}, b); }}", outs

    def inlined(self, kernel: native.LoadedKernel) -> str:
        """Return the name of the kernel as a function of this source."""
        name = f"{kernel.function.__name__}_{len(self.kernels)}"
        return self.kernels.setdefault(kernel.text, name)

    def check(self, slot: int, check: Requirement) -> str:
        kind = {4: "int32_t", 8: "int64_t"}.get(self.vals[slot].element_size())
        if kind is None:
            raise UnfitStep
        shape, strides, start = check.window
        place = f"(const {kind} *)v{slot} + {self.number(start)}"
        window = f"{len(shape)}, {self.array(shape)}, {self.array(strides)}"
        bounds = f"{self.number(check.low)}, {self.number(check.high)}"
        return f"if (!in_range<{kind}>({place}, {window}, {bounds})) return OUT_OF_RANGE;"

    def switch(
        self, target: Any, bodies: Sequence[fx.Graph | None], inputs: Sequence[int]
    ) -> tuple[list[str], list[int]]:
        index, *operands = inputs
        kind = {1: "bool", 8: "int64_t"}.get(self.vals[index].element_size())
        if kind is None:
            raise UnfitStep
        outs = [self.new(o.meta["val"]) for o in results_of(bodies[0])]
        lines = [f"switch ((int64_t)*({kind} *)v{index}) {{"]
        for i, body in enumerate(bodies):
            branch, results = self.code(body, operands)
            copies = [self.copy(f"v{d}", s) for d, s in zip(outs, results, strict=True)]
            lines += [f"case {i}: {{", *indented([*branch, *copies, "break;"]), "}"]
        return [*lines, "default: return OUT_OF_RANGE;", "}"], outs

    def copy(self, to: str, slot: int) -> str:
        return f"__builtin_memcpy({to}, v{slot}, {self.width(slot)});"

    def width(self, slot: int) -> str:
        val = self.vals[slot]
        return str(width(val)) if has_one_element(val) else self.number(width(val))

    def in_registers(self, ends: Sequence[int]) -> set[int]:
        """Return the slots of numbers that only the text knows: it declares them."""
        return {s for s in self.made.difference(ends) if has_one_element(self.vals[s])}

    def loop(
        self, target: Any, bodies: Sequence[fx.Graph | None], inputs: Sequence[int]
    ) -> tuple[list[str], list[int]]:
        *condition, body = bodies
        results = results_of(body)
        assert body is not None
        given = [n.meta["val"] for n in body.find_nodes(op="placeholder")]
        first, k = target.n_consts, target.n_carry
        last = first + k
        length = FOREVER if target.length is None else target.length
        carried, rows = given[first:last], given[last:]
        stacked = [o.meta["val"] for o in results[k:]]
        planned = [*given[:last], *[meta_stack(v, length) for v in rows]]
        if not all(map(laid_alike, planned, [self.vals[s] for s in inputs])) or not all(
            v.is_contiguous() and v.numel() for v in (*carried, *rows, *stacked)
        ):
            raise UnfitStep
        own = [self.slot(v) for v in given]
        test, holds = self.code(condition[0], own[:last]) if condition else ([], [])
        step, outs = self.code(body, own)
        homes, copies, following = self.placed(outs, own[first:last])
        self.made -= homes.keys()
        ends = [self.new(v) for v in (*carried, *[meta_stack(v, length) for v in stacked])]
        spare = [self.new(v if has_one_element(v) else meta_stack(v, 2)) for v in carried]
        self.made |= (numbers := {o for o in own[first:last] if has_one_element(self.vals[o])})
        t, count = f"t{ends[0] if ends else own[0]}", self.number(length)
        row = f"({count} - 1 - {t})" if target.reverse else t
        test += [f"if (!*(bool *)v{slot}) break;" for slot in holds]
        reads = [
            f"v{o} = v{i} + {row} * {self.width(o)};"
            for o, i in zip(own[last:], inputs[last:], strict=True)
        ]
        places = [
            f"v{s}" if o in numbers else f"v{s} + ({t} & 1) * {self.width(o)}"
            for s, o in zip(spare, own[first:last], strict=True)
        ]
        places += [
            f"v{e} + {row} * {self.width(d)}" for e, d in zip(ends[k:], outs[k:], strict=True)
        ]
        named = [f"const Slot r{d} = {place};" for d, place in enumerate(places)]
        made = [f"v{s} = r{d};" for s, d in homes.items()]
        ready = [self.copy(f"r{d}", s) for d, s in copies]
        next_ = [
            f"__builtin_memcpy(v{o}, r{d}, {self.width(o)});" if o in numbers else f"v{o} = r{d};"
            for o, d in zip(own[first:last], following, strict=True)
            if d >= 0
        ]
        stop = "if (run.interrupted()) return INTERRUPTED;"
        inside = [*test, *reads, *named, *made, *step, *ready, *next_, stop]
        return [
            *[
                self.copy(f"v{o}", i) if o in numbers else f"v{o} = v{i};"
                for o, i in zip(own[:last], inputs, strict=False)
            ],
            f"for (int64_t {t} = 0; {t} < {count}; {t}++) {{",
            *indented(inside),
            "}",
            *[self.copy(f"v{e}", o) for e, o in zip(ends[:k], own[first:last], strict=True)],
        ], ends

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
        raise UnfitStep
    return results


def indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


#: ops without tensor arguments
CONSTANTS = frozenset((torch.ops.aten.full.default,))


def launches(body: Any) -> fx.Graph | None:
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
    """Return the byte of its argument at which a contiguous view begins; else None."""
    if n.target not in VIEWS or not n.meta["val"].is_contiguous():
        return None
    [source] = n.all_input_nodes
    val = source.meta["val"]
    base = torch.empty_strided(val.shape, val.stride(), device="meta")
    view = viewed_again(n, source, base)
    if view.untyped_storage()._cdata != base.untyped_storage()._cdata:
        return None
    return view.storage_offset() * val.element_size()


def laid_alike(one: Tensor, other: Tensor) -> bool:
    facts = [(t.shape, t.stride(), t.dtype) for t in (one, other)]
    return facts[0] == facts[1]


def width(val: Tensor) -> int:
    """Return the bytes of a value."""
    return bytes_of(val.shape, val.stride(), val.dtype)


def has_one_element(val: Tensor) -> bool:
    return val.numel() == 1


def meta_stack(row: Tensor, count: int) -> Tensor:
    return torch.empty((count, *row.shape), dtype=row.dtype, device="meta")


def native_loop(target: Any, bodies: Sequence[Callable], plain: Callable) -> Callable:
    """Return ``plain``, which runs control flow with compiled bodies, or native code for loops
    whose steps consist of launches."""
    quick = native_form()
    if quick is None or not hasattr(target, "n_consts"):
        return plain
    try:
        words, constants = loop_words(target, list(map(launches, bodies)), quick.dtypes)
    except (UnfitStep, CompilerError):
        return plain
    data = (array("q", words).tobytes(), plain, constants)
    run = python_function(target.__name__, quick.loop, data, __name__)

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        for t in tensors:
            if t.__class__ not in TENSORS or t.is_neg() or t.is_conj():
                return plain(*tensors)
        return run(*tensors)

    return call


def loop_words(
    target: Any, bodies: Sequence[fx.Graph | None], dtypes: Mapping
) -> tuple[list[int], list[Tensor]]:
    """Return what ``loop.cpp`` needs of a loop, as words, and the constants whose addresses are
    among them. Raises Unsteady, and CompilerError."""
    if bodies[-1] is None:
        raise UnfitStep
    given = [n.meta["val"] for n in bodies[-1].find_nodes(op="placeholder")]
    last = target.n_consts + target.n_carry
    inputs = [*given[:last], *[meta_stack(v, target.length) for v in given[last:]]]
    step = LoopStep(inputs)
    lines, ends = step.loop(target, bodies, range(len(inputs)))
    results = [step.vals[s] for s in ends]
    fixed = [(s, c.data_ptr()) for s, c in step.constants.items()]
    memory, size = [], 1
    for s in step.made.difference(ends, step.in_registers(ends)):
        memory.append((s, size := -(-size // LINE) * LINE))
        size += width(step.vals[s])
    if size > MOST or not all(v.dtype in dtypes for v in results):
        raise UnfitStep
    printed = native.load_kernels(loop_source(step, lines, step.in_registers(ends)))["aot_run"]
    words = [printed.address, len(step.vals), size, len(inputs), len(results)]
    for v in inputs:
        words += [v.dim(), *v.stride()]
    for s, v in zip(ends, results, strict=True):
        words += [s, dtypes[v.dtype], v.dim(), *v.shape, *v.stride()]
    for pairs in (fixed, memory):
        words += [len(pairs), *flat(pairs)]
    return [*words, *step.numbers], list(step.constants.values())


def loop_source(step: LoopStep, lines: Sequence[str], numbers: set[int]) -> str:
    """Return a loop as the source of the function ``aot_run``; ``numbers`` are variables."""
    kernels = [
        text.replace(f"{native.EXPORTED} void {name.rpartition('_')[0]}(", f"AOT void {name}(")
        for text, name in step.kernels.items()
    ]
    places = {i: f"m{i}" for i in numbers}
    slots = [f"alignas(16) char m{i}[16];" for i in sorted(numbers)]
    slots += [f"Slot v{i} = {places.get(i, f'slots[{i}]')};" for i in range(len(step.vals))]
    given = "const Slot *slots, const int64_t *__restrict numbers, Run &__restrict run"
    head = f"{native.EXPORTED} End aot_run({given}) {{"
    body = [head, *indented([*slots, *lines, "return DONE;"]), "}"]
    shared = (native.HERE / "loop.h").read_text()
    return "\n".join([native.PRELUDE, shared, *kernels, *body, ""])

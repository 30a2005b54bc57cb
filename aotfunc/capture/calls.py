"""Recorded steps of more than one op, and graph nodes with programs of their own.

A *step* takes the place of an :class:`~aotfunc.trace.shapes.instr.Instr` in a recording; ``emit``
puts it into the functional graph. A *call* is the target of a graph node that defines how it is
differentiated (``pull``, ``push``), batched (``batch``) and dissolved (``inline``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ..backends.interpret import Interpreted
from ..cache import Cache
from ..debug import Line
from ..errors import RuleError
from ..graph import Program, draws, n_ops
from ..trace.emit import Builder, remap
from ..trace.functionalize import Functionalizer
from ..trace.marks import hidden_write
from ..trace.node_views import counts_from_storage
from ..trace.records import flat_tensors
from ..trace.shapes.sig import Facts, Sig
from ..trace.views import Link, laid_out, linked
from ..transforms.activity import flat_arguments, live
from ..transforms.jvp import jvp, tangent_sig
from ..transforms.lower import lowered, marked, nothing_but_marks
from ..transforms.vjp import cotangent_sig, vjp
from ..transforms.vmap import vmap
from .makers import maker, still_made

aten = torch.ops.aten


class StepFacts:
    """The facts that the tracer asks of any recorded step."""

    view_of = None
    random = False
    pure = False
    untracked = False

    def __init__(self, writes: Sequence[int], results: int) -> None:
        self.writes = tuple(writes)
        self.same = (None,) * results


class Step:
    """Base of recorded steps with results of the signatures ``outs``, or literals."""

    anywhere = None  # offsets of its inputs do not matter, see Instr
    runs = True  # as a function of the values that it reads

    def __init__(self, outs: Sequence[Any], writes: Sequence[int] = ()) -> None:
        self.outs = tuple(outs)
        self.facts = StepFacts(writes, len(self.outs))
        self.mutates = bool(writes)
        self.strided = False  # an offset counts from the storage

    def emit(self, f: Functionalizer, refs: Sequence[int], grad: bool, line: Line | None) -> None:
        raise NotImplementedError

    def run(self, values: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def views(self) -> Sequence[Any]:
        """List, for each result that is a view of an input, that input and the view calls ``((op,
        args, kwargs, results), index)`` on the way; None for other results."""
        return ()

    def handed(self, refs: Sequence[int]) -> Sequence[int]:
        """List the tensors that the results, if they are the first ones again, may show."""
        return ()

    def bind(self, f: Functionalizer, results: Sequence[Any], grad: bool) -> None:
        for r in results:
            if isinstance(r, Node):
                f.bind(r, grad)


class Row(Step):
    """``(batch, sample) -> the sample's row of the batch``; batched: the whole batch."""

    __name__, dissolved_with = "row", None

    def inline(self, *_: Any) -> Any:
        raise RuleError("a row of a batch does not run by itself: it is batched first")

    __call__ = inline

    def emit(self, f: Functionalizer, refs: Sequence[int], grad: bool, line: Line | None) -> None:
        self.bind(
            f,
            [f.b.node(self, (f.read(refs[0], grad), f.read(refs[1], False)), {}, self.outs[0])],
            grad,
        )

    def live(self, given: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        return [given[0]], []

    def pull(
        self, b: Any, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        return [], []

    def push(self, b: Any, n: Node, new: Node, env: dict, tangents: dict) -> list:
        return [None]

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        return walk.env[n.args[0]], True


class CallStep(Step):
    """A program called inside a recording and dissolved into it; ``apart(program)`` where autograd
    is to know its results."""

    def __init__(self, program: Program, runner: Callable, apart: Callable = lambda p: p) -> None:
        super().__init__(program.vals, program.mutated)
        self.program, self.runner, self.apart = program, runner, apart
        self.facts.random = any(map(draws, program.graph.nodes))
        self.strided = any(map(counts_from_storage, program.graph.nodes))

    def emit(self, f: Functionalizer, refs: Sequence[int], grad: bool, line: Line | None) -> None:
        planned = [p.meta["val"] for p in self.program.placeholders]
        nodes = [laid_out(f.b, f.read(r, grad), val) for r, val in zip(refs, planned, strict=True)]
        program = self.program if f.direct else self.apart(self.program)
        self.finish(f, refs, f.b.inlined(program, nodes), grad, line)

    def views(self) -> Sequence[Any]:
        results = range(self.program.n_outputs)
        return self.program.once("views", lambda: [shown_input(self.program, k) for k in results])

    def finish(
        self, f: Functionalizer, refs: Sequence[int], outs: Any, grad: bool, line: Line | None
    ) -> None:
        count = self.program.n_outputs
        for k, out in enumerate(outs[:count]):
            if isinstance(out, Node):
                ref = f.bind(out, grad)
                if f.mutates and (seen := self.views()[k]) is not None:
                    f.alias(
                        ref,
                        refs[seen[0]],
                        links(self.program.placeholders[seen[0]].meta["val"], seen[1]),
                    )
        quiet = hidden_writes(self.program)
        for index, new, hidden in zip(self.program.mutated, outs[count:], quiet, strict=True):
            f.write(refs[index], new, grad and not hidden, line)

    def live(self, given: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        """Return which results and written inputs have a derivative if ``given`` inputs do."""
        program = self.program
        flags = live(program, tuple(i for i, yes in enumerate(given) if yes))
        count = program.n_outputs
        made = [
            yes
            for yes, o in zip(flags[:count], program.outputs, strict=False)
            if isinstance(o, Node)
        ]
        return made, [
            yes and not quiet
            for yes, quiet in zip(flags[count:], hidden_writes(program), strict=True)
        ]

    def run(self, values: list[Tensor]) -> list[Tensor]:
        return flat_tensors(self.runner(self.program)(*values))


class CompiledStep(CallStep):
    """A compiled function called inside a recording: one node that keeps its graph and backend."""

    def __init__(self, call: CompiledCall, runner: Callable[..., Any]) -> None:
        super().__init__(call.program, runner)
        self.call = call

    def emit(self, f: Functionalizer, refs: Sequence[int], grad: bool, line: Line | None) -> None:
        nodes = [f.read(r, grad) for r in refs]
        self.finish(f, refs, emit_call(f.b, self.call, nodes), grad, line)


def on_eager(program: Program) -> Callable[..., tuple]:
    """Return the program on eager, with new values of written inputs among its results."""

    def make() -> Interpreted:
        if marked(program) and nothing_but_marks(program):
            return Interpreted(program.graph, lambda: lowered(program).graph)
        return Interpreted(lowered(program).graph)

    return program.once(on_eager, make)


def hidden_writes(program: Program) -> list[bool]:
    """Return, for each written input, whether all its writes are hidden from autograd."""

    def untouched(index: int, n: Node) -> bool:
        return seen(n) is placeholders[index]

    placeholders, finals = program.placeholders, program.outputs[program.n_outputs :]
    return program.once("hidden", lambda: [*map(untouched, program.mutated, finals)])


def seen(n: Node) -> Node:
    """Return the value that autograd takes ``n`` for: without hidden writes, and without the path
    into memory that arguments share and out of it."""
    while n.target is hidden_write:
        n = n.args[0]  # type: ignore[assignment]
    if n.target is aten.as_strided.default:
        whole = seen(n.args[0])  # type: ignore[arg-type]
        if whole.target is aten.as_strided_scatter.default and whole.args[2:] == n.args[1:]:
            return seen(whole.args[1])  # type: ignore[arg-type]
    return n


def shown_input(program: Program, k: int) -> tuple[int, list[tuple[tuple, int | None]]] | None:
    """Return the input that result ``k`` is a view of, and the views on the way, as
    :meth:`Step.views` does; None if the result has memory of its own."""
    n: Any = program.outputs[k]
    calls: list[tuple[tuple, int | None]] = []
    while isinstance(n, Node) and n.op == "call_function":
        index = None
        if n.target is operator.getitem:
            n, index = n.args  # type: ignore[misc]
        if not isinstance(n.target, OpOverload) or Facts(n.target).view_of is None:
            return None
        calls.insert(0, ((n.target, n.args, n.kwargs, n.meta["val"]), index))
        n = n.args[0]
    return (
        (program.placeholders.index(n), calls)
        if isinstance(n, Node) and n.op == "placeholder"
        else None
    )


def links(sig: Sig, calls: Sequence[tuple[tuple, int | None]]) -> list[Link]:
    """Return the same views of a tensor of signature ``sig``, as links of a chain."""
    found: list[Link] = []
    for (op, args, kwargs, val), index in calls:
        found.append(
            linked(sig, op, args[1:], kwargs, index, val if index is None else val[index])
        )
        sig = found[-1][4]
    return found


def all_vals(program: Program) -> tuple:
    """Return signatures of all outputs, new values of mutated inputs included."""
    return tuple(o.meta["val"] if isinstance(o, Node) else o for o in program.outputs)


def emit_call(b: Builder, call: CompiledCall, nodes: Sequence[Node]) -> list:
    """Add a call node; return it and its outputs."""
    vals = all_vals(call.program)
    node = b.make("call_function", call, tuple(nodes), {}, vals)
    return [b.item(node, i) if v.__class__ is Sig else v for i, v in enumerate(vals)]


def becomes(
    b: Builder, n: Node, half: CompiledCall, count: int, made: Sequence[str] = ()
) -> list[Node]:
    """Make a call node call a half that returns residuals after the ``count`` results; return the
    residuals. (A second node would draw random numbers again.) A result that its op ``made`` is
    itself the residual: its hooks act on what is computed from it."""
    n.target, n.meta["val"], half.made = half, all_vals(half.program), made
    outs = half.program.outputs
    itself = {o: i for i, (o, op) in enumerate(zip(outs, made, strict=False)) if maker(o) == op}
    places = [i for i, v in enumerate(n.meta["val"]) if i >= count and v.__class__ is Sig]
    return [b.item(n, itself.get(outs[i], i)) for i in places]


class CompiledCall:
    """A compiled function as the target of a node. Transforms rewrite its program and keep its
    ``compile(program, example_inputs)``.

    ``split(joint, n_early, last=False) -> (forward call, backward call)`` partitions a joint
    program and keeps the compilers."""

    def __init__(
        self, program: Program, compile: Callable, split: Callable, name: str = "jit"
    ) -> None:
        self.program, self.compile, self.split, self.__name__ = program, compile, split, name
        #: the recorded program, for results computed from other results
        self.plain: Program | None = None
        #: the op that made each result in eager mode, by name: rewriting may put another there
        self.made: Sequence[str] = ()

    def __repr__(self) -> str:
        program = self.program
        nodes = n_ops(program.graph)
        return f"<compiled call {self.__name__}: {program.signature}, {nodes} nodes>"

    def __call__(self, *args: Tensor) -> Sequence:
        return self.compiled(args)([*args])

    def compiled(self, args: Sequence[Tensor]) -> Callable[[list[Tensor]], Sequence]:
        """Return the compiled program as a function of a list, which it may empty; compile it now
        for arguments like these if it is not."""
        run = self.program.cache.get(self.compile)
        if run is None:
            run = self.program.once(self.compile, lambda: self.compile(self.program, args))
        return run

    @property
    def draws(self) -> bool:
        """Return whether a call draws random numbers."""
        return self.program.once("draws", lambda: any(map(draws, self.program.graph.nodes)))

    def derived(self, key: tuple, make: Callable[[], Program], kind: str) -> CompiledCall:
        name = f"{kind}_{self.__name__}"
        return self.program.once(
            (kind, *key), lambda: CompiledCall(make(), self.compile, self.split, name)
        )

    def live(self, n: Node, active: dict[Node, None]) -> list[bool]:
        """Return which outputs of ``n`` have a derivative if its ``active`` arguments do."""
        return live(self.program, tuple(i for i, a in enumerate(n.args) if a in active))

    def flat(self, n: Node) -> list[Node]:
        """Return the arguments of ``n`` by which the call is flat."""
        return flat_arguments(n, self.program)

    dissolved_with = "calls"

    def inline(self, b: Builder, args: Sequence[Any], inner: Callable[[Program], Program]) -> list:
        return b.inlined(inner(self.program), args)

    def pull(
        self, b: Builder, n: Node, g: dict[int, Node], active: Any, again: Any
    ) -> tuple[list, list]:
        """Make the node call the forward half, with residuals, and add the backward half."""
        program = self.program
        wrt = tuple(i for i, a in enumerate(n.args) if a in active)
        whole = program.flat()
        count = whole.n_outputs
        # (new values of written inputs have cotangents, too)
        have = tuple(i in g for i in range(count))
        plan = tuple(
            [
                cotangent_sig(v, g[i].meta["val"].stride) if i in g else None
                for i, v in enumerate(whole.vals)
            ]
        )
        forward, backward = whole.once(
            ("split", wrt, plan), lambda: self.split(vjp(whole, wrt, have, plan=plan), count)
        )
        residuals = becomes(b, n, forward, count, self.made)
        given = [(i, sig) for i, sig in enumerate(plan) if sig is not None]
        cotangents = [laid_out(b, g[i], sig, exactly=True) for i, sig in given]
        grads = emit_call(b, backward, [*residuals, *cotangents])
        return [n.args[i] for i in wrt], grads[: len(wrt)]

    def push(self, b: Builder, n: Node, new: Node, env: dict, tangents: dict) -> list:
        """Make ``new`` return values and residuals, and add a call linear in the tangents."""
        program = self.program
        wrt = tuple(i for i, a in enumerate(n.args) if a in tangents)
        whole = program.flat()
        count = whole.n_outputs
        primal, linear = whole.once(
            ("linear", wrt), lambda: self.split(jvp(whole, wrt, zeros=False), count)
        )
        residuals = becomes(b, new, primal, count)
        planned = [tangent_sig(p.meta["val"]) for p in program.placeholders]
        return emit_call(
            b, linear, [*residuals, *(laid_out(b, tangents[n.args[i]], planned[i]) for i in wrt)]
        )

    def batch(self, walk: Any, n: Node) -> tuple[Any, Any]:
        dims = tuple(0 if walk.has(a) else None for a in n.args)
        args = remap(n.args, walk.env)
        sigs = tuple(a.meta["val"] for a in args)

        def batched(base: Program, count: int, apart: bool = False) -> Program:
            whole = Program(base.graph, len(n.args), count, base.mutated, base.name)
            there = [0 if isinstance(o, Node) else None for o in base.outputs[:count]]
            return vmap(whole, dims, sigs, walk.axis, there, apart)

        def make() -> CompiledCall:
            new = batched(base := self.program, self.program.n_outputs)
            call = CompiledCall(new, self.compile, self.split, f"vmap_{self.__name__}")
            call.made = still_made(base, new, self.made)
            if self.plain is not None and not base.mutated:
                call.plain = batched(self.plain, len(self.plain.outputs), apart=True)
            return call

        call = self.program.derived(("vmap", self.compile, dims, sigs, walk.axis), make)
        return emit_call(walk.b, call, args), [True] * len(n.meta["val"])


_steps = Cache(4096)


def interned(cls: Any, *args: Any) -> Any:
    """Return one object for equal arguments: recordings are keyed by their steps' identity."""
    return _steps.once((cls, *args), lambda: cls(*args))

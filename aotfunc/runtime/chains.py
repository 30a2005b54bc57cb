"""A compiled call under autograd whose results were computed from one another, or from the new
value of a written argument: a chain of calls, cut at these.

What is computed from a result has to read the very tensor that is returned, or was written to:
``autograd.grad(loss, features)``, hooks and ``retain_grad`` act on it then. The graph is cut by
position, so that random numbers are drawn in order, and it is the graph as recorded: a rewritten
one computes results from one another that only have an op in common."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..capture.calls import CallStep, CompiledCall, CompiledStep, hidden_writes
from ..capture.captured import Captured
from ..capture.hooks import Hooked
from ..capture.live_hooks import TensorHooks, live_hooks
from ..capture.makers import maker
from ..capture.recorded_makers import makers_of
from ..graph import Program, needed_for, op_of
from ..trace.emit import Builder, remap
from ..trace.marks import dead_end
from ..trace.memory import storage_groups
from ..trace.node_views import chain_of, view_source
from ..trace.records import n_new_values, written_slots
from ..trace.shapes.instr import Instr
from ..trace.tracer import Trace
from ..transforms.activity import active_nodes, sources
from ..transforms.tidy import rebuilt
from .aliasing import memory_program
from .autograd import call_compiled
from .chain_steps import by_autograd, saves_a_result, stage_numbers, stage_of, write
from .execute import before_writes, write_back
from .late_reads import late_reads, versions
from .recorded_hooks import RecordedHooks, recorded_hooks
from .usual import op_by_op


def program_to_cut(rec: Captured, mutated: Sequence[int]) -> Program | None:
    """Return the program to cut; None if no result was computed from another for autograd."""
    trace, refs = rec.trace, dict.fromkeys(rec.refs)
    autograd = trace.autograd
    count = len(trace.inputs)
    written = [*map(trace.ref_at, mutated)]
    ends = {*refs, *written}
    hooked = bool(trace.live_hooks) or any(s.hooks and s.new in refs for s in trace.stand_ins)
    hooked = hooked or any(map(hooks_results, [i for i, *_ in trace.records]))
    if not hooked and (len(ends) < 2 or not (autograd.active() & ends)):
        return None
    inputs = range(-len(trace.lifted), count)
    read = {r for _, given, *_ in trace.records for r in given}
    # results of one step may be computed from one another
    inside = any(
        i.__class__ is not Instr and (n_new_values(i) > 1 or has_chain(i))
        for i, *_ in trace.records
    )
    if not (inside or hooked) and not any(
        autograd.reaches(r, [*(ends - {r})]) for r in refs if r in read and r not in inputs
    ):
        if not any(r in autograd.active() and read_when_written(trace, r) for r in written):
            return None
    program = rec.as_recorded(memory_program(rec))
    return dissolved(program) if inside else program


def made_by(rec: Captured) -> tuple[str, ...]:
    """Return the op that made each result of the program, by name."""
    return makers_of(rec.trace, [r for r, _ in memory_program(rec)])


def read_when_written(trace: Trace, ref: int) -> bool:
    """Return whether autograd sees something computed from an input after its last write."""
    last, base = 0, trace.root(ref)
    for k, (instr, refs, *_) in enumerate(trace.records):
        if any(trace.root(refs[s]) == base for s in written_slots(instr)):
            last = k + 1
    later = trace.records[last:]
    return last > 0 and any(
        grad and any(trace.root(r) == base for r in refs) for _, refs, grad, *_ in later
    )


def hooks_results(step: Any) -> bool:
    """Return whether a program that is called has recorded hooks of its results."""
    if not isinstance(step, CallStep):
        return False
    made = [op_of(o).target for o in step.program.outputs if isinstance(o, Node)]
    return any(isinstance(target, Hooked) for target in made)


def has_chain(step: Any) -> bool:
    return step.__class__ is CompiledStep and step.call.plain is not None


def dissolved(program: Program) -> Program:
    """Return the program without nested calls that have a chain; a view that a nested function
    returned is the view made for it in there."""
    views: dict[str, list[Node]] = {}  # in the order of the results

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        args = remap(n.args, env)
        plain = getattr(n.target, "plain", None)
        if plain is None:
            if alike := views.get(call_text(n.target, args), []):
                return alike.pop(0)
            return (
                b.item(*args) if n.target is operator.getitem else b.call_like(n, env, moved=True)
            )
        b.meta = {}
        outs = b.inlined(plain, args)
        for v in outs[len(n.meta["val"]) :]:
            for m in reversed(chain_of(v) if isinstance(v, Node) else []):
                for made in (m.args[0], m) if m.target is operator.getitem else (m,):
                    alike = views.setdefault(call_text(made.target, made.args), [])
                    if made not in alike:
                        alike.append(made)
        return outs

    return rebuilt(program, program.name, visit, Builder(None, merge=False))


def chained(
    call: CompiledCall, tensors: Sequence[Tensor]
) -> tuple[Sequence[Tensor], dict[int, Tensor]] | None:
    """Return ``(results, views)`` of a call as a chain, written inputs updated; the views by their
    positions among the tensors that the function returned. None where one call is enough."""
    if not torch.is_grad_enabled() or op_by_op():
        return None
    wrt = tuple(i for i, t in enumerate(tensors) if t.requires_grad)
    written = call.program.mutated
    apart = len({*storage_groups([tensors[i] for i in written])}) == len(written)
    chain = call.program.once(("chain", wrt, apart), lambda: CallCuts(call, wrt, apart).chain())
    return None if chain is None else chain(tensors)


def call_text(target: Any, args: tuple) -> str:
    return f"{target} {args}"


class Chain:
    """Steps ``(compiled call or function of tensors, positions read)``, which append results to
    values. Inputs at ``kept`` are read after a write, or kept by a function."""

    def __init__(
        self,
        program: Program,
        steps: list[tuple],
        outs: Sequence[int],
        views: dict[int, int],
        written: Sequence[int],
        late: Sequence[int],
        kept: Collection[int],
    ) -> None:
        self.program, self.steps, self.outs, self.views = program, steps, outs, views
        self.written, self.late, self.kept = written, late, kept

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], dict[int, Tensor]]:
        program = self.program
        written = [tensors[i] for i in program.mutated]
        values = [*before_writes(written, tensors, self.kept), *tensors]
        for fn, reads in self.steps:
            read = [values[i] for i in reads]
            if isinstance(fn, CompiledCall):
                values += call_compiled(fn, read, written)
            else:
                values += fn(read)
        outs, given = [], range(len(tensors))
        for k, i in enumerate(self.outs):  # no result is an input or another one
            outs.append(values[i].clone() if i in given or i in self.outs[:k] else values[i])
        if program.mutated:
            write_back(program, tensors, outs, self.written)
        for i in self.late:
            values[i] += versions(late_reads(program), tensors, outs)
        return outs[: program.n_outputs], {k: values[i] for k, i in self.views.items()}


class CallCuts:
    """The cuts of a call's graph for the gradients of its inputs ``wrt``. New values of written
    inputs are cuts only if these inputs are ``apart`` in memory: a later write to one must not
    reach values kept of another."""

    def __init__(self, call: CompiledCall, wrt: tuple[int, ...], apart: bool) -> None:
        assert call.plain is not None
        self.call, self.program = call, call.plain
        whole, plain = call.program, call.plain
        self.nodes = [n for n in plain.graph.nodes if n.op == "call_function"]
        self.placeholders = plain.placeholders
        #: memory of the results, then new values of written inputs
        self.ends = plain.outputs[: len(whole.outputs)]
        self.returned = plain.outputs[len(whole.outputs) :]  # and values with hooks
        self.active = active_nodes(
            plain.graph.nodes, [self.placeholders[i] for i in wrt], zeros=True
        )
        results = [
            n
            for n in self.ends[: whole.n_outputs]
            if isinstance(n, Node) and n.op == "call_function"
        ]
        #: the number of the written input, for each new value that is a cut
        self.written = {
            n: i
            for i, n, quiet in zip(
                whole.mutated, self.ends[whole.n_outputs :], hidden_writes(whole), strict=True
            )
            if apart
            and not quiet
            and n in self.active
            and n.op == "call_function"
            and n not in results
        }
        roots = {
            *results,
            *self.written,
            *(p for i, p in enumerate(self.placeholders) if i not in whole.mutated),
        }
        #: results that are views of other results or of inputs, and are made by PyTorch; not those
        #: under no_grad, which have no derivative
        self.views: dict[Node, list[Node]] = {}
        for n in self.nodes:
            if (
                n in self.returned
                and n in self.active
                and n not in roots
                and n.target is not dead_end
            ):
                chain = self.chain_of(n, roots)
                if chain:
                    self.views[n] = chain
        self.cuts = self.dependent([n for n in (*results, *self.written) if n in self.active])
        #: nodes where autograd calls hooks
        self.hooked = {
            n: hooks
            for n in self.nodes
            if n in self.active and (hooks := live_hooks(n) or self.recorded(n)) is not None
        }
        #: ops that autograd itself is to record: it saves a result, which has hooks
        self.saving: set[Node] = set()
        for n, hooks in self.hooked.items():
            self.cuts.update(n.users)
            if isinstance(hooks, TensorHooks | RecordedHooks):  # those of all that reads the value
                self.cuts.update(self.shown(n))
                self.saving.update(filter(saves_a_result, map(op_of, self.shown(n))))
        self.stage = stage_numbers(self.nodes, self.cuts, self.saving)

    def recorded(self, n: Node) -> RecordedHooks | None:
        """Return the recorded hooks of a result, called before those the caller registers."""
        ends = self.ends[: self.call.program.n_outputs]
        mine = any(u in ends for u in n.users)
        return recorded_hooks(n, self.call.__name__) if mine else None

    def read(self, n: Node) -> Sequence[Node]:
        """Return the values that a node reads."""
        if n not in self.hooked:
            return n._input_nodes
        hooks = self.hooked[n]
        return [*self.shown(n), *(hooks.residuals if isinstance(hooks, RecordedHooks) else ())]

    def shown(self, n: Node) -> list[Node]:
        """Return the values that a node with hooks passes on."""
        return n.target.parts(n)[0]  # type: ignore[union-attr]

    def chain_of(self, n: Node, roots: set[Node]) -> list[Node]:
        """Return the views that lead to ``n`` from a value that autograd knows, in order."""
        chain: list[Node] = []
        while n not in roots and (not chain or n not in self.views):
            above = view_source(n)
            if above is None:
                return []
            chain.insert(0, n)
            if n.target is operator.getitem:
                chain.insert(0, n.args[0])  # type: ignore[arg-type]
            n = above
        return [n, *chain]

    def dependent(self, results: Sequence[Node]) -> set[Node]:
        """Return the nodes from which results or new values of written inputs are computed."""
        bits = {n: 1 << k for k, n in enumerate(dict.fromkeys([*results, *self.views]))}
        found, masks = 0, dict.fromkeys(self.active, 0)
        for n in self.active:
            for i in sources(n):
                masks[n] |= masks.get(i, 0)
            if n in self.ends:
                found |= masks[n]
            masks[n] |= bits.get(n, 0)
        return {n for n, bit in bits.items() if found & bit}

    def chain(self) -> Chain | None:
        if not self.cuts:
            return None
        count = len(self.placeholders)
        place: dict[Any, int] = {p: i for i, p in enumerate(self.placeholders)}
        size = 2 * count  # the inputs as they were before the call, and as they are
        sources = {chain[0] for chain in self.views.values()}
        wanted = {n for n in self.ends if isinstance(n, Node)} | sources
        for n in self.nodes:
            wanted.update(
                i
                for i in self.read(n)
                if i in self.stage and (self.stage[i] < self.stage[n] or n in self.hooked)
            )
        for n in self.hooked:
            wanted.difference_update(n.users)
        steps: list[tuple] = []
        #: signatures of values that cross, where an input was given a new value its own
        said: dict[Node, Any] = {}
        written = [n for n in self.written if n in self.cuts or n in sources]
        kept = set[int]()

        def step(fn: Callable, reads: list[int], outs: Sequence[Any]) -> None:
            nonlocal size
            if not isinstance(fn, CompiledCall) or any(f is write for f, _ in steps):
                kept.update(reads)
            steps.append((fn, reads))
            for n in outs:
                place[n] = size
                size += 1

        for k in range(max(self.stage.values()) + 1):
            mine = [n for n in self.nodes if self.stage[n] == k]
            outs = [n for n in mine if n in wanted and n not in self.views]
            reach = needed_for(mine, outs)
            if body := [n for n in mine if n in reach]:
                reads = [
                    i
                    for i in dict.fromkeys(i for n in body for i in n._input_nodes)
                    if self.stage.get(i, -1) < k
                ]
                if body[0] in self.saving:
                    step(by_autograd(reads, body, outs, said), [place[i] for i in reads], outs)
                else:
                    program = stage_of(body, reads, outs, said)
                    stage = CompiledCall(
                        program, self.call.compile, self.call.split, self.call.__name__
                    )
                    stage.made = [*map(maker, outs)]
                    step(stage, [place[i] for i in reads], outs)
            for n in mine:
                if (hooks := self.hooked.get(n)) is not None:
                    items: list[Any] = [None] * len(self.shown(n))
                    for u in n.users:
                        items[u.args[1]] = u  # type: ignore[index, call-overload]
                    reads = [place[x] for x in self.read(n)]
                    if isinstance(hooks, RecordedHooks):
                        step(hooks.register, reads, [*items, hooks])
                        continue
                    link = n.target.link  # type: ignore[union-attr]
                    if link in place:  # what the front of a module leaves for what is behind it
                        reads.append(place[link])
                    step(n.target.call(hooks), reads, [*items, link])  # type: ignore[union-attr]
                if n in written:
                    step(write, [count + self.written[n], place[n]], [n])
                    said[n] = self.placeholders[self.written[n]].meta["val"]
                if n in self.views:
                    source, *calls = self.views[n]
                    step(by_autograd([source], calls, [n], said), [place[source]], [n])
        views = {k: place[n] for k, n in enumerate(self.returned) if n in self.views}
        done = [self.written[n] for n in written]
        late = [place[h] for h in self.hooked.values() if isinstance(h, RecordedHooks)]
        ends = [place[n] for n in self.ends]
        kept.update(ends if done else ())
        kept.intersection_update(range(count))
        return Chain(self.call.program, steps, ends, views, done, late, kept)

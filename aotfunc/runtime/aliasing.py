"""Make results that are views outside the compiled graph.

A view that leaves a compiled graph would be a mere piece of memory. Made by the view's own ops
from the input, or from the result it is a view of, it is one for autograd too: later writes are
seen through all of its aliases, as in eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..backends.eager import compile_graph
from ..capture.calls import hidden_writes
from ..capture.captured import Captured
from ..capture.makers import as_makers
from ..debug import at
from ..errors import CaptureError
from ..graph import Program
from ..trace.aliases import Shown
from ..trace.emit import Builder, infer_val, paused_gc
from ..trace.in_place import SHAPE_OF_GRADIENT
from ..trace.marks import hidden_write
from ..trace.node_views import storage_root
from ..trace.shapes.sig import Facts, Sig
from ..trace.traced import current
from ..trace.writes import functional_twin
from ..transforms.fresh import fresh

aten = torch.ops.aten
#: the key in a program's cache for the inputs that share no memory with another, in all its calls
ALONE = "alone"


def without_views(
    rec: Captured, quiet: bool = False
) -> tuple[Program, Callable[..., tuple] | None]:
    """Return ``(program, views)``. The program has one result for each piece of memory that a
    returned tensor shows. ``views(*inputs, *results)`` makes the tensors that were returned, once
    written inputs have their new values; it is None where these are the program's results.

    Results share memory with an input and with one another where the recording says so, and
    nowhere else. ``quiet``: captured with gradients off, so that no view needs to be detached."""
    steps = [step for s in rec.returned for step in s.path]
    if any(s.apart and rec.seen[s.ref] is not s for s in steps):
        raise CaptureError(
            "a detached tensor was written with what requires grad, and its shape changed in place"
        )
    owned = memory_program(rec)
    base = rec.program(memory=owned)
    return base.once(
        ("views", tuple(rec.trace.finals), quiet),
        lambda: separated(rec, as_makers(base, fresh(base, ())), owned, quiet),
    )


def memory_program(rec: Captured) -> tuple[tuple[int, bool], ...]:
    """Return the program for the returned tensors' memory, for :meth:`Captured.program`."""
    steps = [step for s in rec.returned for step in s.path]
    count = len(rec.trace.inputs)
    return tuple(
        dict.fromkeys(
            (s.ref, not s.apart) for s in steps if s.apart or (s.of is None and s.ref >= count)
        )
    )


def separated(
    rec: Captured, program: Program, owned: Sequence[tuple[int, bool]], quiet: bool
) -> tuple[Program, Any]:
    """Return the program, which computes the memory of the values ``owned``, and the views."""
    count, returned = len(rec.trace.inputs), rec.returned
    if rec.refs == tuple(r for r, _ in owned) and not any(s.of for s in returned):
        return program, None
    # an argument stays the tensor that it was
    itself = {ref: i for i, ref in enumerate(rec.trace.finals)}
    with paused_gc():
        b = Builder(None, merge=False)
        inputs = b.inputs(program.placeholders)
        made: dict[Any, Node] = {}
        for r, o in zip(owned, program.outputs, strict=False):
            made[r] = b.placeholder(o.name, o.meta["val"])

        def memory(ref: int) -> Node:
            return made[ref, True] if ref >= count else inputs[rec.trace.position(ref)]

        def node(s: Shown) -> Node:
            x = memory(s.root)
            for step in s.path[1:]:
                if step not in made and step.passed:
                    made[step] = b.make(
                        "call_function", passed, (x, made[step.ref, False]), {}, x.meta["val"]
                    )
                elif step not in made:
                    made[step] = view_step(b, x, step, quiet, made)  # type: ignore[index]
                    if step.apart:  # the same memory, the values that it has, and their derivative
                        x, new = made[step], made[step.ref, False]
                        made[step] = b.make(
                            "call_function", aten.copy_.default, (x, new), {}, x.meta["val"]
                        )
                x = made[step]  # type: ignore[index]
            return x

        results = [
            inputs[itself[r]] if itself.get(r) == s.root else node(s)
            for r, s in zip(rec.refs, returned)
        ]
        return program, compile_graph(b.finish(results))


def view_program(rec: Captured, ref: int) -> Program:
    """Return the views from the memory that a value was made with to the value, as a program."""
    start, *path = rec.seen[ref].path
    sig = rec.trace.signatures()[rec.trace.position(start.ref)]
    with paused_gc():
        b = Builder(None, merge=False)
        x, made = b.placeholder("memory", sig), dict[Any, Node]()
        for step in path:
            x = view_step(b, x, step, True, made)
        return Program(b.finish([x]), 1, 1, (), "view")


def view_step(b: Builder, x: Node, step: Shown, quiet: bool, made: dict) -> Node:
    """Return the view of ``x`` that a path's step is; gradients may be laid out otherwise."""
    op, args, kwargs, val = step.call
    if Facts(op).reshapes:
        op = functional_twin(op, None)
    sig: Sig = val if step.index is None else val[step.index]
    if op in (aten.as_strided.default, aten.resize.default):
        op = aten.as_strided.default
        args, kwargs = (x, list(sig.shape), list(sig.stride), sig.offset), {}
    call = (x, id(step.call))  # results of one call are made together
    if call not in made:
        unseen = step.cut and not quiet and not Facts(step.call[0]).reshapes
        given, kwargs = (x, *args[1:]), dict(kwargs)
        val = infer_val(op, given, kwargs)
        target, given = (cut_view, (op, *given)) if unseen else (op, given)
        made[call] = b.make("call_function", target, given, kwargs, val)
    return made[call] if step.index is None else b.item(made[call], step.index)


def cut_view(op: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return a view made under no_grad: without a derivative, it requires grad as its base."""
    with torch.no_grad():
        return op(*args, **kwargs)


class Passed(torch.autograd.Function):
    """A pair a Function gets and returns: one tensor's memory with another's derivative."""

    @staticmethod
    def forward(ctx: Any, memory: Tensor, new: Tensor) -> Tensor:  # type: ignore[override]
        return memory

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        return None, g


def passed(memory: Tensor, new: Tensor) -> Tensor:
    return Passed.apply(memory, new)


class Changes:
    """The changes of ``f`` to its arguments besides their values: whether they require grad before
    anything reads them, and retain it; their hooks; their shape and history in place
    (``x.t_()``, ``x.detach_()``). They affect only the argument itself."""

    def __init__(self, rec: Captured) -> None:
        self.rec, trace = rec, rec.trace
        flags, kept = trace.autograd.flags, trace.autograd.kept
        self.flags = [(i, value, line) for i, (value, line) in flags.items()] if flags else []
        self.retained = [i for i, ref in enumerate(trace.finals) if ref in kept] if kept else []
        hooks = trace.given_hooks
        self.hooks = [(i, h.hook) for i, h in hooks if not h.removed] if hooks else []
        #: the positions of those that get other memory, and which results are these themselves
        new = {ref: trace.position(old) for old, (ref, *_) in (trace.rebound or {}).items()}
        self.rebound = [*new.values()]
        returned = rec.refs[: len(rec.tensors)]
        self.itself = {k: new[ref] for k, ref in enumerate(returned) if ref in new}
        self.ops = ops_in_place(rec)

    def __bool__(self) -> bool:
        return bool(self.flags or self.retained or self.hooks or self.ops or self.rebound)

    def before(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the inputs that the program runs on: its backward must not see shapes and memory
        that they have later."""
        for i, value, line in self.flags:
            if line is not None:
                raise CaptureError(
                    f"requires_grad_() of an argument that was used before{at(line)}; call it "
                    "first"
                )
            tensors[i].requires_grad_(value)
        for i in self.retained:
            tensors[i].retain_grad()
        for i, hook in self.hooks:
            tensors[i].register_hook(hook)
        changed = {*self.rebound, *(i for i, _ in self.ops)}
        return [t.view_as(t) if i in changed else t for i, t in enumerate(tensors)]

    def rebind(self, tensors: Sequence[Tensor], outs: Sequence[Any]) -> Sequence[Any]:
        """Give arguments and closed-over tensors their new memory, which the last of ``outs``
        show; return the others, which are the function's results."""
        count = len(outs) - len(self.rebound)
        for i, new in zip(self.rebound, outs[count:], strict=True):
            tensors[i].data = new
        return [tensors[self.itself[k]] if k in self.itself else outs[k] for k in range(count)]


Reshapes = list[tuple[int, list[tuple]]]


def ops_in_place(rec: Captured) -> Reshapes:
    """List what changes the shape and history of arguments: ``(position, [(op, other arguments,
    keywords, under no_grad)])``."""
    trace, found = rec.trace, Reshapes()
    if not trace.reshapes and trace.finals == [*range(len(trace.finals))]:
        return found
    for i, ref in enumerate(trace.finals):
        last = rec.seen.get(ref)
        if last is not None and last.of is not None and last.root == i:
            if any(step.apart for step in last.path):
                raise CaptureError(
                    f"{rec.names()[i]} is detached in place and then written with what "
                    "requires grad; detach() it, and return it"
                )
            ops = [is_in_place(step) for step in last.path[1:]]
            found.append((i, ops))
            if trace.autograd.leaves.get(i) and torch.is_grad_enabled():
                for op in [op for op, *_, unseen in ops if unseen]:
                    if op is not aten.detach_.default:
                        raise CaptureError(
                            f"{rec.names()[i]}: {op} under no_grad{SHAPE_OF_GRADIENT}"
                        )
    return found


def change_in_place(changes: Reshapes, tensors: Sequence[Tensor], but: Sequence[int] = ()) -> None:
    """Apply these ops to the tensors themselves, but for those at the positions ``but``."""
    for i, ops in changes:
        t = tensors[i]
        if i in but:
            continue
        # no value changes: the values kept by the backward are still good
        kept = current() is None and not t.is_inference()
        with torch.autograd._unsafe_preserve_version_counter(t) if kept else nullcontext():
            for op, args, kwargs, unseen in ops:
                # a view's flag is that of its base by now, and autograd does not look there
                t.grad_fn  # noqa: B018
                with torch.no_grad() if unseen else nullcontext():
                    t.detach_() if op is aten.detach_.default else op(t, *args, **kwargs)


def is_in_place(step: Shown) -> tuple:
    op, args, kwargs, _ = step.call
    if not Facts(op).reshapes:
        op, args, kwargs = aten.detach_.default, (None,), {}  # recorded as a detach
    return op, args[1:], kwargs, step.cut


def alone_in_memory(rec: Captured) -> frozenset[int]:
    """Return the inputs and closed-over tensors that share memory with no other one."""
    groups = [place.group for place in rec.trace.layout()] if rec.trace.mutates else []
    return frozenset([i for i, g in enumerate(groups) if groups.count(g) == 1])


def donated(program: Program) -> dict[int, int]:
    """Return the inputs whose memory a backend may give their new values, each with the place of
    that among the results: those written hidden from autograd, ``ALONE`` in memory."""
    alone = program.cache.get(ALONE, ())
    each = zip(program.mutated, hidden_writes(program), strict=True)
    return {i: k for k, (i, quiet) in enumerate(each, program.n_outputs) if quiet and i in alone}


def with_own_memory(
    program: Program, tensors: Sequence[Any], outs: Sequence[Any]
) -> Sequence[Any]:
    """Return the results of a program, with copies where the new value of a written input is, or
    is a view of, another written input: that one may be written first."""
    count, mutated = program.n_outputs, program.mutated
    if len(mutated) < 2:
        return outs

    def of_written() -> set[int]:
        placeholders, finals = program.placeholders, program.outputs
        written = {placeholders[i] for i in mutated}
        return {k for k in range(count, len(finals)) if written_root(finals[k]) in written}

    views = program.once("apart", of_written)
    # what runs inside a nested call is not seen in the graph
    same = {id(tensors[i]) for i in mutated}
    if not views and not any(id(x) in same for x in outs[count:]):
        return outs
    return [
        x.clone() if k in views or (k >= count and id(x) in same) else x
        for k, x in enumerate(outs)
    ]


def written_root(n: Any) -> Any:
    """Return the node whose memory ``n`` shows; of a hidden write, that of what it writes."""
    while isinstance(n := storage_root(n), Node) and n.target is hidden_write:
        n = n.args[1]
    return n

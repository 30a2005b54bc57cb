"""Hold what loops and branches have in common: nodes that carry the programs of their bodies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..backends.interpret import Interpreted
from ..graph import Program, acts, dependents, draws
from ..trace.emit import Builder, paused_gc, remap
from ..trace.node_views import storage_root
from ..trace.shapes.sig import Sig, contiguous_stride, make_sig
from ..trace.views import laid_out
from ..transforms.lower import EVERYTHING, lowered
from ..transforms.walk import builder


class Flow:
    """Base of the targets with bodies; their results have the signatures ``vals``."""

    __name__ = "flow"
    bodies: tuple[Program, ...]
    dissolved_with = "bodies"

    @property
    def vals(self) -> tuple:
        raise NotImplementedError

    def run(self, bodies: Sequence[Callable], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the results with these functions in place of the bodies."""
        raise NotImplementedError

    def with_bodies(self, bodies: Sequence[Program]) -> Any:
        """Return the same target with other bodies of the same form."""
        raise NotImplementedError

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        return self.run(list(map(interpreted, self.bodies)), tensors)

    @property
    def draws(self) -> bool:
        """Return whether a run draws random numbers."""
        return any(body.once(drawn, functools.partial(drawn, body)) for body in self.bodies)

    def inline(self, b: Builder, args: Sequence[Any], inner: Callable[[Program], Program]) -> list:
        return emit_flow(b, self.with_bodies(list(map(inner, self.bodies))), args)


def interpreted(body: Program) -> Callable[..., tuple]:
    """Return the body as a function that runs its ops one by one."""
    return body.once(interpreted, lambda: Interpreted(lowered(body, EVERYTHING).graph))


def emit_flow(b: Builder, target: Flow, args: Sequence[Any]) -> list:
    """Return a node of control flow, and its results."""
    node = b.make("call_function", target, tuple(args), {}, target.vals)
    return [b.item(node, i) for i in range(len(target.vals))]


def drawn(body: Program) -> list[Node]:
    """Return the draws in a body."""
    return [n for n in body.graph.nodes if draws(n)]


def differing(body: Program, given: Sequence[bool], apart: bool) -> list[bool]:
    """Return which results differ if these inputs, or draws ``apart``, do."""
    start = [p for p, yes in zip(body.placeholders, given, strict=True) if yes]
    reached = dependents(body.graph, [*start, *(drawn(body) if apart else ())])
    return [o in reached for o in body.outputs]


def subprogram(
    program: Program,
    nodes: Iterable[Node],
    outs: Sequence[Any],
    inputs: Sequence[Node] | None = None,
) -> Program:
    """Return these nodes of a program as a program that returns ``outs``; ``inputs`` become its
    inputs (default: those of the whole)."""
    given = program.placeholders if inputs is None else inputs
    with paused_gc():
        b = builder()
        env = dict(zip(given, b.inputs(given), strict=True))
        b.copy([n for n in nodes if n.op == "call_function"], env)
        graph = b.finish(remap(tuple(outs), env))
        return Program(graph, len(given), len(outs), (), program.name)


def hoisted(body: Program, n_consts: int) -> tuple[list[int], Program, Program]:
    """Return ``(read, before, body)``: which of its first ``n_consts`` inputs the body itself
    reads, the program of the values that depend on these inputs alone, and the body that takes
    these values after the constants that it reads."""

    def make() -> tuple[list[int], Program, Program]:
        inputs = body.placeholders
        varying = dependents(body.graph, [*inputs[n_consts:], *drawn(body)])
        fixed = [n for n in body.graph.nodes if n.op == "call_function" and n not in varying]
        if any(map(acts, fixed)):
            fixed = []
        read = [
            n
            for n in fixed
            if n.meta["val"].__class__ is Sig
            and any(u in varying or u.op == "output" for u in n.users)
        ]
        kept = [i for i, p in enumerate(inputs[:n_consts]) if any(u not in fixed for u in p.users)]
        new = [*[inputs[i] for i in kept], *read, *inputs[n_consts:]]
        rest = [n for n in body.graph.nodes if n not in fixed]
        return kept, subprogram(body, fixed, read), subprogram(body, rest, body.outputs, new)

    return body.once(("hoisted", n_consts), make)


def returning(program: Program, chosen: Sequence[int]) -> Program:
    """Return the program with these results only."""
    if len(chosen) == program.n_outputs:
        return program
    outs = program.outputs
    return program.once(
        ("returning", *chosen),
        lambda: subprogram(program, program.graph.nodes, [outs[i] for i in chosen]),
    )


def as_planned(t: Tensor, sig: Sig) -> Tensor:
    """Return an argument in the layout that a body was captured for. The rows of a value that was
    expanded are equal, wherever they were copied to: the first stands for all."""
    if t.stride() == sig.stride:
        return t
    own = t[tuple([slice(None if step else 1) for step in sig.stride])] if 0 in sig.stride else t
    planned = torch.empty_strided(own.shape, sig.stride, dtype=t.dtype, device=t.device)
    return planned.copy_(own).expand(sig.shape)


def dense(sig: Sig) -> Sig:
    """Return the signature of a contiguous tensor of this shape."""
    return make_sig(sig.shape, contiguous_stride(sig.shape), sig.dtype, sig.device)


def row_sig(sig: Sig) -> Sig:
    """Return the signature of one row of a contiguous stack."""
    shape = sig.shape[1:]
    return make_sig(shape, contiguous_stride(shape), sig.dtype, sig.device)


def results_as(body: Program, wanted: Sequence[Sig]) -> Program:
    """Return the body with its first results laid out as these signatures."""
    if all(o.meta["val"] is v for o, v in zip(body.outputs, wanted, strict=False)):
        return body
    with paused_gc():
        b = builder()
        outs = b.inlined(body, b.inputs(body.placeholders))
        for k, v in enumerate(wanted):
            outs[k] = laid_out(b, outs[k], v, exactly=True)
        return Program(b.finish(outs), body.n_inputs, body.n_outputs, (), body.name)


def with_constants(body: Program, places: Sequence[int], consts: Sequence[Sig]) -> Program:
    """Return the body with these constants, for its own at ``places``, and other inputs."""

    def make() -> Program:
        with paused_gc():
            b = builder()
            given = [b.placeholder("const", sig) for sig in consts]
            rest = b.inputs(body.placeholders[len(places) :])
            outs = b.inlined(body, [*[given[i] for i in places], *rest])
            return Program(b.finish(outs), len(given) + len(rest), len(outs), (), body.name)

    return body.once(("constants", *places, *consts), make)


def own_memory(body: Program, carry: Sequence[Tensor]) -> list[Tensor]:
    """Return the values to carry, copied if they may show an input's memory, or another's."""

    def find() -> list[bool]:
        seen = set(body.placeholders)
        flags = []
        for o in body.outputs[: len(carry)]:
            root = storage_root(o)
            flags.append(root in seen)
            seen.add(root)
        return flags

    shared = body.once(("shared memory", len(carry)), find)
    return [x.clone() if yes else x for x, yes in zip(carry, shared, strict=True)]

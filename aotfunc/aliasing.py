"""Which results of a function are views, and of what; they are made outside the compiled graph.

A view that leaves a compiled graph would be a mere piece of memory. Made by the view's own ops from the input, or from
the result it is a view of, it is one for autograd too: later writes are seen through all of its aliases, as in eager.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from .backends.eager import compile_graph
from .graph import Program, output_node
from .trace.emit import Builder, paused_gc
from .trace.shapes import Facts
from .transforms.walk import builder

aten = torch.ops.aten


def viewed(n: Node) -> Node | None:
    """The node that ``n`` is a view of."""
    if n.target is operator.getitem and is_view(n.args[0]):
        n = n.args[0]  # type: ignore[assignment]
    return n.args[Facts(n.target).view_of] if is_view(n) else None  # type: ignore[index,return-value]


def is_view(n: Any) -> bool:
    return isinstance(n.target, OpOverload) and Facts(n.target).view_of is not None


def without_views(program: Program, shares: dict[int, int]) -> tuple[Program, Callable[..., tuple] | None]:
    """``(program, views)``: a program that returns no views and no value twice, and ``views(*inputs, *its results)``,
    run after written inputs have been updated, for the results of the old one (None where nothing changes).

    ``shares``: for each result that shares memory with an input, the position of that input's placeholder.
    """
    outs = output_node(program.graph).args[0]
    results, finals = outs[: program.n_outputs], outs[program.n_outputs :]
    placeholders = program.placeholders
    with paused_gc():
        b = Builder(None, merge=False)
        made: dict[tuple, Any] = {}
        new = [b.placeholder(p.name, p.meta["val"]) for p in placeholders]
        inputs = dict(zip(placeholders, new, strict=True))
        written = {o: new[i] for i, o in zip(program.mutated, finals, strict=True) if isinstance(o, Node)}
        roots: dict[Node, Node] = {}

        def source(o: Node, i: int) -> tuple[Node, list[Node]]:
            """The value that result i is to be made from, and the view ops between, last first."""
            chain: list[Node] = []
            n = o
            while not (i in shares and n in written):
                above = viewed(n)
                if above is None:
                    break
                chain.append(n)
                n = above
            if i in shares and n in written:
                return written[n], chain
            if n in inputs:
                return inputs[n], chain
            if i in shares:  # a view of what was written through views: it has no chain of its own any more
                val, x = o.meta["val"], new[shares[i]]
                layout = (list(val.shape), list(val.stride), val.offset)
                return b.make("call_function", aten.as_strided.default, (x, *layout), {}, val), []
            if n not in roots:
                roots[n] = b.placeholder(n.name, n.meta["val"])
            return roots[n], chain

        placed = [source(o, i) if isinstance(o, Node) else (o, []) for i, o in enumerate(results)]
        direct = [s for s, chain in placed if not chain]
        if list(roots) == list(results) and len(direct) == len(results):
            return program, None
        final = [follow(b, s, chain, made) for s, chain in placed]
        views = compile_graph(b.finish(final))
        b = builder()
        new = [b.placeholder(p.name, p.meta["val"], role=p.meta.get("role")) for p in placeholders]
        graph = b.finish(b.splice(program.graph, new, (*roots, *finals)))
    return Program(graph, program.n_inputs, len(roots), program.mutated, program.name), views


def follow(b: Builder, source: Any, chain: Sequence[Node], made: dict[tuple, Any]) -> Any:
    """The chain's ops applied to ``source``."""
    x = source
    for n in reversed(chain):
        calls = [n.args[0], n] if n.target is operator.getitem else [n]
        for m in calls:
            key = (m, source)
            if key not in made:
                args = (x, m.args[1]) if m.target is operator.getitem else rewired(m, x)
                made[key] = b.make("call_function", m.target, args, dict(m.kwargs), m.meta["val"])
            x = made[key]
    return x


def rewired(m: Any, x: Any) -> tuple:
    args = list(m.args)
    args[Facts(m.target).view_of] = x  # type: ignore[index]
    return tuple(args)


def apart(program: Program) -> Program:
    """With copies where the new value of a written input is another input, which may be written first."""
    if len(program.mutated) < 2:
        return program
    outs = list(output_node(program.graph).args[0])
    n = program.n_outputs
    inputs = set(program.placeholders)

    def root(o: Any) -> Any:
        while isinstance(o, Node) and (above := viewed(o) if o.op == "call_function" else None) is not None:
            o = above
        return o

    shown = [i for i in range(n, len(outs)) if root(outs[i]) in inputs]
    if not shown:
        return program
    with paused_gc():
        b = builder()
        new = [b.placeholder(p.name, p.meta["val"], role=p.meta.get("role")) for p in program.placeholders]
        results = list(b.splice(program.graph, new, tuple(outs)))
        for i in shown:
            results[i] = b.make("call_function", aten.clone.default, (results[i],), {}, results[i].meta["val"])
        return Program(b.finish(results), program.n_inputs, n, program.mutated, program.name)

"""Which results of a function are views, and of what; they are made outside the compiled graph.

A view that leaves a compiled graph would be a mere piece of memory. Made by the view's own ops from the input, or from
the result it is a view of, it is one for autograd too: later writes are seen through all of its aliases, as in eager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from .backends.eager import compile_graph
from .graph import Program
from .trace.emit import Builder, paused_gc
from .trace.functionalize import hidden_write
from .trace.shapes import Sig
from .transforms.fresh import follow, viewed
from .transforms.walk import builder

aten = torch.ops.aten


def without_views(
    program: Program, groups: Sequence[int], sigs: Sequence[Sig], quiet: bool = False
) -> tuple[Program, Callable[..., tuple] | None]:
    """``(program, views)``: a program that returns no views, no inputs and no value twice, and ``views(*inputs, *its
    results)``, run after written inputs have been updated, for the results of the old one (None where nothing changes).

    ``groups``: for each result the value of the recording whose memory it shares: results of one group alias each
    other, and the input of that number if there is one (closed-over tensors count -1, -2, …); others must not.
    ``sigs``: what each result is in eager, with its place in an input's memory. ``quiet``: captured with gradients
    off, so that results need no ``detach`` of their own.
    """
    outs = program.outputs
    results, finals = [undetached(o, quiet) for o in outs[: program.n_outputs]], outs[program.n_outputs :]
    placeholders = program.placeholders
    with paused_gc():
        b = Builder(None, merge=False)
        made: dict[tuple, Any] = {}
        new = b.inputs(placeholders)
        inputs = dict(zip(placeholders, new, strict=True))
        written = {o: new[i] for i, o in zip(program.mutated, finals, strict=True) if isinstance(o, Node)}
        roots: dict[Node, Node] = {}
        owners: dict[Node, int] = {}

        def result(o: Node, group: int, sig: Sig) -> Node:
            place = group if group >= 0 else program.n_inputs - group - 1
            mine = new[place] if group < program.n_inputs else None
            chain: list[Node] = []
            n = o
            while (above := viewed(n)) is not None and (mine is None or written.get(n) is not mine):
                chain.append(n)
                n = above
            if mine is not None:
                counted = any(m.target is aten.as_strided.default for m in chain)  # in the memory of a value
                if mine is inputs.get(n) or (mine is written.get(n) and not counted):
                    return follow(b, mine, chain, made)
                # a view of what was written through views: it has no chain of its own any more
                layout = (list(sig.shape), list(sig.stride), sig.offset)
                return b.make("call_function", aten.as_strided.default, (mine, *layout), {}, sig)
            if n not in roots:
                roots[n] = b.placeholder(n.name, n.meta["val"])
            source = roots[n]
            if owners.setdefault(n, group) != group:  # rewriting has made them the same: a copy for each group
                if (n, group) not in made:
                    made[n, group] = b.make("call_function", aten.clone.default, (source,), {}, n.meta["val"])
                source = made[n, group]
            return follow(b, source, chain, made)

        final = [result(o, g, s) if isinstance(o, Node) else o for o, g, s in zip(results, groups, sigs, strict=True)]
        copied = [n for n in roots if n in inputs]  # values that are an input's own by now: its value before the writes
        if not copied and final == list(roots.values()) and list(roots) == list(results):
            return program, None
        views = compile_graph(b.finish(final))
        b = builder()
        new = b.inputs(placeholders)
        kept = list(b.splice(program.graph, new, (*roots, *finals)))
        for i, n in enumerate(roots):
            if n in inputs:
                kept[i] = b.make("call_function", aten.clone.default, (kept[i],), {}, n.meta["val"])
        graph = b.finish(kept)
    return Program(graph, program.n_inputs, len(roots), program.mutated, program.name), views


def undetached(o: Any, quiet: bool) -> Any:
    """A result as it was computed, where nobody will look for its derivative."""
    if quiet and isinstance(o, Node) and o.target is aten.detach.default:
        n = o.args[0]
        if n.op == "call_function" and viewed(n) is None and n.target is not hidden_write:  # type: ignore[union-attr]
            return n
    return o


def apart(program: Program, tensors: Sequence[Any], outs: Sequence[Any]) -> Sequence[Any]:
    """The results of a program, with copies where the new value of a written input is, or is a view of, another written
    input: that one may be written first.
    """
    count, mutated = program.n_outputs, program.mutated
    if len(mutated) < 2:
        return outs

    def of_written() -> set[int]:
        placeholders, finals = program.placeholders, program.outputs
        written = {placeholders[i] for i in mutated}
        return {k for k in range(count, len(finals)) if root(finals[k]) in written}

    views = program.once("apart", of_written)
    # what runs inside a nested call is not seen in the graph
    same = {id(tensors[i]) for i in mutated}
    if not views and not any(id(x) in same for x in outs[count:]):
        return outs
    return [x.clone() if k in views or (k >= count and id(x) in same) else x for k, x in enumerate(outs)]


def root(n: Any) -> Any:
    """The node whose memory ``n`` shows."""
    while isinstance(n, Node):
        above = n.args[1] if n.target is hidden_write else viewed(n)
        if above is None:
            break
        n = above
    return n

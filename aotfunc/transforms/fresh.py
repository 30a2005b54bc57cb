"""Give results memory of their own if they must not share it with inputs or one another: rewriting
may have made them the same.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph import Program
from ..trace.emit import Builder, infer_val, paused_gc
from ..trace.node_views import chain_of, storage_root
from ..trace.shapes.sig import Facts
from .walk import builder

aten = torch.ops.aten

#: a result that may share memory with anything
ANYTHING = None


def fresh(
    program: Program, aliases: Iterable[tuple[int, Any]], late: Container[int] = ()
) -> Program:
    """Return the program with copies of outputs that would be an input, a view of one, or show
    another output's memory.

    ``aliases``: pairs of an output and a number. Outputs of one number share their memory, and are
    views of the input of that number if there is one (closed-over tensors count -1, -2, …); those
    without a number share none. Of results that are one value those are copies that are ``late``,
    as they were computed from another."""
    outs = list(program.outputs)
    groups: dict[int, Any] = {i: ("own", i) for i in range(program.n_outputs)} | dict(aliases)
    count = program.n_inputs
    owners: dict[Node, Any] = {
        p: i if i < count else count - i - 1 for i, p in enumerate(program.placeholders)
    }
    clashes = []
    for i in sorted(range(program.n_outputs), key=lambda i: i in late):
        if isinstance(o := outs[i], Node):
            group = groups[i]
            owner = owners.setdefault(storage_root(o), ("own", i) if group is ANYTHING else group)
            if owner != group and group is not ANYTHING:
                clashes.append(i)
    if not clashes:
        return program
    together = Counter(groups.values())
    with paused_gc():
        b = builder()
        placeholders = program.placeholders
        new = b.inputs(placeholders)
        tops = [storage_root(outs[i]) for i in clashes]
        results = list(b.splice(program.graph, new, (*outs, *tops)))
        made: dict[tuple, Any] = {}
        for i, top in zip(clashes, results[len(outs) :], strict=True):
            results[i] = output_copy(
                b, results[i], outs[i], top, groups[i], together[groups[i]] == 1, made
            )
        return Program(
            b.finish(results[: len(outs)]),
            count,
            program.n_outputs,
            program.mutated,
            f"fresh {program.name}",
        )


def output_copy(
    b: Builder, x: Node, out: Node, top: Node, group: Any, alone: bool, made: dict
) -> Node:
    """Return a copy of ``x``. If others share its memory, or a plain copy would have other
    strides, copy the root ``top`` and replay the views."""
    val = out.meta["val"]
    if x is not top and not (alone and infer_val(aten.clone.default, (x,), {}) is val):
        chain = chain_of(out)
        if (top, group) not in made:
            made[top, group] = copy_of(b, top)
        memory = made[top, group]
        if memory.meta["val"] is top.meta["val"] and not any(
            n.target is aten.as_strided.default for n in chain
        ):
            return replay_views(b, memory, chain, made)
    if (x, group) not in made:
        made[x, group] = copy_of(b, x)
    return made[x, group]


def copy_of(b: Builder, x: Node) -> Node:
    return b.make(
        "call_function", aten.clone.default, (x,), {}, infer_val(aten.clone.default, (x,), {})
    )


# ----- views -------------------------------------------------------------------------------------


def replay_views(b: Builder, source: Any, chain: Sequence[Node], made: dict[tuple, Any]) -> Any:
    """Return the chain's ops applied to ``source``."""
    x = source
    for n in reversed(chain):
        calls = [n.args[0], n] if n.target is operator.getitem else [n]
        for m in calls:
            key = (m, source)
            if key not in made:
                taken = m.target is operator.getitem
                args = (x, m.args[1]) if taken else rewired(m, x)  # type: ignore[union-attr]
                val = m.meta["val"]  # type: ignore[union-attr]
                kwargs = dict(m.kwargs)  # type: ignore[union-attr]
                made[key] = b.make("call_function", m.target, args, kwargs, val)  # type: ignore
            x = made[key]
    return x


def rewired(m: Any, x: Any) -> tuple:
    args = list(m.args)
    args[Facts(m.target).view_of] = x  # type: ignore[index]
    return tuple(args)

"""Give results nodes of their own where autograd is to record the ops of a program.

Rewriting may let derivatives read a result that nothing reads in eager mode: a gradient that is a
saved value, or one of two equal values that are computed once. The caller's hooks on it, and
writes to it, must not act there."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..capture.makers import UNREAD, made_in, maker, unread_in
from ..graph import Program, draws, op_of
from ..trace.emit import Builder, infer_val, paused_gc, remap
from ..trace.shapes.sig import Facts
from .meetings import is_saved

aten = torch.ops.aten


def may_lack_nodes(program: Program) -> list[int]:
    """Return the results that other nodes may read, or other ops make, than in eager mode."""

    def find() -> list[int]:
        outs, unread, found = program.outputs, unread_in(program), []
        for k, name in enumerate(made_in(program)[: program.n_outputs]):
            o = outs[k]
            if not isinstance(o, Node) or o.op != "call_function":
                continue
            other = name == UNREAD or maker(o) != name
            if other or (k in unread and (len(o.users) > 1 or outs.count(o) > 1)):
                found.append(k)
        return found

    return program.once(may_lack_nodes, find) if "made" in program.cache else []


def with_own_nodes(program: Program) -> Program:
    """Return the program with other nodes for results that derivatives would pass again here, and
    not in eager mode: copies, or the same op once more if that saves its result."""
    return program.once(with_own_nodes, lambda: rebuilt_apart(program))


def rebuilt_apart(program: Program) -> Program:
    outs, made, nodes = program.outputs, made_in(program), {*program.graph.nodes}
    with paused_gc():
        b = Builder(None, merge=False)
        placeholders = program.placeholders
        env = dict(zip(placeholders, b.inputs(placeholders), strict=True))
        b.copy([n for n in program.graph.nodes if n.op == "call_function"], env)
        results = list(remap(outs, env))
        for k in may_lack_nodes(program):
            o, name = outs[k], made[k]
            x = o.args[0] if o.target is aten.clone.default and maker(o) != name else o
            op, kept = op_of(x), is_saved(x, nodes)
            if kept and maker(x) == name and not draws(op):
                again = b.call_like(op, env)
                results[k] = again if op is x else b.item(again, x.args[1])
            elif x is o and (kept or len(o.users) > 1 or outs.count(o) > 1):
                results[k] = copy_or_view(b, env[o])
        return Program(
            b.finish(results), program.n_inputs, program.n_outputs, program.mutated, program.name
        )


def copy_or_view(b: Builder, x: Node) -> Node:
    """Return a copy of a value; a view of one that is a view, or has the strides of no copy."""
    copy = aten.clone.default
    val = infer_val(copy, (x,), {})
    view = getattr(Facts(op_of(x).target), "view_of", None) is not None
    if view or val is not x.meta["val"]:
        copy, val = aten.alias.default, x.meta["val"]
    return b.make("call_function", copy, (x,), {}, val)

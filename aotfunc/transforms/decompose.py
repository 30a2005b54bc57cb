"""Opens ops up: each op in a table is replaced by what its function does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from ..graph import Program
from ..trace.emit import Builder, carried, paused_gc, remap
from .rules.table import full_args
from .walk import builder, traced


def decomposed(program: Program, table: dict[OpOverload, Callable]) -> Program:
    """The program with the table's ops opened up, again and again until none is left."""
    with paused_gc():
        b = builder()
        env: dict[Node, Any] = {}
        for n in program.graph.nodes:
            if n.op == "placeholder":
                env[n] = b.placeholder(n.name, n.meta["val"], role=n.meta.get("role"))
        copy(b, program.graph.nodes, env, table, 0)
        outs = remap(program.outputs, env)
        return Program(b.finish(outs), program.n_inputs, program.n_outputs, program.mutated, "decompose")


def copy(b: Builder, nodes: Any, env: dict[Node, Any], table: dict, depth: int) -> None:
    for n in nodes:
        if n.op != "call_function":
            continue
        b.meta = carried(n)
        body = table.get(n.target) if depth < 20 else None
        if body is None:
            env[n] = b.node(
                n.target, remap(n.args, env), {k: remap(v, env) for k, v in n.kwargs.items()}, n.meta["val"]
            )
            continue
        names = [a.name for a in n.target._schema.arguments]
        keywords = {a.name for a in n.target._schema.arguments if a.kwarg_only}
        args = remap(tuple(full_args(n.target, n.args, n.kwargs)), env)

        def call(*values: Any, body: Any = body, names: Any = names, keywords: Any = keywords) -> Any:
            positional = [v for k, v in zip(names, values, strict=True) if k not in keywords]
            named = {k: v for k, v in zip(names, values, strict=True) if k in keywords and v is not None}
            return body(*positional, **named)

        inner = builder()
        holes: dict[Node, Node] = {}

        def hole(a: Any, inner: Any = inner, holes: Any = holes) -> Any:
            if isinstance(a, list | tuple):
                return [hole(x) for x in a]
            if isinstance(a, Node):
                if a not in holes:
                    holes[a] = inner.placeholder("x", a.meta["val"])
                return holes[a]
            return a

        outs = traced(call)(inner, *[hole(a) for a in args])
        sub: dict[Node, Any] = {p: a for a, p in holes.items()}
        if any(m.target is n.target for m in inner.graph.nodes):
            copy(b, inner.graph.nodes, sub, {}, depth)
        else:
            copy(b, inner.graph.nodes, sub, table, depth + 1)
        env[n] = remap(outs, sub)

"""Open ops up: replace each op in a table by the ops of its function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..cache import remembered
from ..errors import GraphError
from ..graph import Program
from ..trace.emit import Builder, paused_gc, remap
from ..trace.node_views import storage_root
from ..trace.shapes.sig import Sig
from ..trace.views import laid_out
from .fresh import output_copy
from .rules.schema import full_args
from .walk import as_graph, builder, traced

aten, prims = torch.ops.aten, torch.ops.prims


def decomposed(program: Program, table: dict[OpOverload, Callable]) -> Program:
    """Return the program with the table's ops opened up, repeatedly until none is left.

    Values keep their dtypes and strides: later nodes, and a backward half that is compiled
    separately, rely on these."""
    with paused_gc():
        b, env = builder(), dict[Node, Any]()
        copy_opened(b, program.graph.nodes, env, table)
        outs = separate_outputs(b, program.outputs, env)
        return Program(
            b.finish(outs), program.n_inputs, program.n_outputs, program.mutated, "decompose"
        )


def copy_opened(b: Builder, nodes: Any, env: dict[Node, Any], table: dict, depth: int = 0) -> None:
    """Copy nodes as :meth:`Builder.copy` does, with the table's ops opened up."""

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        body = table.get(n.target) if depth < 20 else None
        if body is None:
            return NotImplemented
        op: Any = n.target
        args = remap(full_args(op, n.args, n.kwargs), env)
        inner, outs, given = as_graph(traced(by_schema(op, body), opened=table), args)
        outs, sub = as_declared(inner, outs, n.meta["val"], op), dict[Node, Any](given)
        for m in inner.graph.nodes:
            m.meta["line"] = n.meta.get("line")
        again = any(m.target is op for m in inner.graph.nodes)
        copy_opened(b, inner.graph.nodes, sub, {} if again else table, depth + 1)
        return remap(outs, sub)

    b.copy(nodes, env, visit)


def separate_outputs(b: Builder, outs: Sequence, env: dict[Node, Any]) -> list:
    """Return the outputs, copied if one shows other memory than before, as ``cat`` of one."""
    owners = {new: old for old, new in env.items() if old.op == "placeholder"}
    new = remap(list(outs), env)
    for i, (old, mine) in enumerate(zip(outs, new, strict=True)):
        if isinstance(mine, Node) and owners.setdefault(
            storage_root(mine), storage_root(old)
        ) is not storage_root(old):
            new[i] = output_copy(b, mine, mine, storage_root(mine), i, True, {})
    return new


def by_schema(op: OpOverload, body: Callable) -> Callable:
    """Return ``body`` as a function of all the schema's arguments, called as decompositions are:
    without trailing defaults, and by keyword where it must be."""
    schema = op._schema.arguments
    keywords = {a.name for a in schema if a.kwarg_only} | keywords_of(body)

    def call(*values: Any) -> Any:
        given = list(zip(schema, values, strict=True))
        positional = [(a, v) for a, v in given if a.name not in keywords]
        while positional and is_default(*positional[-1]):
            positional.pop()
        named = {a.name: v for a, v in given if a.name in keywords and not is_default(a, v)}
        return body(*[v for _, v in positional], **named)

    return call


@remembered(1024)
def keywords_of(body: Callable) -> frozenset[str]:
    try:
        parameters = inspect.signature(body).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def is_default(argument: Any, value: Any) -> bool:
    if not argument.has_default_value():
        return False
    default = argument.default_value
    return value is default or (
        type(value) is type(default) and not isinstance(value, Node) and value == default
    )


def as_declared(b: Builder, out: Any, val: Any, op: OpOverload) -> Any:
    """Return a decomposition's results with the dtypes and strides of the op's own."""
    if isinstance(val, tuple):
        items: Sequence = (
            out if isinstance(out, list | tuple) else [b.item(out, i) for i in range(len(val))]
        )
        return [as_declared(b, o, v, op) for o, v in zip(items, val, strict=True)]
    if out.__class__ is not Node or val.__class__ is not Sig:
        return out
    if out.meta["val"].dtype is not val.dtype:
        source = (
            out.args[0]
            if out.target in (aten._to_copy.default, prims.convert_element_type.default)
            else None
        )
        if source is not None and source.meta["val"].dtype is val.dtype:
            out = source  # skip the rounding on the way
        else:
            out = b.call(aten._to_copy.default, out, dtype=val.dtype)
    if out.meta["val"].shape != val.shape:
        shapes = f"shape {list(out.meta['val'].shape)}, the op itself {list(val.shape)}"
        raise GraphError(f"the decomposition of {op} returns a tensor of {shapes}")
    return laid_out(b, out, val)

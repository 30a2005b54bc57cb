"""Tell what may be done with a node: whether it is a view, a draw, an effect, and whether it may
run twice and its value be saved.

Everything here is asked of schemas, tags and metadata. The only names are of ops whose schema does
not tell."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..graph import acting, acts, drawing, draws
from ..trace.dtensors import mesh_and_placements
from ..trace.shapes.sig import Facts
from ..transforms.rules.layouts import from_local, gather, scatter, to_local

#: libraries whose functional ops compute the same from the same inputs, unless tagged as random
TRUSTED = frozenset({"aten", "prims", "prim", "aotfunc"})
#: ops that return a view without saying so in the schema
SILENT_VIEWS = (torch.ops.aten._unsafe_view.default, torch.ops.aten.lift_fresh.default)

#: metadata that says of one node what the schema does not
MARKS = frozenset(("random", "effect"))

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float)


def is_view(n: Node) -> bool:
    """Return whether the value shares an input's storage, as views and their parts do."""
    op = n.target
    if isinstance(op, OpOverload):
        return views(op)
    return op is operator.getitem and n.args[0].__class__ is Node and is_view(n.args[0])


@cache
def views(op: OpOverload) -> bool:
    """Return whether the op makes views."""
    return Facts(op).view_of is not None or op in SILENT_VIEWS


def base(n: Node) -> Node:
    """Return the node that owns the storage of ``n``, found by following views."""
    while is_view(n):
        n = n.all_input_nodes[0]
    return n


def is_random(n: Node) -> bool:
    """Return whether the node draws random numbers."""
    return draws(n) or bool(n.meta.get("random") or getattr(n.target, "random", False))


def has_effect(n: Node) -> bool:
    """Return whether running the node is seen outside: it writes, prints, checks, communicates."""
    if n.op != "call_function":
        return n.op in ("call_method", "call_module")
    told = n.meta.get("effect") or getattr(n.target, "effect", False)
    return acts(n) or bool(told)


def writes(n: Node) -> bool:
    """Return whether the node writes one of its arguments."""
    return isinstance(n.target, OpOverload) and n.target._schema.is_mutable


def is_pinned(n: Node) -> bool:
    """Return whether the node must run in order, even unread: it draws or has an effect."""
    if isinstance(n.target, OpOverload) and silent(n.target) and MARKS.isdisjoint(n.meta):
        return False
    return n.op not in ("placeholder", "get_attr", "output") and (is_random(n) or has_effect(n))


@cache
def silent(op: OpOverload) -> bool:
    """Return whether no call of the op draws or has an effect, unless it or its node is marked."""
    marked = any([getattr(op, mark, False) for mark in MARKS])
    return drawing(op) is None and not acting(op) and not marked


@cache
def vouched(op: OpOverload) -> bool:
    """Return whether the op is known to compute the same from the same inputs, unless it draws."""
    return op.namespace in TRUSTED or torch.Tag.pointwise in op.tags


def region(n: Node) -> Any:
    """Return the checkpointed region that the node lies in, or None."""
    return n.meta.get("recompute", n.meta.get("region", n if gathers_again(n) else None))


def is_together(n: Node) -> bool:
    """Return whether the node is one of several that are one collective."""
    return n.target in (gather, scatter)


def is_uneven(n: Node) -> bool:
    """Return whether the processes hold parts of other sizes of what the node takes apart or puts
    together."""
    if n.target not in (to_local, from_local):
        return False
    x, shape, _, where, _ = n.args
    if n.target is to_local:
        shape = x.meta["val"].shape  # type: ignore[union-attr]
    mesh, placements = mesh_and_placements(where)  # type: ignore[arg-type]
    parts: dict[int, int] = {}
    for count, p in zip(mesh.shape, placements, strict=True):
        if hasattr(p, "dim"):
            parts[p.dim] = parts.get(p.dim, 1) * count
    return any([shape[d] % count for d, count in parts.items()])  # type: ignore[index, operator]


def computed_of_parts(nodes: Sequence[Node]) -> set[Node]:
    """Return the nodes that compute with what one process holds, by itself."""
    found: set[Node] = set()
    for n in nodes:
        if n.target is to_local or (
            n.target is not from_local and not found.isdisjoint(n.all_input_nodes)
        ):
            found.add(n)
    return found


def gathers_again(n: Node) -> bool:
    """Return whether the node gathers parts that the backward is to gather again."""
    return n.target is gather and bool(n.args[-1])


def reads_gathered(n: Node) -> bool:
    """Return whether a node computes with a value that is gathered again."""
    return not is_view(n) and any([gathers_again(base(i)) for i in n._input_nodes])


def once(n: Node) -> bool:
    """Return whether the node may run only once, because a second run could give another value or
    be seen."""
    op = n.target
    known = not isinstance(op, OpOverload) or vouched(op) or region(n) is not None
    return not known or (is_pinned(n) and not gathers_again(n))


def is_symbol(n: Node) -> bool:
    """Return whether the value is a number (a size, an expression of sizes) and no tensor."""
    return isinstance(n.meta.get("val"), SYMBOLS)


def is_single(n: Node) -> bool:
    """Return whether the value is one tensor or number; of tuples the parts are saved."""
    return n.meta.get("val") is not None and not isinstance(n.meta["val"], tuple | list)


def made_at(n: Node) -> str | None:
    """Return the user's source line that made the node."""
    line = n.meta.get("line")
    return None if line is None else str(line)

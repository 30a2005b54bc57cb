"""What may be done with a node: is it a view, a draw, an effect; may it run twice; may its value
be saved?

Everything here is asked of schemas, tags and metadata. The only names are of ops whose schema does
not tell."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

#: libraries whose functional ops compute the same from the same inputs, unless tagged as random
TRUSTED = frozenset({"aten", "prims", "prim", "aotfunc"})
#: libraries whose functional-looking ops talk to other processes: never moved out of the forward,
#: never doubled
COLLECTIVE = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
#: ops that return a view without saying so in the schema
SILENT_VIEWS = frozenset({"aten::_unsafe_view"})

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float)


@dataclass(frozen=True, slots=True)
class Traits:
    """What the schema and the tags of one overload say."""

    view: bool
    random: bool
    #: (position, name, value): the op draws nothing if one of these arguments has that value
    unless: tuple[tuple[int, str, Any], ...]
    effect: bool
    #: writes one of its arguments
    writes: bool
    #: nothing is known about it beyond its schema (a user's op)
    unknown: bool
    pointwise: bool


@cache
def traits(op: OpOverload) -> Traits:
    """The facts of ``op``, read once."""
    schema, tags = op._schema, op.tags
    aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
    random = torch.Tag.nondeterministic_seeded in tags or any(
        "Generator" in str(a.type) for a in schema.arguments
    )
    silent = {"dropout_p": 0, "dropout": 0, "train": False, "training": False}
    return Traits(
        view=schema.name in SILENT_VIEWS
        or (bool(aliases) and not any(a.is_write for a in aliases)),
        random=random,
        unless=tuple(
            (i, a.name, silent[a.name]) for i, a in enumerate(schema.arguments) if a.name in silent
        ),
        effect=schema.is_mutable or not schema.returns or op.namespace in COLLECTIVE,
        writes=schema.is_mutable,
        unknown=op.namespace not in TRUSTED and torch.Tag.pointwise not in tags,
        pointwise=torch.Tag.pointwise in tags,
    )


def is_view(n: Node) -> bool:
    """Whether the value shares the storage of an input: views, the parts of a multi-output
    view."""
    if n.target is operator.getitem:
        return n.args[0].__class__ is Node and is_view(n.args[0])  # type: ignore[arg-type]
    return n.target.__class__ is OpOverload and traits(n.target).view


def base(n: Node) -> Node:
    """The node that owns the storage of ``n``: views followed to what they are views of."""
    while is_view(n):
        n = n.all_input_nodes[0]
    return n


def is_random(n: Node) -> bool:
    """Whether the node draws random numbers; attention with ``dropout_p=0``, dropout with
    ``train=False`` do not."""
    if n.target.__class__ is not OpOverload:
        return bool(n.meta.get("random") or getattr(n.target, "random", False))
    f = traits(n.target)
    if not f.random:
        return bool(n.meta.get("random"))
    for i, name, value in f.unless:
        default = n.target._schema.arguments[i].default_value
        given = n.args[i] if i < len(n.args) else n.kwargs.get(name, default)
        if given is not None and given.__class__ is not Node and given == value:
            return False
    return True


def has_effect(n: Node) -> bool:
    """Whether running the node is seen outside: it writes, prints, checks, communicates."""
    if n.op != "call_function":
        return n.op in ("call_method", "call_module")
    known = n.target.__class__ is OpOverload and traits(n.target).effect
    return known or bool(n.meta.get("effect") or getattr(n.target, "effect", False))


def writes(n: Node) -> bool:
    """Whether the node writes one of its arguments."""
    return n.target.__class__ is OpOverload and traits(n.target).writes


def is_pinned(n: Node) -> bool:
    """Whether the node must run where ``f`` ran it, in order though it may not be read: draws and
    effects."""
    return n.op not in ("placeholder", "get_attr", "output") and (is_random(n) or has_effect(n))


def region(n: Node) -> Any:
    """The checkpointed region that the node lies in, or None."""
    return n.meta.get("recompute", n.meta.get("region"))


def once(n: Node) -> bool:
    """Whether the node may run only once, because a second run could give another value or be
    seen."""
    unknown = n.target.__class__ is OpOverload and traits(n.target).unknown and region(n) is None
    return unknown or is_pinned(n)


def is_symbol(n: Node) -> bool:
    """Whether the value is a number (a size, an expression of sizes) and no tensor."""
    return isinstance(n.meta.get("val"), SYMBOLS)


def is_single(n: Node) -> bool:
    """Whether the value is one tensor or number; tuples are not saved, their parts are."""
    return n.meta.get("val") is not None and not isinstance(n.meta["val"], tuple | list)


def made_at(n: Node) -> str | None:
    """The user's source line that made the node."""
    line = n.meta.get("line")
    return None if line is None else str(line)

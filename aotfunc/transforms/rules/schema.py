"""Questions about an op's schema: its overloads, its tensor arguments, and a call with all
arguments in order; ops of ours by their schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

aten = torch.ops.aten

Formula = Callable[..., Any]


def overload(op: OpOverload | OpOverloadPacket) -> OpOverload:
    """Return the overload that ``op`` names: itself, or a packet's ``default``."""
    return op.default if isinstance(op, OpOverloadPacket) else op


@cache
def tensor_args(op: OpOverload) -> tuple[int, ...]:
    """Return positions of the schema's tensor arguments, optional ones and lists too."""
    kinds = ("Tensor", "Optional[Tensor]", "List[Tensor]", "List[Optional[Tensor]]")
    return tuple(i for i, a in enumerate(op._schema.arguments) if str(a.type) in kinds)


def full_args(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return all arguments of the schema in order, keyword-only ones too, defaults filled in."""
    rest = defaults(op)[len(args) :]
    return [*args, *[kwargs.get(name, default) for name, default in rest]]


@cache
def defaults(op: OpOverload) -> list[tuple[str, Any]]:
    """Return the names and defaults of the schema's arguments in order."""
    return [(a.name, a.default_value) for a in op._schema.arguments]


def call_op(op: OpOverload, args: Sequence[Any]) -> Any:
    """Call ``op`` with all its schema arguments given in order."""
    names = [a.name for a in op._schema.arguments if a.kwarg_only]
    split = len(args) - len(names)
    return op(*args[:split], **dict(zip(names, args[split:], strict=True)))


def overloads_named(*names: str) -> Any:
    """List the overloads of these names that this build of torch has."""
    found = []
    for name in names:
        packet, _, which = name.partition(".")
        if hasattr(aten, packet) and (which or "default") in getattr(aten, packet).overloads():
            found.append(getattr(getattr(aten, packet), which or "default"))
    return found


def op_of_graphs(
    library: torch.library.Library, alone: Callable, schema: str, meta: Callable
) -> OpOverload:
    """Define an op that stands in graphs and never runs: ``alone`` raises, ``meta`` infers."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, alone, "CompositeExplicitAutograd")
    library.impl(name, meta, "Meta")
    return getattr(getattr(torch.ops, library.ns), name).default

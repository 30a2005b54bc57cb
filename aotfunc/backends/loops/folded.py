"""Compute values that are the same at every call once, when the graph is compiled.

Later calls read their memory: a value stays a call if it is returned, or if a reader may return or
write it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx import Node

from ..eager import OURS
from .fuse import keeps_its_turn
from .launch import Launch
from .memory import OWN_MEMORY

#: larger values are computed at each call: compiled code should hold little memory
MOST = 1 << 20


def fold(graph: fx.Graph, ours: tuple[type, ...]) -> None:
    """Compute the graph's constant values; kernels and targets in ``ours`` have no effects."""
    known: dict[Node, Any] = {}
    for n in graph.nodes:
        if n.op == "call_function" and all(m in known for m in n.all_input_nodes):
            if pure(n, ours) and (value := try_to_compute(n, known)) is not None:
                known[n] = value
    if not known:
        return
    owner: Any = graph.owning_module
    for n in reversed(graph.nodes):
        if n not in known:
            continue
        if not n.users:  # only known nodes read it
            graph.erase_node(n)
        elif isinstance(known[n], Tensor) and all(map(only_reads, n.users)):
            name = f"folded_{n.name}"
            setattr(owner, name, known[n])
            with graph.inserting_before(n):
                constant = graph.create_node("get_attr", name, (), {}, name=name)
            constant.meta = dict(n.meta)
            n.replace_all_uses_with(constant)
            graph.erase_node(n)


def pure(n: Node, ours: tuple[type, ...]) -> bool:
    if isinstance(n.target, (Launch, *ours)) or n.target is operator.getitem:
        return True
    return (
        isinstance(n.target, OpOverload)
        and n.target.namespace in ("aten", "prims")
        and not n.target._schema.is_mutable
        and not keeps_its_turn(n)
    )


def try_to_compute(n: Node, known: dict[Node, Any]) -> Any:
    """Compute the value. Return None if it is large, is not as the graph says, or cannot be
    computed: then the call raises the error."""
    said = n.meta.get("val")
    if isinstance(said, Tensor) and said.numel() * said.element_size() > MOST:
        return None
    args, kwargs = fx.map_arg((n.args, n.kwargs), known.__getitem__)
    try:
        with torch.inference_mode(False), torch.no_grad():
            value = n.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:
        return None
    if not isinstance(said, Tensor):
        return value
    return value if type(value) is Tensor and metadata_of(value) == metadata_of(said) else None


def metadata_of(t: Tensor) -> tuple:
    return tuple(t.shape), t.stride(), t.dtype, t.device


def only_reads(u: Node) -> bool:
    """Return whether a node neither returns nor writes the memory of its arguments."""
    if isinstance(u.target, Launch):
        return True
    return (
        isinstance(u.target, OpOverload)
        and u.target.namespace in OURS
        and OWN_MEMORY.get(u.target) is not False
        and all(a.alias_info is None for a in u.target._schema.arguments)
    )

"""Find the node that a node of a graph is a view of."""

from __future__ import annotations

import operator
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from .shapes.sig import Facts


def calls_view(n: Any) -> bool:
    return isinstance(n.target, OpOverload) and Facts(n.target).view_of is not None


def view_source(n: Node) -> Node | None:
    """Return the node that ``n`` is a view of."""
    if n.op != "call_function":
        return None
    if n.target is operator.getitem and calls_view(n.args[0]):
        n = n.args[0]  # type: ignore[assignment]
    return n.args[Facts(n.target).view_of] if calls_view(n) else None  # type: ignore


def chain_of(n: Node) -> list[Node]:
    """Return the views from ``n`` to the node whose memory it shows, last one first."""
    chain: list[Node] = []
    while (above := view_source(n)) is not None:
        chain.append(n)
        n = above
    return chain


def storage_root(n: Any) -> Any:
    """Return the node whose memory ``n`` shows; a number returns itself."""
    while isinstance(n, Node) and (above := view_source(n)) is not None:
        n = above
    return n


def counts_from_storage(n: Node) -> bool:
    """Return whether an offset of the node counts from the storage."""
    return isinstance(n.target, OpOverload) and Facts(n.target).strided

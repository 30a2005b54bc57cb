"""Describe nodes so that others which form the same kernel are described the same."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from .members import seen_through


def description(nodes: Sequence[Node], stored: Sequence[Node]) -> Hashable:
    """Return all that :func:`~.builder.build_kernel` reads of these nodes, but for their names."""
    numbers: dict[Node, int] = {}
    found: list[Any] = []

    def number(n: Node) -> int:
        """Return the node's number; describe it if it has none."""
        if n not in numbers:
            known = n in inside or seen_through(n)
            what = (n.target, described(n.args), described(n.kwargs)) if known else None
            numbers[n] = len(found)
            found.append((what, layouts_of(n)))
        return numbers[n]

    def described(a: Any) -> Hashable:
        if isinstance(a, Node):
            return number(a)
        if isinstance(a, dict):
            return (*a, *map(described, a.values()))
        if isinstance(a, list | tuple):
            return tuple(map(described, a))
        return repr(a)  # 1, 1.0 and True are equal, 0.0 and -0.0, too

    inside = set(nodes)
    order = tuple(map(number, nodes))
    return order, tuple(map(number, stored)), tuple(found)


def layouts_of(n: Node) -> Hashable:
    """Return the shape, strides and dtype of a node's value, or of each of its parts."""
    val = n.meta.get("val")
    known, found = n.meta.get("signature", (None, None))
    if found is None or known is not val:  # passes copy what is said of a node, with another value
        parts = val if isinstance(val, list | tuple) else [val]
        found = tuple(
            [(t.shape, t.stride(), t.dtype) if isinstance(t, Tensor) else t for t in parts]
        )
        n.meta["signature"] = val, found
    return found

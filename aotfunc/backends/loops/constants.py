"""Recognise nodes that hold one number."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

#: op -> the number that fills its result, or that argument's position
FULL: dict[Any, Any] = {
    aten.full.default: lambda size, value, **_: value,
    aten.full_like.default: lambda x, value, **_: value,
    aten.new_full.default: lambda x, size, value, **_: value,
    aten.scalar_tensor.default: lambda value, **_: value,
    aten.zeros.default: lambda size, **_: 0,
    aten.ones.default: lambda size, **_: 1,
    aten.zeros_like.default: lambda x, **_: 0,
    aten.zero.default: lambda x: 0,
    aten.fill.Scalar: lambda x, value: value,
    aten.ones_like.default: lambda x, **_: 1,
    aten.new_zeros.default: lambda x, size, **_: 0,
    aten.new_ones.default: lambda x, size, **_: 1,
}


def constant(n: Any) -> bool | int | float | complex | None:
    """Return the number that fills a node; None if none is known."""
    if not isinstance(n, Node) or n.op != "call_function" or n.target not in FULL:
        return None
    value = FULL[n.target](*n.args, **n.kwargs)
    return value if isinstance(value, bool | int | float | complex) else None

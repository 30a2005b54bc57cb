"""Find ops that have, by definition, another derivative than that of their values."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from ..graph import Program


def defines_derivative(program: Program) -> bool:
    """Return whether a program has such an op: an embedding whose padding learns nothing, or
    whose gradient is scaled by frequency, or a quantisation that passes the gradient on."""
    return any(of_node(n) for n in program.graph.nodes if isinstance(n.target, OpOverload))


def of_node(n: Node) -> bool:
    op: Any = n.target
    name = op._schema.name.removeprefix("aten::").lstrip("_")
    names = (a.name for a in op._schema.arguments)
    given = {**dict(zip(names, n.args, strict=False)), **n.kwargs}
    return (
        name.startswith("fake_quantize")
        or (name == "embedding" and given.get("padding_idx", -1) >= 0)
        or given.get("scale_grad_by_freq") is True
    )

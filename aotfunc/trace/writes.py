"""Find functional forms of ops that write."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import Line, at
from ..errors import CaptureError
from .emit import Builder
from .shapes.sig import Facts

aten = torch.ops.aten


def _filled(b: Builder, x: Node, value: Any) -> Node:
    if isinstance(value, Node):
        return value
    return b.call(aten.full_like.default, x, value)


def _filled_diagonal(b: Builder, x: Node, value: Any, wrap: bool = False) -> Node:
    rows, columns = x.meta["val"].shape
    if wrap and rows > columns:
        raise CaptureError(
            "fill_diagonal_(wrap=True) of a tall matrix has no functional form here"
        )
    line = b.call(aten.diagonal.default, x)
    return b.call(aten.diagonal_scatter.default, x, b.call(aten.full_like.default, line, value))


def _drawn_in_place(b: Builder, x: Node, p: float = 0.5, generator: Any = None) -> Node:
    """Draw in memory order, as in place; the functional op draws in the order of dimensions."""
    sig = x.meta["val"]
    order = sorted(range(sig.ndim), key=lambda d: (-sig.stride[d], sig.shape[d] == 1))
    if order == sorted(order):
        return b.call(aten.bernoulli.p, x, p, generator=generator)
    draw = b.call(aten.bernoulli.p, b.call(aten.permute.default, x, order), p, generator=generator)
    return b.call(aten.permute.default, draw, sorted(order, key=order.__getitem__))


def _integers(b: Builder, x: Node, low: int, high: int | None, generator: Any = None) -> Node:
    """Call ``random.from``, whose name is a keyword of Python."""
    if high is None:
        return b.call(getattr(aten.random, "from"), x, low, high, generator=generator)
    if generator is None:
        return b.call(aten.randint_like.low_dtype, x, low, high)
    return b.call(aten.add.Tensor, b.call(aten.random.to, x, high - low, generator=generator), low)


def _eye(b: Builder, n: int, m: int | None = None, *, out: Node) -> Node:
    sig = out.meta["val"]
    return b.call(aten.eye.m, n, n if m is None else m, dtype=sig.dtype, device=sig.device)


#: in-place op -> its functional form, if that has another name
WRITES: dict[OpOverload, Any] = {
    aten.copy_.default: lambda b, x, source, non_blocking=False: source,
    aten.eye.out: _eye,
    aten.eye.m_out: _eye,
    aten.zero_.default: lambda b, x: _filled(b, x, 0),
    aten.fill_.Scalar: _filled,
    aten.fill_.Tensor: _filled,
    aten.fill_diagonal_.default: _filled_diagonal,
    aten._index_put_impl_.default: lambda b, x, indices, values, accumulate=False, unsafe=False: (
        b.call(aten.index_put.default, x, indices, values, accumulate)
    ),
    aten.normal_.default: lambda b, x, *a, **k: b.call(aten.normal_functional.default, x, *a, **k),
    aten.bernoulli_.float: _drawn_in_place,
    getattr(aten.random_, "from"): _integers,
    aten.relu_.default: lambda b, x: b.call(aten.relu.default, x),
    aten.polygamma_.default: lambda b, x, n: b.call(aten.polygamma.default, n, x),
}


@cache
def twin_of(op: OpOverload) -> OpOverload | None:
    """Return the overload that returns what ``op`` writes: it has the same arguments but the
    ``out``s, and no trailing underscore."""
    if op in (aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default):
        return aten.rrelu_with_noise_functional.default
    name = op._schema.name.split("::")[1]
    namespace = getattr(torch.ops, op.namespace)
    out_form = all(
        a.kwarg_only or not (a.alias_info and a.alias_info.is_write) for a in op._schema.arguments
    )
    packet = getattr(namespace, name if out_form else name.removesuffix("_"), None)
    if packet is None:
        return None
    wanted = [
        (a.name, str(a.type))
        for a in op._schema.arguments
        if not (out_form and a.alias_info and a.alias_info.is_write)
    ]
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if Facts(candidate).writes:
            continue
        has = [(a.name, str(a.type)) for a in candidate._schema.arguments]
        if has == wanted or [t for _, t in has] == [t for _, t in wanted]:
            return candidate
    return None


def functional_twin(op: OpOverload, line: Line | None) -> OpOverload:
    """Return the form of an op that writes nothing. Raises CaptureError if there is none."""
    twin = twin_of(op)
    if twin is None:
        raise CaptureError(
            f"{op} writes to its argument and has no functional form{at(line)}; use an op that "
            "returns"
        )
    return twin

"""Tell the dtype that each op of a kernel computes in, and convert values to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from .ir import ROUNDED, Apply, Cast, Const, Expr, Given, Load, Unfit, function_of, number, wide

#: dtypes of the tensors that kernels read and write
DTYPES = (
    *(torch.float32, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float16, torch.complex64, torch.complex128),
)

#: integers of the second dtype are computed as the first, so that they fill as many lanes as
#: floats
NARROW = (torch.int32, torch.int64)


def working(kind: str, n: Node, out: torch.dtype) -> torch.dtype:
    """Return the dtype that an op computes in. Raises Unfit for one without a body."""
    parts = [d for a in n.args if isinstance(a, Node) and (d := a.meta["val"].dtype).is_complex]
    if kind in ("float", "any") and parts and not out.is_complex:
        return parts[0]
    if kind in ("compare", "truth"):
        values = [a.meta["val"] if isinstance(a, Node) else a for a in n.args]
        common = values[0].dtype if len(values) == 1 else torch.result_type(*values)
        if common not in DTYPES:
            raise Unfit(f"{common} is not computed with")
        return torch.bool if kind == "truth" else common
    right = {
        "float": out.is_floating_point or out.is_complex,
        "any": out is not torch.bool,
        "bits": not (out.is_floating_point or out.is_complex),
    }
    if not right.get(kind, True):
        raise Unfit(f"{n.target} of {out}")
    return out


def real(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a value, or its real part, is computed in."""
    return dtype.to_real() if dtype.is_complex else wide(dtype)


def integer(nodes: Sequence[Node]) -> torch.dtype:
    """Return the dtype of indices: one that fills as many lanes as the values, and holds them."""
    dtypes = {real(n.meta["val"].dtype) for n in nodes}
    if torch.float64 in dtypes or (torch.int64 in dtypes and torch.float32 not in dtypes):
        return torch.int64
    for val in [m.meta["val"] for n in nodes for m in (n, *n.all_input_nodes)]:
        if sum([(size - 1) * s for size, s in zip(val.shape, val.stride(), strict=True)]) >> 30:
            return torch.int64
    return torch.int32


def as_given(a: Any) -> Any:
    """Return a number of the graph as an argument of the kernel."""
    return Given(a) if isinstance(a, float) or (type(a) is int and abs(a) < 2**53) else a


def cast(value: Expr, dtype: torch.dtype) -> Expr:
    """Return the value in this dtype, rounded or wrapped."""
    if dtype in ROUNDED:
        if isinstance(value, Const):
            return number(Given(value.value) if value.given else value.value, dtype)
        value = cast(value, torch.float32)
        exact = isinstance(value, Apply) and value.fn == ROUNDED[dtype]
        return value if exact else function_of(ROUNDED[dtype], value)
    if value.dtype is dtype:
        return value
    if isinstance(value, Load) and (dtype, value.dtype) == NARROW:
        return Load(dtype, value.access, value.shift, value.mask)
    if isinstance(value, Const) and dtype.is_floating_point:
        return number(Given(value.value) if value.given else value.value, dtype)
    return Cast(dtype, value)

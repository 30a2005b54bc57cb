"""Decompose ops on lists of tensors into ops on each element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .schema import aten
from .table import decompose_as

#: ``_foreach_<name>`` is ``aten.<name>`` on each element; all elements share numbers and single
#: tensors
NAMES = """
abs acos add addcdiv addcmul asin atan ceil clamp_max clamp_min clone copy cos cosh div erf erfc
exp expm1 floor frac lerp lgamma log log10 log1p log2 max maximum minimum mm mul neg norm pow
powsum reciprocal round rsqrt sigmoid sign sin sinh sqrt sub tan tanh trunc zero
""".split()


def bounded(best: Any) -> Any:
    return lambda x, y: best(
        x, y if isinstance(y, Tensor) else torch.scalar_tensor(y, dtype=x.dtype, device=x.device)
    )


#: name -> the form on one tensor, if that is not ``aten.<name>``
OTHERWISE = {
    "max": lambda x: aten.max(x),
    "maximum": bounded(aten.maximum),
    "minimum": bounded(aten.minimum),
    "clamp_max": lambda x, y: aten.clamp_max(x, y),
    "clamp_min": lambda x, y: aten.clamp_min(x, y),
    "norm": lambda x, ord, dtype: aten.linalg_vector_norm(x, ord, dtype=dtype),
    "powsum": lambda x, ord, dtype: aten.linalg__powsum(x, ord, dtype=dtype),
    "addcmul": lambda x, y, z, value: (
        torch.addcmul(x, y, z, value=value) if is_number(value) else x + value * y * z
    ),
    "addcdiv": lambda x, y, z, value: (
        torch.addcdiv(x, y, z, value=value) if is_number(value) else x + value * y / z
    ),
    "clone": lambda x, memory_format=None: aten.clone(x, memory_format=memory_format),
    "add": lambda x, y, alpha=1: torch.add(x, y, alpha=alpha),
    "sub": lambda x, y, alpha=1: torch.sub(x, y, alpha=alpha),
}


def is_number(value: Any) -> bool:
    return not isinstance(value, Tensor)


def on_each(op: OpOverload, one: Any) -> Any:
    """Return ``op`` on each element. A tensor of scalars (``addcmul.Tensor``) has one for each."""
    names = [a.name for a in op._schema.arguments]
    lists = {a.name for a in op._schema.arguments if str(a.type).startswith("List")}

    def body(*args: Any, **named: Any) -> list:
        full = dict(zip(names, args, strict=False)) | named
        if is_number(full.get("scalars", 0)):
            each = lists
        else:
            full["scalars"], each = full["scalars"].unbind(0), {*lists, "scalars"}
        size = max(len(v) for k, v in full.items() if k in lists)
        return [one(*(v[i] if k in each else v for k, v in full.items())) for i in range(size)]

    return body


for name in NAMES:
    packet = getattr(aten, f"_foreach_{name}", None)
    for which in packet.overloads() if packet is not None else ():
        op = getattr(packet, which)
        if not op._schema.is_mutable:
            decompose_as(op, on_each(op, OTHERWISE.get(name) or getattr(aten, name)))

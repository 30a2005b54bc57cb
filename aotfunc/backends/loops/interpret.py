"""Kernels computed in plain torch: what every printer is checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ir import FUNCTIONS, REDUCTIONS, Apply, Cast, Const, Expr, Kernel, Load, Reduce, walk


def interpret(kernel: Kernel, tensors: Sequence[Tensor]) -> None:
    """Fill the outputs among ``tensors``, one for each access."""
    values: dict[Expr, Tensor] = {}
    inner = tuple(range(kernel.outer, len(kernel.extents)))

    def at(i: int) -> Tensor:
        t, access = tensors[i], kernel.accesses[i]
        return t.as_strided(kernel.extents, access.strides, t.storage_offset())

    def value(e: Expr) -> Tensor:
        if isinstance(e, Const):
            return torch.tensor(e.value, dtype=e.dtype)
        if isinstance(e, Load):
            return at(e.access)
        args = [values[a] for a in e.args]
        if isinstance(e, Cast):
            return args[0].to(e.dtype)
        if isinstance(e, Reduce):
            whole = args[0].expand(kernel.extents)
            if e.fn in ("any", "all", "prod"):  # these take one axis at a time
                for k in inner:
                    whole = REDUCTIONS[e.fn](whole, dim=k, keepdim=True)
                return whole
            return REDUCTIONS[e.fn](whole, dim=inner, keepdim=True)
        assert isinstance(e, Apply)
        return FUNCTIONS[e.fn](*args)

    for e in walk([s.value for s in kernel.stores]):
        values[e] = value(e)
    for s in kernel.stores:
        out, found = at(s.access), values[s.value]
        for k in inner:  # a reduction's value is stored once
            if not kernel.accesses[s.access].strides[k]:
                out = out.narrow(k, 0, 1)
                found = found.narrow(k, 0, 1) if found.dim() else found
        out.copy_(found.expand(out.shape))

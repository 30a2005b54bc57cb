"""Kernels computed in plain torch, as a reference for the printer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aotfunc.backends.loops.blocks import ROWS
from aotfunc.backends.loops.ir import (
    FUNCTIONS,
    REDUCTIONS,
    Access,
    Apply,
    Cast,
    Const,
    Expr,
    Kernel,
    Load,
    Position,
    Prefix,
    Ramp,
    Reduce,
    walk,
)

SCANS: dict[str, Any] = {
    "sum": torch.cumsum,
    "prod": torch.cumprod,
    "max": lambda x, dim: torch.cummax(x, dim).values,
    "min": lambda x, dim: torch.cummin(x, dim).values,
    "logsumexp": torch.logcumsumexp,
}


def interpret(kernel: Kernel, tensors: Sequence[Tensor]) -> None:
    """Fill the outputs among ``tensors``, one for each access."""
    tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    values: dict[Expr, Tensor] = {}
    inner = tuple(range(kernel.outer, len(kernel.extents)))
    last = len(kernel.extents) - 1

    def at(i: int) -> Tensor:
        t, access = tensors[i], kernel.accesses[i]
        return t.as_strided(kernel.extents, access.strides, t.storage_offset())

    def affine(walked: Access | Ramp) -> Tensor:
        total = torch.tensor(walked.start).expand(kernel.extents)
        for k, (n, step) in enumerate(zip(kernel.extents, walked.strides, strict=True)):
            total = total + torch.arange(n).unflatten(0, (n, *[1] * (last - k))) * step
        return total

    def places(i: int) -> Tensor:
        return affine(kernel.accesses[i]) + tensors[i].storage_offset()

    def memory(i: int) -> Tensor:
        t = tensors[i]
        return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)

    def load(e: Load) -> Tensor:
        if not e.args and not kernel.accesses[e.access].start:
            return at(e.access).to(e.dtype)
        place = places(e.access)
        if e.shift is not None:
            place = place + values[e.shift]
        if e.mask is not None:
            place = place.where(values[e.mask], 0)
        found = memory(e.access)[place].to(e.dtype)
        return found if e.mask is None else found.where(values[e.mask], 0)

    def value(e: Expr) -> Tensor:
        if isinstance(e, Const):
            return torch.tensor(e.value, dtype=e.dtype)
        if isinstance(e, Load):
            return load(e)
        if isinstance(e, Position):
            return affine(kernel.ramps[e.ramp]).to(e.dtype)
        args = [values[a] for a in e.args]
        if isinstance(e, Cast):
            return args[0].to(e.dtype)
        if isinstance(e, Prefix):
            return SCANS[e.fn](args[0].expand(kernel.extents), dim=last).to(e.dtype)
        if isinstance(e, Reduce):
            whole = args[0].expand(kernel.extents)
            if e.fn in ("any", "all", "prod"):  # these take one axis at a time
                for k in inner:
                    whole = REDUCTIONS[e.fn](whole, dim=k, keepdim=True)
                return whole
            return REDUCTIONS[e.fn](whole, dim=inner, keepdim=True)
        assert isinstance(e, Apply)
        return FUNCTIONS[e.fn](*args)

    for e in walk(kernel.values):
        values[e] = value(e)
    for s in kernel.stores:
        if s.shift is not None:
            place = affine(kernel.accesses[s.access]) + values[s.shift]
            found = values[s.value]
            for k in inner:
                if k not in kernel.axes(s.shift) and not kernel.accesses[s.access].strides[k]:
                    place, found = place.narrow(k, 0, 1), found.expand(place.shape).narrow(k, 0, 1)
            flat = tensors[s.access].view(-1)
            flat.zero_().index_put_((place,), found.expand(place.shape), accumulate=True)
            continue
        if s.blocks:
            rows = values[s.value].expand(kernel.extents).flatten(0, kernel.outer - 1)
            found = torch.stack([block.sum(0) for block in rows.split(ROWS)])
            tensors[s.access].view(found.shape).copy_(found)
            continue
        where, found = places(s.access), values[s.value].expand(kernel.extents)
        for k in inner:  # a reduction's value is stored once
            if not kernel.accesses[s.access].strides[k]:
                where, found = where.narrow(k, 0, 1), found.narrow(k, 0, 1)
        out = memory(s.access)
        out[where] = found.to(out.dtype)

"""Find the greatest and the least of some elements, and their positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir import ROUNDED
from ..scans import running_max, running_min

#: dtypes whose positions are int32, and int64, as wide as they are; PyTorch's own search through
#: int32 is faster
NARROW = (torch.float32, *ROUNDED)
WIDE = (torch.float64, torch.int64)


def first_position(x: Tensor, dims: list[int], best: Tensor) -> Tensor:
    """Return the first position, along one dimension or all, of the best element or NaN."""
    count = x.shape[dims[0]] if len(dims) == 1 else x.numel()
    places = torch.arange(count, dtype=torch.int32 if x.dtype in NARROW else torch.int64)
    places = places.view(*[n if d in dims else 1 for d, n in enumerate(x.shape)])
    here = x == best
    if x.is_floating_point():
        here = here | x.isnan()
    return torch.where(here, places, count).amin(dims, keepdim=True).long()


def supported(x: Tensor) -> bool:
    return x.dtype in (*NARROW, *WIDE) and 0 < x.numel() < 2**31 and x.dim() > 0


def arg(best: str) -> Any:
    def body(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        if not supported(x):
            return NotImplemented
        dims = list(range(x.dim())) if dim is None else [dim % x.dim()]
        found = first_position(x, dims, getattr(x, best)(dims, keepdim=True))
        return found if keepdim else found.squeeze(dims)

    return body


def with_positions(best: str) -> Any:
    def body(x: Tensor, dim: int, keepdim: bool = False) -> Any:
        if not supported(x):
            return NotImplemented
        dims = [dim % x.dim()]
        value = getattr(x, best)(dims, keepdim=True)
        found = first_position(x, dims, value)
        return (value, found) if keepdim else (value.squeeze(dims), found.squeeze(dims))

    return body


def running_extreme(best: Any) -> Any:
    """Return the body of an op that gives the best of the elements up to each one, and the
    position of the last such. PyTorch's own is faster along contiguous elements."""

    def body(x: Tensor, dim: int) -> Any:
        if not supported(x) or x.stride(dim) == 1:
            return NotImplemented
        value = best(x, dim)
        places = torch.arange(
            x.shape[dim], dtype=torch.int32 if x.dtype in NARROW else torch.int64
        )
        places = places.view(*[-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
        here = x == value
        if x.is_floating_point():
            here = here | x.isnan()
        return value, running_max(torch.where(here, places, 0), dim).long()

    return body


cummax, cummin = running_extreme(running_max), running_extreme(running_min)

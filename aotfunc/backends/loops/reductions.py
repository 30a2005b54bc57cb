"""Describe ops that make one element of many: the function, and the dimensions to reduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Reduction:
    """``fn`` over ``dims`` (all if there are none), divided by their size for a ``mean``."""

    fn: str
    dims: Sequence[int] = ()
    keepdim: bool = False
    mean: bool = False


def reduction_of(fn: str, mean: bool = False) -> Callable[..., Reduction]:
    def asked(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Reduction:
        dims = [dim] if isinstance(dim, int) else dim or ()
        return Reduction(fn, dims, keepdim, mean)

    return asked


REDUCTIONS: dict[Any, Callable[..., Reduction]] = {
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), reduction_of("sum")),
    **dict.fromkeys((aten.mean.default, aten.mean.dim), reduction_of("sum", mean=True)),
    **dict.fromkeys((aten.prod.default, aten.prod.dim_int), reduction_of("prod")),
    **dict.fromkeys((aten.amax.default, aten.max.default), reduction_of("max")),
    **dict.fromkeys((aten.amin.default, aten.min.default), reduction_of("min")),
    **dict.fromkeys((aten.any.default, aten.any.dim, aten.any.dims), reduction_of("any")),
    **dict.fromkeys((aten.all.default, aten.all.dim, aten.all.dims), reduction_of("all")),
}

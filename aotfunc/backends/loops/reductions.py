"""Ops that make one element of many, by what they do with which dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Reduction:
    """``fn`` over ``dims`` (all where there are none), divided by their size for a ``mean``."""

    fn: str
    dims: Sequence[int] = ()
    keepdim: bool = False
    mean: bool = False


def over(fn: str, mean: bool = False) -> Callable[..., Reduction]:
    def asked(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Reduction:
        dims = [dim] if isinstance(dim, int) else dim or ()
        return Reduction(fn, dims, keepdim, mean)

    return asked


REDUCTIONS: dict[Any, Callable[..., Reduction]] = {
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), over("sum")),
    **dict.fromkeys((aten.mean.default, aten.mean.dim), over("sum", mean=True)),
    **dict.fromkeys((aten.prod.default, aten.prod.dim_int), over("prod")),
    **dict.fromkeys((aten.amax.default, aten.max.default), over("max")),
    **dict.fromkeys((aten.amin.default, aten.min.default), over("min")),
    **dict.fromkeys((aten.any.default, aten.any.dim, aten.any.dims), over("any")),
    **dict.fromkeys((aten.all.default, aten.all.dim, aten.all.dims), over("all")),
}

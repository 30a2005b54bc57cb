"""Look indices up in a kernel, and state the bounds that they must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .classes import class_of
from .ir import Expr, Given, Load, Requirement, Unfit, function_of, number
from .places import Place, index_along
from .views import source_of, source_place, static_shape

if TYPE_CHECKING:
    from .builder import KernelBuilder
    from .indexed import At


def index_of(
    work: KernelBuilder, n: Node, at: At, low: int, high: int, error: Callable[[int], Exception]
) -> Expr:
    """Return an element of a tensor of indices, with the requirement to be in range. Raises Unfit
    for indices that are not in memory."""
    e = work.value(n, at.place, at.mask)
    if not isinstance(e, Load) or e.shift is not None:
        raise Unfit("indices that are computed")
    if e.dtype not in (torch.int64, torch.int32):
        raise Unfit(f"indices of {e.dtype}")
    memory = work.accesses[e.access].tensor
    if memory.target is not class_of and (n, low, high) not in work.checks:
        work.checks[n, low, high] = check_of(n, memory, low, high, error)
    key = (e, "index")
    if key not in work.values:
        work.values[key] = Load(work.integer, e.access, None, e.mask)
    return work.values[key]


def wrapped(work: KernelBuilder, found: Expr, size: int) -> Expr:
    """Return the index, counted from the end if it is negative."""
    if (found, size, "wrapped") not in work.values:
        end = found + number(Given(size), work.integer)
        work.values[found, size, "wrapped"] = function_of("where", found < 0, end, found)
    return work.values[found, size, "wrapped"]


def check_of(n: Node, tensor: Node, low: int, high: int, error: Any) -> Requirement:
    """Return what a view of a tensor in memory requires. Raises Unfit for a copy."""
    shape = static_shape(n)
    place: Place = tuple([index_along(d) for d in range(len(shape))])
    while n is not tensor:
        if (source := source_of(n)) is None:
            raise Unfit("indices that are computed")
        place, n = source_place(n, place, shape), source
    strides, start = [0] * len(shape), 0
    for index, stride in zip(place, n.meta["val"].stride(), strict=True):
        start += index.start * stride
        for d, step in index.steps:
            strides[d] += step * stride  # type: ignore[index]
    for d, stride in enumerate(strides):
        if stride < 0:  # from the other end
            strides[d], start = -stride, start + stride * (shape[d] - 1)
    return Requirement(tensor, (shape, tuple(strides), start), low, high, error)

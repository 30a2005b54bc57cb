"""Lower ops that read a tensor between or beyond its elements: resized, or padded by its own.

The kernel computes the place of each element read, which its formula keeps inside: indices and
weights are those of PyTorch's kernels. One op resizes one dimension, so that an image is resized
by two kernels, each of which reads few elements for one.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from .blocks import meta_like
from .dtypes import cast
from .functions import absolute, fn, maximum, minimum, where
from .indexed import At, looked_up
from .ir import Expr, Given, Operand, Unfit, function_of, number
from .places import Index
from .views import static_shape, with_index

if TYPE_CHECKING:
    from .builder import KernelBuilder

aten = torch.ops.aten

# --- the ops ---

_library = torch.library.Library("aotfunc", "FRAGMENT")
_how = "int dim, int size, float scale, bool corners, bool cubic"
_library.define(f"resized(Tensor x, {_how}) -> Tensor")
_library.define(f"resized_backward(Tensor g, {_how}) -> Tensor")


def resize(x: Tensor, dim: int, size: int, scale: float, corners: bool, cubic: bool) -> Tensor:
    """Return ``x`` with ``size`` elements along a dimension, each ``scale`` elements of ``x``
    apart: interpolated, linear or ``cubic``, between ``corners`` or centres."""
    op = aten.upsample_bicubic2d if cubic else aten.upsample_bilinear2d
    return in_rows(x, dim, lambda x: op(x, [1, size], corners, None, 1 / scale if scale else None))


def resize_backward(
    g: Tensor, dim: int, size: int, scale: float, corners: bool, cubic: bool
) -> Tensor:
    op = aten.upsample_bicubic2d_backward if cubic else aten.upsample_bilinear2d_backward
    factor, n = 1 / scale if scale else None, g.shape[dim]
    return in_rows(g, dim, lambda g: op(g, [1, n], [*g.shape[:3], size], corners, None, factor))


def in_rows(x: Tensor, dim: int, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``f``, of an image of one row, applied to all rows along a dimension."""
    rows = x.movedim(dim, -1)
    y = f(rows.reshape(1, -1, 1, rows.shape[-1]))
    return y.view(*rows.shape[:-1], -1).movedim(-1, dim).contiguous()


def meta_resized(x: Tensor, dim: int, size: int, *how: Any) -> Tensor:
    return meta_like(x, (*x.shape[:dim], size, *x.shape[dim + 1 :]))


for _name, _impl in (("resized", resize), ("resized_backward", resize_backward)):
    _library.impl(_name, _impl, "CPU")
    _library.impl(_name, meta_resized, "Meta")
resized = torch.ops.aotfunc.resized.default
resized_backward = torch.ops.aotfunc.resized_backward.default

# --- their rules ---


#: what PyTorch's compiled kernels round once, where the processor can: an infinity tells whether
#: its weight rounds to 0
fma = fn("fma")


def clamped_index(i: Expr, size: int) -> Expr:
    return minimum(maximum(i, 0), Given(size - 1))


def read_position(i: Expr, dtype: torch.dtype, scale: float, corners: bool) -> Expr:
    """Return the position in the tensor that element ``i`` is read at."""
    x = cast(i, dtype)
    if corners:
        return x * Given(scale)
    return fma(x + 0.5, Given(scale), -0.5)


def weighted_elements(
    i: Expr, dtype: torch.dtype, n: int, size: int, scale: float, corners: bool, cubic: bool
) -> list[tuple[Expr, Operand]]:
    """List the elements (of ``n``) summed for element ``i`` of ``size``, and their weights."""
    if n == size and not cubic:
        return [(i, 1.0), (i, 0.0)]  # as in eager, infinity gives NaN
    x = read_position(i, dtype, scale, corners)
    x = x if cubic else maximum(x, 0)
    below = function_of("floor", cast(x, torch.float32))  # also of float64
    first = minimum(cast(below, i.dtype), Given(n - 1))
    far = minimum(maximum(x - cast(first, dtype), 0), 1)
    if not cubic:
        return [(first, 1 - far), (clamped_index(first + 1, n), far)]
    weights = [keys_outer(far + 1), keys_inner(far), keys_inner(1 - far), keys_outer(1 - far + 1)]
    return [(clamped_index(first + k, n), w) for k, w in enumerate(weights, -1)]


def keys_inner(x: Expr) -> Expr:
    """Return Keys' cubic kernel, with a = -0.75, for distances up to 1."""
    return fma(1.25, x, -2.25) * x * x + 1


def keys_outer(x: Expr) -> Expr:
    """Return Keys' cubic kernel for distances from 1 to 2."""
    return fma(fma(-0.75, x, 3.75), x, -6) * x + 3


def in_one_dim(work: KernelBuilder, at: At, x: Node, dim: int, size: int, *how: Any) -> Expr:
    index, dtype, n = at.place[dim], x.meta["val"].dtype, static_shape(x)[dim]
    key = (weighted_elements, index, dtype, n, size, how)
    if key not in work.values:
        read = weighted_elements(work.position(index), dtype, n, size, *how)
        work.values[key] = [(looked_up(i), w) for i, w in read]
    return functools.reduce(
        operator.add,
        [work.value(x, with_index(at.place, dim, i), at.mask) * w for i, w in work.values[key]],
    )


def in_one_dim_back(work: KernelBuilder, at: At, g: Node, dim: int, n: int, *how: Any) -> Expr:
    """Sum the cotangents of the elements that read an element, times its weight in each."""
    scale, corners, cubic = how
    size, dtype = static_shape(g)[dim], g.meta["val"].dtype
    here = work.position(at.place[dim])
    count = most_made(size, scale, cubic)
    first: Expr = number(0, here.dtype)
    if count < size:
        centre = 0 if corners else 0.5
        before = cast(here, dtype) + (centre - (2 if cubic else 1))
        start = function_of("floor", before * Given(1 / scale) - centre)
        first = clamped_index(cast(start, here.dtype), size - count + 1)
    parts = []
    for k in range(count):
        i = first + k
        value = work.value(g, with_index(at.place, dim, looked_up(i)), at.mask)
        parts += [
            where(function_of("eq", j, here), value * w, 0)
            for j, w in weighted_elements(i, dtype, n, size, *how)
        ]
    return functools.reduce(operator.add, parts)


def most_made(size: int, scale: float, cubic: bool) -> int:
    """Return how many of ``size`` elements may read one element; one more for rounding."""
    return min(size, math.ceil((4 if cubic else 2) / scale) + 2 if scale else size)


def nearest(exact: bool) -> Callable[..., Expr]:
    """Return the rule of an op that reads the nearest element, or the one before."""

    def rule(
        work: KernelBuilder, at: At, x: Node, size: Sequence[int], *given: float | None
    ) -> Expr:
        place, shape = list(at.place), static_shape(x)
        scales = [*given, *[None] * len(size)]
        for d, (n, m, s) in enumerate(zip(shape[2:], size, scales, strict=False), 2):
            if x.meta["val"].dtype is not torch.float32 or (s and m in (n, 2 * n) and s * n != m):
                raise Unfit("indices that PyTorch computes in several ways")
            place[d] = index_from(work, place[d], nearest_index, n, 1 / s if s else n / m, exact)
        return work.value(x, tuple(place), at.mask)

    return rule


def nearest_index(i: Expr, n: int, scale: float, exact: bool) -> Expr:
    x = cast(i, torch.float32)
    at = function_of("floor", (x + 0.5 if exact else x) * Given(scale))
    return minimum(cast(at, i.dtype), Given(n - 1))


def reflected(i: Expr, size: int) -> Expr:
    last = Given(size - 1)
    return last - absolute(last - absolute(i))


def padding_rule(inside: Callable[[Expr, int], Expr]) -> Callable[..., Expr]:
    """Return the rule of a padding that reads element ``inside(index, size)``."""

    def rule(work: KernelBuilder, at: At, x: Node, pad: Sequence[int]) -> Expr:
        place, shape = list(at.place), static_shape(x)
        for i in range(len(pad) // 2):
            d = len(place) - 1 - i
            if pad[2 * i] or pad[2 * i + 1]:
                place[d] = index_from(work, place[d].shifted(-pad[2 * i]), inside, shape[d])
        return work.value(x, tuple(place), at.mask)

    return rule


def index_from(work: KernelBuilder, index: Index, of: Callable[..., Expr], *how: Any) -> Index:
    """Return the index that is this function of another one."""
    key = (index, of, how)
    if key not in work.values:
        work.values[key] = of(work.position(index), *how)
    return looked_up(work.values[key])


#: ops that read several elements for each result
SUMMED = (resized, resized_backward)

RESIZED: dict[Any, Callable[..., Expr]] = {
    resized: in_one_dim,
    resized_backward: in_one_dim_back,
    **{
        getattr(aten, f"{name}{n}d").default: nearest(exact)
        for name, exact in (("upsample_nearest", False), ("_upsample_nearest_exact", True))
        for n in (1, 2, 3)
    },
    **{getattr(aten, f"reflection_pad{n}d").default: padding_rule(reflected) for n in (1, 2, 3)},
    **{
        getattr(aten, f"replication_pad{n}d").default: padding_rule(clamped_index)
        for n in (1, 2, 3)
    },
}

"""Rules of products and cumulative ops along a dimension: prod, cumprod, cumsum, logcumsumexp,
cummax, cummin.

No rule divides by the input, so zeros are no special case, at any order of derivative.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .batching import shifted
from .reduce import as_vectors, unreduced
from .schema import aten
from .table import along_dims, jvp_of, linear, vjp_of, vmap_of

# ----- cumulative extremes: the values are the input at the indices ------------------------------


@vjp_of(aten.cummax, aten.cummin, diff_outputs=(0,))
def _(g: Any, outs: Any, x: Tensor, dim: int) -> list[Tensor]:
    return [torch.zeros_like(g[0]).scatter_add(dim, outs[1], g[0])]


@jvp_of(aten.cummax, aten.cummin)
def _(tangents: tuple[Tensor], outs: Any, x: Tensor, dim: int) -> tuple[Tensor, None]:
    return tangents[0].gather(dim, outs[1]), None


for op in (aten.cummax.default, aten.cummin.default):
    vmap_of(op)(shifted(op, "dim"))


# ----- products and sums -------------------------------------------------------------------------


#: most numbers whose product is differentiated factor by factor
FEW = 10


def moved_along(x: Tensor, step: int, fill: float) -> Tensor:
    """Return ``x[…, k - step]`` at ``k``, along the last dimension; ``fill`` for none."""
    return aten.constant_pad_nd(x, [step, -step], fill)


def products_before(x: Tensor) -> Tensor:
    """Return the product of the elements before each one along the last dimension."""
    return moved_along(x, 1, 1).cumprod(-1)


def weighted_after(g: Tensor, weight: Tensor) -> Tensor:
    """Solve ``s[k] = g[k] + weight[k] s[k + 1]`` in log2(n) steps without a division."""
    length, step = g.shape[-1], 1
    while step < length:
        g = g + weight * moved_along(g, -step, 0)
        weight = weight * moved_along(weight, -step, 0)
        step *= 2
    return g


@vjp_of(aten.prod)
def _(g: Tensor, out: Tensor, x: Tensor) -> list[Tensor]:
    return [g * prod_of_others(x.reshape(-1)).reshape(x.shape).conj()]


@vjp_of(aten.prod.dim_int)
def _(g: Tensor, out: Tensor, x: Tensor, dim: int, keepdim: bool) -> list[Tensor]:
    others = (
        prod_of_others(x.transpose(dim, -1)).transpose(dim, -1) if x.dim() else torch.ones_like(x)
    )
    return [unreduced(g, x, dim, keepdim) * others.conj()]


def prod_of_others(x: Tensor) -> Tensor:
    """Return the product of all other elements of a row, right for zeros: no ``out / x``."""
    if x.shape[-1] == 0:
        return x
    if x.dim() == 1 and len(x) <= FEW:
        return products_of_others(x.unbind())
    return products_before(x) * products_before(x.flip(-1)).flip(-1)


def products_of_others(factors: tuple[Tensor, ...]) -> Tensor:
    """Return for each factor the product of all others, in products of two: derivatives stay
    products, computed once, where those of a scan would grow tenfold."""
    one = torch.ones_like(factors[0])
    before = [one, *itertools.accumulate(factors[:-1], torch.mul)]
    after = [one, *itertools.accumulate(factors[:0:-1], torch.mul)]
    return torch.stack([x * y for x, y in zip(before, reversed(after), strict=True)])


@vjp_of(aten.cumprod)
def _(g: Tensor, out: Tensor, x: Tensor, dim: int) -> list[Tensor]:
    if x.dim() == 0 or x.numel() == 0:
        return [g]
    x, g = x.transpose(dim, -1).conj(), g.transpose(dim, -1)
    return [(products_before(x) * weighted_after(g, moved_along(x, -1, 0))).transpose(dim, -1)]


vmap_of(aten.prod)(lambda x, dtype: aten.prod.dim_int(as_vectors(x), 1, dtype=dtype))
for op in (aten.prod.dim_int, aten.cumprod.default):
    vmap_of(op)(shifted(op, "dim"))
linear(
    aten.cumsum,
    lambda g, x, dim: g.flip(dim).cumsum(dim).flip(dim) if x.dim() else g,
    batch=shifted(aten.cumsum, "dim"),
)


def exponentials(x: Tensor, out: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return ``exp(x[k] - out[k])`` and the factors ``exp(out[k] - out[k + 1])`` (``step`` -1) or
    ``exp(out[k - 1] - out[k])`` (1). None overflows, as ``out`` does not decrease; zero where
    there is no mass yet (``out`` is -inf)."""
    empty = torch.real(out) == -math.inf
    other = moved_along(out, step, math.inf if step < 0 else -math.inf)
    decay = out - other if step < 0 else other - out
    return (x - out).masked_fill(empty, -math.inf).exp(), decay.masked_fill(empty, -math.inf).exp()


@vjp_of(aten.logcumsumexp, aten._logcumsumexp)
def _(g: Tensor, out: Tensor, x: Tensor, dim: int) -> list[Tensor]:
    """Return the weights ``exp(x[k] - out[j])``, as products."""
    if x.dim() == 0 or x.numel() == 0:
        return [g]
    x, g, out = x.transpose(dim, -1), g.transpose(dim, -1), out.transpose(dim, -1)
    own, decay = exponentials(x, out, -1)
    return [(own.conj() * weighted_after(g, decay.conj())).transpose(dim, -1)]


@jvp_of(aten.logcumsumexp, aten._logcumsumexp)
def _(tangents: tuple[Tensor], out: Tensor, x: Tensor, dim: int) -> Tensor:
    if x.dim() == 0 or x.numel() == 0:
        return tangents[0]
    x, t, out = x.transpose(dim, -1), tangents[0].transpose(dim, -1), out.transpose(dim, -1)
    own, decay = exponentials(x, out, 1)
    return weighted_after((own * t).flip(-1), decay.flip(-1)).flip(-1).transpose(dim, -1)


for op in (aten.logcumsumexp.default, aten._logcumsumexp.default):
    vmap_of(op)(shifted(op, "dim"))
along_dims(aten.prod.dim_int, aten.cumprod, aten.cumsum, aten.logcumsumexp)

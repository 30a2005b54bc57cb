"""The cheapest order of a product of tensors, and the product computed in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

#: Costs count multiply-adds of a matrix product; reading or writing an element takes as long as a
#: few of these, one of a kernel's loop as two, a call as thousands.
MOVED, LOOPED, CALL = 4, 2, 2000

Labels = tuple[int, ...]
#: the place of a factor, or the two halves of a product
Order = Any


class Plan(NamedTuple):
    """A product of tensors: their labels, its own, the extents of all, and what happens to the
    result. Labels are numbered by their place in ``extents``."""

    factors: tuple[Labels, ...]
    inverse: tuple[bool, ...]
    out: Labels
    shape: tuple[int, ...]
    extents: tuple[int, ...]
    scale: float
    square: bool
    rooted: bool


@lru_cache(1 << 12)
def cheapest(factors: tuple[Labels, ...], out: Labels, extents: tuple[int, ...]) -> tuple:
    """``(cost, order)`` of the best of all ways to multiply two and two."""
    every = (1 << len(factors)) - 1
    count = lambda labels: math.prod([extents[k] for k in labels])

    def labels(part: int) -> frozenset[int]:
        """Those that this part of the factors has when all others are summed away."""
        inside, outside = set[int](), set(out)
        for i, f in enumerate(factors):
            (inside if part >> i & 1 else outside).update(f)
        return frozenset(inside & outside)

    left = {part: labels(part) for part in range(1, every + 1)}
    best: dict[int, tuple[float, Order]] = {}
    for part in range(1, every + 1):
        if part & (part - 1) == 0:
            i = part.bit_length() - 1
            summed = len(left[part]) < len(set(factors[i]))
            best[part] = (CALL + count(factors[i]) if summed else 0), i
            continue
        ways = []
        half = (part - 1) & part
        while half:
            other = part ^ half
            if half > other:
                cost = pair_cost(left[half], left[other], left[part], count)
                first, second = best[half], best[other]
                ways.append((cost + first[0] + second[0], (first[1], second[1])))
            half = (half - 1) & part
        best[part] = min(ways, key=lambda way: way[0])
    return best[every]


def pair_cost(x: frozenset[int], y: frozenset[int], out: frozenset[int], count: Any) -> float:
    steps = count(x | y)
    if as_matrices(x, y, out):
        return CALL + steps + MOVED * (count(x) + count(y) + count(out))
    return CALL + LOOPED * steps + MOVED * count(out)


def as_matrices(x: Any, y: Any, out: Any) -> bool:
    """Whether the product of two is one of matrices: something is summed, and something is left of
    both, or of one if there is but one product."""
    x, y, out = set(x), set(y), set(out)
    kept = bool(x - y) + bool(y - x)
    return bool((x & y) - out) and kept > bool(x & y & out)


def computed(tensors: Sequence[Tensor], plan: tuple, order: Order) -> Tensor:
    """The plan's product of these tensors in this order: plain tensor code."""
    p = Plan(*plan)
    extent = lambda labels: [p.extents[k] for k in labels]

    def summed(x: Tensor, labels: Labels, keep: set[int]) -> tuple[Tensor, Labels]:
        over = [i for i, k in enumerate(labels) if k not in keep]
        return (x.sum(over) if over else x), tuple([k for k in labels if k in keep])

    def leaves(order: Order) -> set[int]:
        return {order} if order.__class__ is int else leaves(order[0]) | leaves(order[1])

    def result(order: Order) -> tuple[Tensor, Labels]:
        mine = leaves(order)
        others = [f for i, f in enumerate(p.factors) if i not in mine]
        keep = set(p.out).union(*others)
        if order.__class__ is int:
            x = tensors[order].reciprocal() if p.inverse[order] else tensors[order]
            return summed(x.reshape(extent(p.factors[order])), p.factors[order], keep)
        pair = [result(half) for half in order]
        pair.sort(key=lambda one: [k in one[1] for k in p.out], reverse=True)
        return multiplied(*pair[0], *pair[1], keep, extent)

    x, labels = result(order)
    x = x.permute([labels.index(k) for k in p.out if k in labels])
    x = x.reshape([p.extents[k] if k in labels else 1 for k in p.out]).expand(extent(p.out))
    if p.scale != 1:
        x = x * p.scale
    if p.square:  # rounding takes what is near zero below it
        x = x.clamp(min=0)
    return (x.sqrt() if p.rooted else x).reshape(p.shape)


def multiplied(
    x: Tensor, mine: Labels, y: Tensor, theirs: Labels, keep: set[int], extent: Any
) -> tuple[Tensor, Labels]:
    """The product of two, summed over the labels that need not be kept."""
    both = [k for k in mine if k in theirs]
    batch, over = [k for k in both if k in keep], [k for k in both if k not in keep]
    rows = [k for k in mine if k not in theirs]
    columns = [k for k in theirs if k not in mine]
    out = (*batch, *rows, *columns)
    if as_matrices(mine, theirs, out):
        x = x.permute([mine.index(k) for k in (*batch, *rows, *over)])
        y = y.permute([theirs.index(k) for k in (*batch, *over, *columns)])
        b, m, k, n = (math.prod(extent(labels)) for labels in (batch, rows, over, columns))
        if batch:
            product = x.reshape(b, m, k).bmm(y.reshape(b, k, n))
        else:
            product = x.reshape(m, k).mm(y.reshape(k, n))
        return product.reshape(extent(out)), out
    every = (*out, *over)
    x, y = (aligned(t, labels, every) for t, labels in ((x, mine), (y, theirs)))
    product = x * y
    return (product.sum(list(range(len(out), len(every)))) if over else product), out


def aligned(x: Tensor, labels: Labels, every: Labels) -> Tensor:
    """With a dimension for each of these labels, of extent 1 where ``x`` has none."""
    x = x.permute([labels.index(k) for k in every if k in labels])
    for i, k in enumerate(every):
        if k not in labels:
            x = x.unsqueeze(i)
    return x

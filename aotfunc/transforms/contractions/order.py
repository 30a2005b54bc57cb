"""Find the cheapest order of a product of tensors, and compute the product in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...cache import remembered
from .products import Dims, labels_of
from .windows import Windows

#: Costs count multiply-adds of a matrix product. A kernel's loop takes 2 for a step, 8 to read an
#: element of a matrix, 24 to store one in new memory; a call takes 2000.
LOOPED, READ, STORED, CALL = 2, 8, 24, 2000

Labels = tuple[int, ...]
#: the position of a factor, or the orders of a product's two halves
Order = Any


class Plan(NamedTuple):
    """A product of tensors: the labels of their dimensions, the forms made of them first, the
    labels of the product, the extents of all labels, and the last steps on the result. Labels are
    numbered by their position in ``extents``."""

    factors: tuple[Dims, ...]
    forms: tuple[tuple, ...]
    out: Labels
    shape: tuple[int, ...]
    extents: tuple[int, ...]
    scale: float
    square: bool
    rooted: bool
    unsigned: bool

    @property
    def labels(self) -> list[Labels]:
        return [labels_of(dims) for dims in self.factors]

    @property
    def windows(self) -> list[Windows | None]:
        """Return the factors that are windows of images."""
        return [
            Windows(dims, form) if form[:1] == ("windows",) else None
            for dims, form in zip(self.factors, self.forms, strict=True)
        ]


@remembered(4096)
def cheapest(plan: Plan) -> tuple[float, Order]:
    """Return the least cost of all ways to multiply in pairs, and its order."""
    factors, windows = plan.labels, plan.windows
    every = (1 << len(factors)) - 1
    count = lambda labels: math.prod([plan.extents[k] for k in labels])

    def labels(part: int) -> frozenset[int]:
        """Return the labels of this part of the factors after all others are summed away."""
        inside, outside = set[int](), set(plan.out)
        for i, f in enumerate(factors):
            (inside if part >> i & 1 else outside).update(f)
        return frozenset(inside & outside)

    def alone(part: int) -> Windows | None:
        return windows[part.bit_length() - 1] if part & (part - 1) == 0 else None

    def price(x: int, y: int) -> float:
        """Return the cost of multiplying these two parts."""
        mine, theirs, out = left[x], left[y], left[x | y]
        steps, made = count(mine | theirs), 0.0
        for part, others in ((x, theirs), (y, mine)):
            if (w := alone(part)) and w.convolves(others, out):
                return CALL + convolution_steps(steps, len(out.intersection(w.images)) > 0)
            made += STORED / 2 * count(w.labels) if w else 0  # both sides of the norm share them
        if as_matrices(mine, theirs, out):
            return CALL + made + matrix_steps(steps, count(mine) + count(theirs), count(out))
        return CALL + made + LOOPED * steps + STORED * count(out)

    left = {part: labels(part) for part in range(1, every + 1)}
    best: dict[int, tuple[float, Order]] = {}
    for part in range(1, every + 1):
        if part & (part - 1) == 0:
            i = part.bit_length() - 1
            summed = len(left[part]) < len(factors[i])
            best[part] = (CALL + count(factors[i]) if summed else 0), i
            continue
        ways = []
        half = (part - 1) & part
        while half:
            other = part ^ half
            if half > other:
                first, second = best[half], best[other]
                cost = price(half, other) + first[0] + second[0]
                ways.append((cost, (first[1], second[1])))
            half = (half - 1) & part
        best[part] = min(ways, key=lambda way: way[0])
    return best[every]


def matrix_steps(steps: int, reads: int, size: int) -> int:
    """Return the cost of a product of matrices."""
    return steps + READ * reads + STORED * size


def convolution_steps(steps: int, apart: bool) -> int:
    """Return the cost of a weight gradient: it is larger for each image apart."""
    return 2 * steps if apart else steps


def as_matrices(x: Any, y: Any, out: Any) -> bool:
    """Return whether the product of two is a matrix product: it sums over labels, and labels of
    both remain, or of one if there is one product only."""
    x, y, out = set(x), set(y), set(out)
    kept = bool(x - y) + bool(y - x)
    return bool((x & y) - out) and kept > bool(x & y & out)


def contracted(tensors: Sequence[Tensor], plan: tuple, order: Order) -> Tensor:
    """Return the plan's product of these tensors in this order: plain tensor code."""
    p = Plan(*plan)
    factors, windows = p.labels, p.windows
    extent = lambda labels: [p.extents[k] for k in labels]

    def summed(x: Tensor, labels: Labels, keep: set[int]) -> tuple[Tensor, Labels]:
        over = [i for i, k in enumerate(labels) if k not in keep]
        return (x.sum(over) if over else x), tuple([k for k in labels if k in keep])

    def leaves(order: Order) -> set[int]:
        return {order} if order.__class__ is int else leaves(order[0]) | leaves(order[1])

    def kept(order: Order) -> set[int]:
        """Return the labels of a result of this order that later steps need."""
        mine = leaves(order)
        return set(p.out).union(*[f for i, f in enumerate(factors) if i not in mine])

    def adds(order: Order) -> bool:
        """Return whether the last step sums."""
        if order.__class__ is int:
            return not kept(order).issuperset(factors[order])
        read = {k for half in order for i in leaves(half) for k in kept(half) & {*factors[i]}}
        return not read.issubset(p.out)

    def result(order: Order) -> tuple[Tensor, Labels]:
        keep = kept(order)
        if order.__class__ is int:
            x, w = tensors[order], windows[order]
            x = x.reciprocal() if p.forms[order] == ("reciprocal",) else w.of(x) if w else x
            return summed(x.reshape(extent(factors[order])), factors[order], keep)
        for one, other in (order, order[::-1]):
            if other.__class__ is int and (w := windows[other]):
                others = {k for i in leaves(one) for k in factors[i]} & kept(one)
                if w.convolves(others, keep):
                    return w.weight_gradient(*result(one), tensors[other], keep, extent)
        pair = [result(half) for half in order]
        pair.sort(key=lambda one: [k in one[1] for k in p.out], reverse=True)
        return pair_contracted(*pair[0], *pair[1], keep, extent)

    x, labels = result(order)
    x = x.permute([labels.index(k) for k in p.out if k in labels])
    x = x.reshape([p.extents[k] if k in labels else 1 for k in p.out]).expand(extent(p.out))
    if p.scale != 1:
        x = x * p.scale
    if p.unsigned and (p.scale < 0 or not adds(order)):
        x = x + 0.0
    if p.square:  # rounding may give small negative numbers
        x = x.clamp(min=0)
    return (x.sqrt() if p.rooted else x).reshape(p.shape)


def pair_contracted(
    x: Tensor, mine: Labels, y: Tensor, theirs: Labels, keep: set[int], extent: Any
) -> tuple[Tensor, Labels]:
    """Return the product of two, summed over the labels that need not be kept."""
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
    x, y = (with_every_label(t, labels, every) for t, labels in ((x, mine), (y, theirs)))
    product = x * y
    return (product.sum(list(range(len(out), len(every)))) if over else product), out


def with_every_label(x: Tensor, labels: Labels, every: Labels) -> Tensor:
    """Give ``x`` a dimension for each of these labels, of extent 1 for a label that it lacks."""
    x = x.permute([labels.index(k) for k in every if k in labels])
    for i, k in enumerate(every):
        if k not in labels:
            x = x.unsqueeze(i)
    return x

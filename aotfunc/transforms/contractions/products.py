"""Sums of products of tensors, as einsums, with their views, products and sums.

A *label* is an index with an extent. A dimension of a tensor is a tuple of labels, outermost first
(a ``view`` that merges two dimensions joins their labels in one tuple), which is empty if its
extent is 1. Labels of factors that no dimension of the value has are summed over; a label of the
value that no factor has is an expanded dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

aten = torch.ops.aten

Dims = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Factor:
    """A node with labels, or a form of it: ``("reciprocal",)``, an image's ``("windows", …)``."""

    node: Node
    dims: Dims
    form: tuple = ()

    @property
    def labels(self) -> tuple[int, ...]:
        return labels_of(self.dims)


@dataclass(frozen=True)
class Product:
    """``scale`` times a sum of products, not negative if a ``square``, perhaps ``rooted``. The
    zeros of an ``unsigned`` one are positive, as those of a sum: 0 + -0 is 0."""

    factors: tuple[Factor, ...]
    dims: Dims
    scale: float = 1.0
    square: bool = False
    rooted: bool = False
    unsigned: bool = False

    @property
    def labels(self) -> tuple[int, ...]:
        return labels_of(self.dims)

    @property
    def summed(self) -> set[int]:
        return {label for f in self.factors for label in f.labels}.difference(self.labels)

    @property
    def once_a_sum(self) -> bool:
        """Return whether a sum was along expanded dimensions alone, which leaves the sign of a
        zero to a last step."""
        return self.unsigned and not self.summed


class Algebra:
    """The extents of labels, and a method for each op on products."""

    def __init__(self) -> None:
        self.extents: list[int] = []

    def label(self, extent: int) -> int:
        self.extents.append(extent)
        return len(self.extents) - 1

    def count(self, labels: Sequence[int]) -> int:
        return math.prod([self.extents[label] for label in labels])

    def renamed(self, p: Product) -> Product:
        """Return the product with new labels."""
        labels = dict.fromkeys((*p.labels, *[label for f in p.factors for label in f.labels]))
        return substituted(p, {label: (self.label(self.extents[label]),) for label in labels})

    def divided(self, label: int, outer: int) -> tuple[int, int]:
        return self.label(outer), self.label(self.extents[label] // outer)

    # ----- operations ----------------------------------------------------------------------------

    def viewed(self, p: Product, shape: Sequence[int]) -> Product | None:
        """Return the product as a ``view``; None if that cuts a label's extent unevenly."""
        rest = list(reversed(p.labels))
        dims, cuts = list[tuple[int, ...]](), dict[int, tuple[int, ...]]()
        for extent in shape:
            dim = []
            while extent > 1:
                label = rest.pop()
                k = self.extents[label]
                if k > extent and k % extent == 0:
                    cuts[label] = outer, inner = self.divided(label, extent)
                    rest.append(inner)
                    label, k = outer, extent
                if extent % k:
                    return None
                dim.append(label)
                extent //= k
            dims.append(tuple(dim))
        return replace(substituted(p, cuts), dims=tuple(dims))

    def expanded(self, p: Product, shape: Sequence[int]) -> Product:
        dims = ((),) * (len(shape) - len(p.dims)) + p.dims
        new = [d or ((self.label(k),) if k > 1 else ()) for d, k in zip(dims, shape, strict=True)]
        return replace(p, dims=tuple(new))

    def times(self, x: Product, y: Product) -> Product | None:
        """Return the broadcast product of two; None if labels of their dimensions do not match."""
        rank = max(len(x.dims), len(y.dims))
        ours, theirs = (((),) * (rank - len(p.dims)) + p.dims for p in (x, y))
        alike = ours == theirs and x.factors == y.factors and x.scale == y.scale
        y = self.renamed(y)
        theirs = ((),) * (rank - len(y.dims)) + y.dims
        same: dict[int, tuple[int, ...]] = {}
        for mine, other in zip(ours, theirs, strict=True):
            if mine and other and not self.unify(mine, other, same):
                return None
        x, y = substituted(x, same), substituted(y, same)
        dims = tuple([relabelled(d or e, same) for d, e in zip(ours, theirs, strict=True)])
        scale = x.scale * y.scale
        square = alike and bool(x.summed)
        return (
            Product(x.factors + y.factors, dims, scale, square) if math.isfinite(scale) else None
        )

    def unify(self, mine: tuple, other: tuple, same: dict[int, tuple[int, ...]]) -> bool:
        """Match the labels of two equal dimensions, alone or together; return whether it did."""
        xs, ys = list(reversed(mine)), list(reversed(other))
        while xs and ys:
            x, y = xs.pop(), ys.pop()
            m, n = self.extents[x], self.extents[y]
            if m > n and m % n == 0:
                same[x] = outer, inner = self.divided(x, n)
                xs.append(inner)
                x = outer
            elif n > m and n % m == 0:
                _, inner = self.divided(y, m)
                same[y] = x, inner
                ys.append(inner)
                continue
            elif m != n:
                return False
            same[y] = (x,)
        return not (xs or ys)

    def summed(self, p: Product, over: Sequence[int], keepdim: bool = False) -> Product:
        """Sum over these dimensions; along an expanded one, multiply by its extent."""
        over = [d % len(p.dims) for d in over]
        read = {label for f in p.factors for label in f.labels}
        gone = [label for d in over for label in p.dims[d] if label not in read]
        kept = [
            () if d in over else dim for d, dim in enumerate(p.dims) if keepdim or d not in over
        ]
        p = replace(p, dims=tuple(kept), scale=p.scale * self.count(gone))
        return self.without_identities(p)

    def without_identities(self, p: Product) -> Product:
        """Replace a sum over one side of an identity matrix: other factors get the other side's
        labels, but for one with both, which would be read along its diagonal."""
        for f in p.factors:
            if not is_identity(f):
                continue
            rest = tuple([other for other in p.factors if other is not f])
            if any(all(set(side).intersection(g.labels) for side in f.dims) for g in rest):
                continue
            summed = {label for g in rest for label in g.labels}.difference(p.labels)
            for kept, gone in (f.dims, f.dims[::-1]):
                same: dict[int, tuple[int, ...]] = {}
                if gone and summed.issuperset(gone) and self.unify(kept, gone, same):
                    return self.without_identities(substituted(replace(p, factors=rest), same))
        return p


def is_identity(f: Factor) -> bool:
    val = f.node.meta["val"]
    return f.node.target in (aten.eye.default, aten.eye.m) and val.shape[0] == val.shape[1]


def labels_of(dims: Dims) -> tuple[int, ...]:
    """Return the labels of these dimensions, one after another."""
    return tuple([label for dim in dims for label in dim])


def substituted(p: Product, labels: dict[int, tuple[int, ...]]) -> Product:
    if not labels:
        return p
    every = lambda dims: tuple([relabelled(d, labels) for d in dims])
    factors = tuple([replace(f, dims=every(f.dims)) for f in p.factors])
    return replace(p, factors=factors, dims=every(p.dims))


def relabelled(dim: Sequence[int], labels: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    out: tuple[int, ...] = ()
    for label in dim:
        out += relabelled(labels[label], labels) if label in labels else (label,)
    return out

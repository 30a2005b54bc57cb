"""What a value is a sum of products of: the einsum that the nodes behind it spell out.

A *label* is an index with an extent; a dimension of a tensor is a tuple of labels, outermost first
(a ``view`` that merges two dimensions puts their labels into one tuple), and of none where its
extent is 1. Labels of factors that are in no dimension of the value are summed over; a label of
the value that no factor has is a dimension that it was expanded along."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from ...trace.shapes.sig import Sig

aten = torch.ops.aten

Dims = tuple[tuple[int, ...], ...]

#: a product of more factors is taken apart: its orders are too many to compare
MOST = 6


@dataclass(frozen=True)
class Factor:
    """A node with the labels of its dimensions, or what a form makes of it: ``("reciprocal",)``,
    or the ``("windows", …)`` of an image."""

    node: Node
    dims: Dims
    form: tuple = ()

    @property
    def labels(self) -> tuple[int, ...]:
        return flat(self.dims)


@dataclass(frozen=True)
class Product:
    """``scale`` times a sum of products. A ``square`` is one of sums, so not negative, and
    ``rooted`` if its square root is meant."""

    factors: tuple[Factor, ...]
    dims: Dims
    scale: float = 1.0
    square: bool = False
    rooted: bool = False

    @property
    def labels(self) -> tuple[int, ...]:
        return flat(self.dims)

    @property
    def summed(self) -> set[int]:
        return {label for f in self.factors for label in f.labels}.difference(self.labels)


class Products:
    """The products that the nodes of a graph are, and the extents of their labels."""

    def __init__(self, graph: fx.Graph) -> None:
        self.extents: list[int] = []
        self.found: dict[Node, Product] = {}
        #: node -> the arguments whose products its own is made of
        self.parts: dict[Node, list[Node]] = {}
        self.leaves: dict[Node, Product] = {}
        for n in graph.nodes:
            rule = RULES.get(n.target)
            if rule is not None and fits(n):
                self.parts[n] = []
                product = rule(self, n, *n.args, **n.kwargs)
                if product is None:
                    del self.parts[n]
                else:
                    self.found[n] = product

    # ----- labels --------------------------------------------------------------------------------

    def label(self, extent: int) -> int:
        self.extents.append(extent)
        return len(self.extents) - 1

    def count(self, labels: Sequence[int]) -> int:
        return math.prod([self.extents[label] for label in labels])

    def leaf(self, n: Node) -> Product:
        """The product of this one factor."""
        if n not in self.leaves:
            dims = tuple([(self.label(k),) if k > 1 else () for k in n.meta["val"].shape])
            self.leaves[n] = Product((Factor(n, dims),), dims)
        return self.leaves[n]

    def of(self, reader: Node, n: Node) -> Product:
        """The product that ``n`` is, as a part of what ``reader`` is."""
        product = self.found.get(n)
        if product is None or product.rooted:
            return self.leaf(n)
        self.parts[reader].append(n)
        return product

    def renamed(self, p: Product) -> Product:
        """With labels of its own."""
        labels = dict.fromkeys((*p.labels, *[label for f in p.factors for label in f.labels]))
        return substituted(p, {label: (self.label(self.extents[label]),) for label in labels})

    def divided(self, label: int, outer: int) -> tuple[int, int]:
        return self.label(outer), self.label(self.extents[label] // outer)

    # ----- operations ----------------------------------------------------------------------------

    def viewed(self, p: Product, shape: Sequence[int]) -> Product | None:
        """As a ``view``; None where that would cut a label's extent into uneven parts."""
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
        """The product of two, broadcast; None where their dimensions are of labels that do not
        match."""
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
        dims = tuple([written(d or e, same) for d, e in zip(ours, theirs, strict=True)])
        scale = x.scale * y.scale
        square = alike and bool(x.summed)
        return (
            Product(x.factors + y.factors, dims, scale, square) if math.isfinite(scale) else None
        )

    def unify(self, mine: tuple, other: tuple, same: dict[int, tuple[int, ...]]) -> bool:
        """Find out which labels of two equal dimensions are the same, or the same together."""
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
        """Summed over these dimensions: as often as it was expanded along one, it is added."""
        over = [d % len(p.dims) for d in over]
        read = {label for f in p.factors for label in f.labels}
        gone = [label for d in over for label in p.dims[d] if label not in read]
        kept = [
            () if d in over else dim for d, dim in enumerate(p.dims) if keepdim or d not in over
        ]
        p = replace(p, dims=tuple(kept), scale=p.scale * self.count(gone))
        return self.without_identities(p)

    def without_identities(self, p: Product) -> Product:
        """A sum over a side of an identity matrix is what the other side says of the factors that
        have the first one's labels. A factor that has both would be read along its diagonal."""
        for f in p.factors:
            if not identity(f):
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


def identity(f: Factor) -> bool:
    val = f.node.meta["val"]
    return f.node.target in (aten.eye.default, aten.eye.m) and val.shape[0] == val.shape[1]


def flat(dims: Dims) -> tuple[int, ...]:
    """The labels of these dimensions, one after another."""
    return tuple([label for dim in dims for label in dim])


def substituted(p: Product, labels: dict[int, tuple[int, ...]]) -> Product:
    if not labels:
        return p
    every = lambda dims: tuple([written(d, labels) for d in dims])
    factors = tuple([replace(f, dims=every(f.dims)) for f in p.factors])
    return replace(p, factors=factors, dims=every(p.dims))


def written(dim: Sequence[int], labels: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    out: tuple[int, ...] = ()
    for label in dim:
        out += written(labels[label], labels) if label in labels else (label,)
    return out


def fits(n: Node) -> bool:
    """Whether a node and the tensors that it reads have elements, all of one dtype that is computed
    in as it is, on one device."""
    call: Any = n.args[0] if n.target is operator.getitem else n
    vals = [n.meta["val"], *[a.meta["val"] for a in call.all_input_nodes]]
    return all(
        v.__class__ is Sig
        and v.dtype in (torch.float32, torch.float64)
        and v.dtype is vals[0].dtype
        and v.device == vals[0].device
        and 0 not in v.shape
        for v in vals
    )


# ----- ops ---------------------------------------------------------------------------------------

#: op -> (products, node, *args) -> what the node is, or None: nothing better than itself
RULES: dict[Any, Callable] = {}


def rule(*ops: Any) -> Callable:
    def register(f: Callable) -> Callable:
        RULES.update(dict.fromkeys(ops, f))
        return f

    return register


@rule(aten.view.default, aten._unsafe_view.default)
def _view(ps: Products, n: Node, x: Node, shape: Any) -> Product | None:
    return ps.viewed(ps.of(n, x), n.meta["val"].shape)


@rule(
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    aten.clone.default,
)
def _same_values(ps: Products, n: Node, x: Node, *_: Any, **__: Any) -> Product | None:
    return ps.viewed(ps.of(n, x), n.meta["val"].shape)


@rule(aten.select.int)
def _select(ps: Products, n: Node, x: Node, dim: int, index: Any) -> Product | None:
    if x.meta["val"].shape[dim] != 1:
        return None
    return ps.viewed(ps.of(n, x), n.meta["val"].shape)


@rule(aten.expand.default)
def _expand(ps: Products, n: Node, x: Node, *_: Any, **__: Any) -> Product:
    return ps.expanded(ps.of(n, x), n.meta["val"].shape)


@rule(aten.permute.default)
def _permute(ps: Products, n: Node, x: Node, order: Sequence[int]) -> Product:
    p = ps.of(n, x)
    return replace(p, dims=tuple([p.dims[d] for d in order]))


@rule(aten.t.default, aten.transpose.int)
def _transpose(ps: Products, n: Node, x: Node, i: int = 0, j: int = -1) -> Product:
    p = ps.of(n, x)
    dims = list(p.dims)
    if dims:
        dims[i], dims[j] = dims[j], dims[i]
    return replace(p, dims=tuple(dims))


@rule(aten.mul.Tensor)
def _mul(ps: Products, n: Node, x: Any, y: Any) -> Product | None:
    if x.__class__ is Node and y.__class__ is Node:
        return product(ps, n, x, y)
    x, y = (x, y) if x.__class__ is Node else (y, x)
    return scaled(ps, n, x, y)


@rule(aten.div.Tensor)
def _div(ps: Products, n: Node, x: Any, y: Any) -> Product | None:
    if x.__class__ is not Node:
        return None
    if y.__class__ is not Node:
        return scaled(ps, n, x, 1 / y) if y else None
    if y.meta["val"].numel >= n.meta["val"].numel:
        return None  # a division for each element, as there is
    over = ps.of(n, x)
    if over.square or len(over.factors) == MOST:
        return None
    inverse = ps.leaf(y)
    factor = replace(inverse.factors[0], form=("reciprocal",))
    return ps.times(over, replace(inverse, factors=(factor,)))


@rule(aten.neg.default)
def _neg(ps: Products, n: Node, x: Node) -> Product | None:
    return scaled(ps, n, x, -1)


@rule(aten.pow.Tensor_Scalar)
def _pow(ps: Products, n: Node, x: Node, exponent: Any) -> Product | None:
    return product(ps, n, x, x) if exponent == 2 else None


@rule(aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default)
def _sum(
    ps: Products, n: Node, x: Node, over: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Product | None:
    p = ps.of(n, x)
    over = dimensions(p, over)
    out = ps.summed(p, over, keepdim)
    if n.target in (aten.mean.dim, aten.mean.default):
        return replace(out, scale=out.scale / ps.count([k for d in over for k in p.dims[d]]))
    return out


def dimensions(p: Product, over: Sequence[int] | None) -> Sequence[int]:
    """Those that an op is told to sum over: all if it is told none. A 0-dim tensor has a
    dimension 0 to be told of."""
    return (over or range(len(p.dims))) if p.dims else ()


@rule(aten.linalg_vector_norm.default)
def _norm(
    ps: Products,
    n: Node,
    x: Node,
    order: Any = 2,
    over: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> Product | None:
    if order != 2:
        return None
    p = product(ps, n, x, x)
    if p is None:
        return None
    return replace(ps.summed(p, dimensions(p, over), keepdim), rooted=True)


@rule(aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default)
def _matmul(ps: Products, n: Node, x: Node, y: Node) -> Product | None:
    """The rows of the one times the columns of the other, summed."""
    rows = lambda p: replace(p, dims=(*p.dims, ())) if n.target in MATRICES else p
    columns = lambda p: (
        replace(p, dims=(*p.dims[:-2], (), *p.dims[-2:])) if n.target in MATRICES else p
    )
    p = product(ps, n, x, y, rows, columns)
    return p and ps.summed(p, [-2 if n.target in MATRICES else -1])


MATRICES = (aten.bmm.default, aten.mm.default)


def product(
    ps: Products,
    n: Node,
    x: Node,
    y: Node,
    left: Callable = lambda p: p,
    right: Callable = lambda p: p,
) -> Product | None:
    """The product of two nodes, of which those stay whole that have too many factors, and squares,
    which would no longer be known not to be negative."""
    parts = [ps.of(n, x), ps.of(n, y)]

    def keep_whole(i: int) -> None:
        parts[i] = ps.leaf((x, y)[i])
        ps.parts[n].remove((x, y)[i])

    for i in (0, 1):
        if parts[i].square and x is not y:
            keep_whole(i)
    while sum(len(p.factors) for p in parts) > MOST:
        keep_whole(max((0, 1), key=lambda i: len(parts[i].factors)))
    return ps.times(left(parts[0]), right(parts[1]))


def scaled(ps: Products, n: Node, x: Node, by: Any) -> Product | None:
    if by.__class__ not in (int, float) or not math.isfinite(by):
        return None
    p = ps.of(n, x)
    scale = p.scale * by
    return replace(p, scale=scale, square=p.square and by > 0) if math.isfinite(scale) else None

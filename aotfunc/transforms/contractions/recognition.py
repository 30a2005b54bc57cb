"""Recognise the sum of products that each node of a graph is, as an einsum of earlier nodes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from ...graph import op_of
from ...trace.shapes.sig import Sig
from .products import Algebra, Factor, Product
from .windows import WEIGHT_ONLY

aten = torch.ops.aten

#: most factors of a product: more have too many orders to compare
MOST = 6


class Products(Algebra):
    """The products that the nodes of a graph are, and the extents of their labels."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.found: dict[Node, Product] = {}
        #: node -> the arguments whose products are parts of its own
        self.parts: dict[Node, list[Node]] = {}
        self.leaves: dict[Node, Product] = {}
        for n in graph.nodes:
            rule = RULES.get(n.target)
            if rule is not None and may_be_product(n):
                self.parts[n] = []
                product = rule(self, n, *n.args, **n.kwargs)
                if product is None:
                    del self.parts[n]
                else:
                    self.found[n] = product

    def leaf(self, n: Node) -> Product:
        """Return the product of this factor alone."""
        if n not in self.leaves:
            dims = tuple([(self.label(k),) if k > 1 else () for k in n.meta["val"].shape])
            self.leaves[n] = Product((Factor(n, dims),), dims)
        return self.leaves[n]

    def of(self, reader: Node, n: Node) -> Product:
        """Return the product of ``n`` as a part of ``reader``'s."""
        product = self.found.get(n)
        if product is None or product.rooted:
            return self.leaf(n)
        self.parts[reader].append(n)
        return product


def may_be_product(n: Node) -> bool:
    """Return whether a node and the tensors that it reads have elements, on one device, in one
    dtype that is computed in as it is."""
    call = op_of(n)
    vals = [n.meta["val"], *[a.meta["val"] for a in call.all_input_nodes]]
    return all(
        v.__class__ is Sig
        and v.dtype in (torch.float32, torch.float64)
        and v.dtype is vals[0].dtype
        and v.device == vals[0].device
        and 0 not in v.shape
        for v in vals
    )


#: op -> (products, node, *args) -> the node's product, or None: the node stays a factor
RULES: dict[Any, Callable] = {}


def recognises(*ops: Any) -> Callable:
    def register(f: Callable) -> Callable:
        RULES.update(dict.fromkeys(ops, f))
        return f

    return register


@recognises(
    *(aten.view.default, aten._unsafe_view.default, aten.clone.default),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
def _same_values(ps: Products, n: Node, x: Node, *_: Any, **__: Any) -> Product | None:
    return ps.viewed(ps.of(n, x), n.meta["val"].shape)


@recognises(aten.select.int)
def _select(ps: Products, n: Node, x: Node, dim: int, index: Any) -> Product | None:
    if x.meta["val"].shape[dim] != 1:
        return None
    return ps.viewed(ps.of(n, x), n.meta["val"].shape)


@recognises(aten.expand.default)
def _expand(ps: Products, n: Node, x: Node, *_: Any, **__: Any) -> Product:
    return ps.expanded(ps.of(n, x), n.meta["val"].shape)


@recognises(aten.permute.default)
def _permute(ps: Products, n: Node, x: Node, order: Sequence[int]) -> Product:
    p = ps.of(n, x)
    return replace(p, dims=tuple([p.dims[d] for d in order]))


@recognises(aten.t.default, aten.transpose.int)
def _transpose(ps: Products, n: Node, x: Node, i: int = 0, j: int = -1) -> Product:
    p = ps.of(n, x)
    dims = list(p.dims)
    if dims:
        dims[i], dims[j] = dims[j], dims[i]
    return replace(p, dims=tuple(dims))


@recognises(aten.mul.Tensor)
def _mul(ps: Products, n: Node, x: Any, y: Any) -> Product | None:
    if x.__class__ is Node and y.__class__ is Node:
        return product_of(ps, n, x, y)
    x, y = (x, y) if x.__class__ is Node else (y, x)
    return scalar_multiple(ps, n, x, y)


@recognises(aten.div.Tensor)
def _div(ps: Products, n: Node, x: Any, y: Any) -> Product | None:
    if x.__class__ is not Node:
        return None
    if y.__class__ is not Node:
        return scalar_multiple(ps, n, x, 1 / y) if y else None
    if y.meta["val"].numel >= n.meta["val"].numel:
        return None  # a division for each element, as before
    over = ps.of(n, x)
    if over.square or over.once_a_sum or len(over.factors) == MOST:
        return None
    inverse = ps.leaf(y)
    factor = replace(inverse.factors[0], form=("reciprocal",))
    return ps.times(over, replace(inverse, factors=(factor,)))


@recognises(aten.neg.default)
def _neg(ps: Products, n: Node, x: Node) -> Product | None:
    return scalar_multiple(ps, n, x, -1)


@recognises(aten.pow.Tensor_Scalar)
def _pow(ps: Products, n: Node, x: Node, exponent: Any) -> Product | None:
    return product_of(ps, n, x, x) if exponent == 2 else None


@recognises(aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default)
def _sum(
    ps: Products, n: Node, x: Node, over: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Product | None:
    p = ps.of(n, x)
    over = dimensions(p, over)
    out = ps.summed(p, over, keepdim)
    out = replace(out, unsigned=True)
    if n.target in (aten.mean.dim, aten.mean.default):
        return replace(out, scale=out.scale / ps.count([k for d in over for k in p.dims[d]]))
    return out


def dimensions(p: Product, over: Sequence[int] | None) -> Sequence[int]:
    """Return the dimensions that an op sums over, all if it names none; 0 of 0-dim tensors."""
    return (over or range(len(p.dims))) if p.dims else ()


@recognises(aten.linalg_vector_norm.default)
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
    p = product_of(ps, n, x, x)
    if p is None:
        return None
    return replace(ps.summed(p, dimensions(p, over), keepdim), rooted=True)


@recognises(aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default)
def _matmul(ps: Products, n: Node, x: Node, y: Node) -> Product | None:
    """Multiply the rows of ``x`` with the columns of ``y``, and sum."""
    rows = lambda p: replace(p, dims=(*p.dims, ())) if n.target in MATRICES else p
    columns = lambda p: (
        replace(p, dims=(*p.dims[:-2], (), *p.dims[-2:])) if n.target in MATRICES else p
    )
    p = product_of(ps, n, x, y, rows, columns)
    return p and ps.summed(p, [-2 if n.target in MATRICES else -1])


MATRICES = (aten.bmm.default, aten.mm.default)


def product_of(
    ps: Products,
    n: Node,
    x: Node,
    y: Node,
    left: Callable = lambda p: p,
    right: Callable = lambda p: p,
) -> Product | None:
    """Multiply two nodes. An argument with too many factors stays one factor, and so does a
    square, which would no longer be known not to be negative, and what was a sum."""
    parts = [ps.of(n, x), ps.of(n, y)]

    def keep_whole(i: int) -> None:
        parts[i] = ps.leaf((x, y)[i])
        ps.parts[n].remove((x, y)[i])

    for i in (0, 1):
        if (parts[i].square and x is not y) or parts[i].once_a_sum:
            keep_whole(i)
    while sum(len(p.factors) for p in parts) > MOST:
        keep_whole(max((0, 1), key=lambda i: len(parts[i].factors)))
    return ps.times(left(parts[0]), right(parts[1]))


def scalar_multiple(ps: Products, n: Node, x: Node, by: Any) -> Product | None:
    if by.__class__ not in (int, float) or not math.isfinite(by):
        return None
    p = ps.of(n, x)
    scale = p.scale * by
    if not math.isfinite(scale) or (by <= 0 and p.once_a_sum):
        return None
    return replace(p, scale=scale, square=p.square and by > 0, unsigned=p.unsigned and by > 0)


@recognises(operator.getitem)
def _weight_gradient(ps: Products, n: Node, call: Node, i: int) -> Product | None:
    if call.target is not aten.convolution_backward.default or call.args[-1] != WEIGHT_ONLY:
        return None
    g, x, _, _, stride, padding, dilation, transposed, _, groups, _ = call.args
    images, outs, *places = g.meta["val"].shape
    _, channels, *kernel = n.meta["val"].shape
    if transposed or {len(v) for v in (stride, padding, dilation)} != {len(kernel)}:
        return None
    shape = (images, groups, channels, *kernel, *places)
    dims = tuple([(ps.label(k),) if k > 1 else () for k in shape])
    geometry = [tuple(v) for v in (kernel, stride, padding, dilation)]
    cotangent = ps.viewed(ps.of(n, g), (images, groups, outs // groups, *places))
    if cotangent is None or cotangent.square or len(cotangent.factors) == MOST:
        return None
    # images, groups, output channels, channels, places in a window, windows
    first, rest = cotangent.dims[:3], cotangent.dims[3:]
    cotangent = replace(cotangent, dims=(*first, (), *[()] * len(kernel), *rest))
    windows = Factor(x, dims, ("windows", *geometry))
    p = ps.times(cotangent, Product((windows,), (*dims[:2], (), *dims[2:])))
    p = p and ps.summed(p, [0, *range(4 + len(kernel), 4 + 2 * len(kernel))])
    return p and ps.viewed(p, n.meta["val"].shape)

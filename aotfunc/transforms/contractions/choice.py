"""Choose the sums of products to compute in another order: those that cost least together.

A value that others read, or that is a result, is *needed*; its *cone* are the values that only its
product uses. Needed values whose cones meet are decided together: dropping a gradient saves
nothing as long as one of them reads it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from ...trace.node_views import calls_view
from .order import CALL, LOOPED, STORED, Order, Plan, cheapest, convolution_steps, matrix_steps
from .products import Product
from .recognition import MATRICES, Products

aten = torch.ops.aten

PRODUCTS = (*MATRICES, aten.mv.default, aten.dot.default)
REDUCTIONS = (
    *(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default),
    aten.linalg_vector_norm.default,
)
SUMS = frozenset((*PRODUCTS, *REDUCTIONS, operator.getitem))

Way = tuple[list[Node], Plan, Order]


def chosen(graph: fx.Graph) -> dict[Node, Way]:
    """Return the factors, product and order of each node to recompute in another order."""
    products = Products(graph)
    needed = needed_of(graph, products)
    cones = {n: cone(n, products) for n in needed}
    ways: dict[Node, tuple[float, Way]] = {
        n: way(products, products.found[n])
        for n, nodes in cones.items()
        if another(products.found[n], nodes) and any(m.target in SUMS for m in nodes)
    }
    found: dict[Node, Way] = {}
    for group in overlapping_cones(cones):
        for n in worthwhile(group, cones, {n: ways[n][0] for n in group if n in ways}, products):
            found[n] = ways[n][1]
    return found


def another(p: Product, nodes: Sequence[Node]) -> bool:
    """Return whether nodes can be computed in another order, or without some factors."""
    count = sum(contracts(m) for m in nodes)
    return count > 1 or len(p.factors) <= count


def needed_of(graph: fx.Graph, products: Products) -> list[Node]:
    """Return the values that the graph must compute in any case."""
    needed = set[Node]()
    for n in reversed(graph.nodes):
        if n in products.found and any(
            n not in products.parts.get(u, ()) or (calls_view(u) and u in needed) for u in n.users
        ):
            needed.add(n)
    return [n for n in graph.nodes if n in needed and not calls_view(n)]


def cone(n: Node, products: Products) -> list[Node]:
    """Return ``n`` and the values that its product is composed of."""
    nodes, rest = dict[Node, None](), [n]
    while rest:
        n = rest.pop()
        if n not in nodes:
            nodes[n] = None
            rest += products.parts[n]
    return list(nodes)


def contracts(n: Node) -> bool:
    """Return whether a node multiplies, sums or expands; several such may have a better order."""
    return n.target in SUMS or n.target is aten.expand.default or len(n.all_input_nodes) > 1


def overlapping_cones(cones: dict[Node, list[Node]]) -> Iterable[list[Node]]:
    """Return the needed values in groups whose cones meet."""
    of: dict[Node, list[Node]] = {}
    for n, nodes in cones.items():
        group = [n]
        for other in {id(of[m]): of[m] for m in nodes if m in of and not calls_view(m)}.values():
            group += other
        for member in group:
            of.update(dict.fromkeys(cones[member], group))
    return {id(group): group for group in of.values()}.values()


def worthwhile(
    group: Sequence[Node], cones: dict, prices: dict[Node, float], products: Products
) -> set[Node]:
    """Return the nodes of the group that are cheaper in another order."""
    costs = {m: cost(m, products) for n in group for m in cones[n]}

    def total(otherwise: set[Node]) -> float:
        alive, rest = set[Node](), [n for n in group if n not in otherwise]
        while rest:
            n = rest.pop()
            if n not in alive and n not in otherwise:
                alive.add(n)
                rest += products.parts[n]
        return sum(costs.get(n, 0) for n in alive) + sum(prices[n] for n in otherwise)

    now = min((set(prices), set[Node]()), key=total)
    # a value's cone together, then one by one
    sharing = [frozenset([n for n in prices if m in cones[n]]) for m in costs if not calls_view(m)]
    for some in dict.fromkeys((*sharing, *[frozenset([n]) for n in prices])):
        now = min((now, now - some, now | some), key=lambda way: (total(way), len(way)))
    return now


def cost(n: Node, products: Products) -> float:
    """Return the cost of a node as it is. A value that only a sum reads is not stored."""
    if calls_view(n):
        return 0
    size = n.meta["val"].numel
    if n.target is operator.getitem:  # a convolution's weight gradient
        call: Any = n.args[0]
        images, _, *places = call.args[0].meta["val"].shape
        apart = call.args[-2] > 1
        return CALL + convolution_steps(images * math.prod(places) * size, apart) + STORED * size
    reads = [a.meta["val"].numel for a in n.all_input_nodes]
    if n.target in PRODUCTS:
        steps = size * n.args[0].meta["val"].shape[-1]
        return CALL + matrix_steps(steps, sum(reads), size)
    if n.target in REDUCTIONS:
        return CALL + LOOPED / 2 * reads[0] + STORED * size
    in_loop = len(n.users) == 1 and next(iter(n.users)).target not in PRODUCTS
    return LOOPED / 2 * size + (0 if in_loop else CALL + STORED * size)


def way(products: Products, p: Product) -> tuple[float, Way]:
    """Return the price of a product in its cheapest order, and that order."""
    places: dict[int, int] = {}
    here = lambda labels: tuple([places.setdefault(k, len(places)) for k in labels])
    factors, out = tuple([tuple(map(here, f.dims)) for f in p.factors]), here(p.labels)
    forms = tuple([f.form for f in p.factors])
    extents = tuple([products.extents[k] for k in places])
    shape = tuple([products.count(dim) for dim in p.dims])
    squares = p.scale > 0 and all(p.factors.count(f) % 2 == 0 for f in p.factors)
    unsigned = p.unsigned and not squares  # whose zeros are positive in any case
    plan = Plan(factors, forms, out, shape, extents, p.scale, p.square, p.rooted, unsigned)
    price, order = cheapest(plan)
    price += LOOPED / 2 * products.count(p.labels) * (p.scale != 1)
    return price, ([f.node for f in p.factors], plan, order)

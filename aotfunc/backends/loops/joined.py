"""Compute products that share a matrix as one product of more rows.

Where one kernel makes the rows, as it makes values with their tangents, it writes them below each
other in one piece of memory, and those who read the products find them in another: nothing is
copied, and the shared matrix is read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from torch.fx import Node

from .fuse import Unit
from .ir import Kernel
from .matmul import Matrices, MatrixProduct
from .members import seen_through

#: fewest rows of the largest product: fewer are sooner computed one by one
FEWEST = 6

#: a value -> the memory that it lies in, and the element at which it begins there
Moved = dict[Node, tuple[Node, int]]


def join_products(kernels: dict[Unit, Kernel], products: dict[Unit, MatrixProduct]) -> None:
    """Compute products that share a matrix in the place of the first of them. The units of the
    others leave ``products`` and have no nodes any more; kernels access what has moved."""
    moved: Moved = {}
    pieces: set[tuple[Node, ...]] = set()
    turn = {u: i for i, u in enumerate(products)}
    for units in sharing_a_matrix(kernels, products):
        shared, *others = [products[u] for u in units]
        rows, _, sums = zip(*[p.memory for p in (shared, *others)], strict=True)
        if rows not in pieces:
            if not moved.keys().isdisjoint(rows):
                continue
            pieces.add(rows)
            moved |= below_each_other(rows)
        moved |= below_each_other(sums)
        first, *rest = sorted(units, key=turn.__getitem__)
        products[first] = replace(
            shared,
            rows=shared.rows + sum([p.rows for p in others]),
            a=Matrices(0, 0, shared.deep, 1),
            c=Matrices(0, 0, shared.columns, 1),
        )
        for u in rest:
            del products[u]
            u.nodes = []
    if not moved:
        return
    at = lambda n: moved.get(n, (n, 0))
    for u, k in kernels.items():
        accesses = [
            replace(a, tensor=at(a.tensor)[0], start=a.start + at(a.tensor)[1]) for a in k.accesses
        ]
        kernels[u] = replace(k, accesses=tuple(accesses))
    for u, p in products.items():
        memory, starts = zip(*map(at, p.memory), strict=True)
        a, b, c = [
            m._replace(start=m.start + start)
            for m, start in zip((p.a, p.b, p.c), starts, strict=True)
        ]
        products[u] = replace(p, memory=memory, a=a, b=b, c=c)


def sharing_a_matrix(
    kernels: Mapping[Unit, Kernel], products: Mapping[Unit, MatrixProduct]
) -> list[list[Unit]]:
    """Return products of one matrix with rows that one kernel makes, the one of most rows first.
    All these rows, and the products, are dense and read by launches alone."""
    launched = {n: u for some in (kernels, products) for u in some for n in u.nodes}
    shown = {a.tensor for k in kernels.values() for a in k.accesses}
    shown |= {n for p in products.values() for n in p.memory}
    groups: dict[tuple, dict[Node, Unit]] = {}
    for u, p in products.items():
        rows, matrix, sums = p.memory
        maker = launched.get(rows)
        if (
            maker is not None
            and maker in kernels
            and writes_once(kernels[maker], rows)
            and holds_all(p.a, rows, p.rows, p.deep)
            and holds_all(p.c, sums, p.rows, p.columns)
            and all([read_by_launches(n, launched, shown) for n in (rows, sums)])
        ):
            groups.setdefault((maker, matrix, p.b, p.deep, p.columns), {})[rows] = u
    found = [sorted(g.values(), key=lambda u: -products[u].rows) for g in groups.values()]
    return [g for g in found if len(g) > 1 and products[g[0]].rows >= FEWEST]


def writes_once(kernel: Kernel, n: Node) -> bool:
    """Return whether a kernel writes each element of a value once, and as it is."""
    stores = [s for s in kernel.stores if kernel.accesses[s.access].tensor is n]
    return len(stores) == 1 and not stores[0].blocks and stores[0].shift is None


def holds_all(m: Matrices, n: Node, rows: int, columns: int) -> bool:
    """Return whether a matrix is all of a value, row by row."""
    val = n.meta["val"]
    return (
        m.start == m.batch == 0
        and m.column == 1
        and (m.row == columns or rows == 1)
        and val.numel() == rows * columns
        and val.is_contiguous()
    )


def read_by_launches(n: Node, launched: Mapping[Node, Unit], shown: Set[Node]) -> bool:
    """Return whether only launches read a value, where it is: no view of it is a tensor."""
    return all(
        [
            u not in shown and read_by_launches(u, launched, shown)
            if seen_through(u) and u.users
            else u in launched
            for u in n.users
        ]
    )


def below_each_other(values: Sequence[Node]) -> Moved:
    """Return where these values lie in one piece of memory."""
    first, sizes = values[0], [v.meta["val"].numel() for v in values]
    with first.graph.inserting_before(first):
        memory = first.graph.call_function(below_each_other)
    memory._rename(f"joined_{first.name}")
    memory.meta["val"] = first.meta["val"].new_empty(sum(sizes))
    return {v: (memory, sum(sizes[:i])) for i, v in enumerate(values)}

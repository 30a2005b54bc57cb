"""Choose which products with a Jacobian compute its entries, and from which each is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .colouring import coloured, read_by_symmetry, star_coloured

Pattern = Any  # a scipy.sparse.coo_array of bools


class ColouredProducts(NamedTuple):
    """Products with sums of unit vectors, those of one colour (-1: in no product); the numbers of
    the entries read from them; the product and the position there of each."""

    colours: np.ndarray
    entries: np.ndarray
    product: np.ndarray
    place: np.ndarray

    @property
    def n_products(self) -> int:
        return int(self.colours.max(initial=-1)) + 1


class JacobianPlan(NamedTuple):
    """The computed entries of a Jacobian, those read from products with sums of columns, and
    those from products with sums of rows."""

    row: np.ndarray
    col: np.ndarray
    columns: ColouredProducts | None
    rows: ColouredProducts | None

    @property
    def n_products(self) -> int:
        """Return how many products there are."""
        return sum(part.n_products for part in self[2:] if part)


def by_columns(row: Any, col: Any, colours: np.ndarray, of: Any = slice(None)) -> ColouredProducts:
    return ColouredProducts(colours, np.arange(len(row))[of], colours[col[of]], row[of])


def fewest(pattern: Pattern) -> JacobianPlan:
    """Return a plan in which rows with many entries are computed by rows, the others by columns:
    one full row would give each column a colour of its own. The bound is the first of a few that
    needs the fewest products (no row of them is fewer than its entries)."""
    row, col = pattern.row, pattern.col
    lengths = np.bincount(row, minlength=pattern.shape[0])
    longest = int(lengths.max(initial=0))
    best: JacobianPlan | None = None
    for bound in [longest, *[1 << k for k in range(longest.bit_length())][::-1], 0]:
        many = lengths[row] > bound
        widest = int(np.bincount(col[many]).max(initial=0))
        if best is not None and (bound >= longest or bound + widest >= best.n_products):
            continue
        parts: list[ColouredProducts | None] = [None, None]
        if bound:
            parts[0] = by_columns(row, col, coloured(some_entries(pattern, ~many)), ~many)
        if many.any():
            colours = coloured(some_entries(pattern, many).T)
            colours[lengths <= bound] = -1
            parts[1] = by_columns(col, row, colours, many)
        plan = JacobianPlan(row, col, *parts)
        if best is None or plan.n_products < best.n_products:
            best = plan
    assert best is not None
    return best


def some_entries(pattern: Pattern, chosen: np.ndarray) -> Pattern:
    """Return the pattern with some of its entries."""
    at = pattern.row[chosen], pattern.col[chosen]
    return type(pattern)((pattern.data[chosen], at), pattern.shape)


def by_symmetry(pattern: Pattern) -> JacobianPlan:
    """Return a symmetric matrix's plan: either of two products may give an entry."""
    pattern = (pattern + pattern.T).tocoo()
    row, col, colours = pattern.row, pattern.col, star_coloured(pattern)
    read = read_by_symmetry(row, col, colours)
    return JacobianPlan(row, col, ColouredProducts(colours, np.arange(len(row)), *read), None)


def by_blocks(size: int) -> Callable[[Pattern], JacobianPlan]:
    """Return how to plan for the entries of square blocks of this size on the diagonal."""

    def make(pattern: Pattern) -> JacobianPlan:
        wanted = some_entries(pattern, pattern.row // size == pattern.col // size)
        colours = coloured(pattern, wanted)
        return JacobianPlan(
            wanted.row, wanted.col, by_columns(wanted.row, wanted.col, colours), None
        )

    return make

"""Colour the columns of a sparse matrix that may share one product with it, and tell where each
entry is read.

Gebremedhin, Manne and Pothen, "What Color Is Your Jacobian? Graph Coloring for Computing
Derivatives" (2005), describe both colourings.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Pattern = Any  # a scipy.sparse array of bools


def coloured(pattern: Pattern, wanted: Pattern | None = None) -> np.ndarray:
    """Return a colour for each column, so that no row has two columns of one colour: largest
    first, as in Curtis, Powell and Reid, "On the Estimation of Sparse Jacobian Matrices" (1974).
    If only the ``wanted`` entries are read, others of a row may share colours."""
    rows = neighbours(pattern.tocsc())
    all_taken = [Taken() for _ in range(pattern.shape[0])]
    # where a column stands, whose colours it may not have there, and where it leaves its own
    sides = [(rows, all_taken, all_taken)]
    if wanted is not None:
        wanted_rows, wanted_taken = neighbours(wanted.tocsc()), [Taken() for _ in all_taken]
        sides = [(rows, wanted_taken, all_taken), (wanted_rows, all_taken, wanted_taken)]
    colours = np.full(pattern.shape[1], -1)
    for j in np.argsort([-len(of) for of in rows], kind="stable").tolist():
        met = [others[i] for places, others, _ in sides for i in places[j]]
        colour = max([taken.free for taken in met], default=0)
        while any(colour in taken for taken in met):
            colour += 1
        for places, _, own in sides:
            for i in places[j]:
                own[i].take(colour)
        colours[j] = colour
    return colours


class Taken(set):
    """The colours of a row's columns, and the first that none has."""

    free = 0

    def take(self, colour: int) -> None:
        self.add(colour)
        while self.free in self:
            self.free += 1


def neighbours(compressed: Pattern) -> list[list[int]]:
    """Return the positions of the entries of each row (column) of a csr (csc) array."""
    indices, start = compressed.indices.tolist(), compressed.indptr.tolist()
    return [indices[a:b] for a, b in itertools.pairwise(start)]


def star_coloured(pattern: Pattern) -> np.ndarray:
    """Return a colour for each column of a symmetric matrix, so that every path of four columns
    has three colours. Then of two neighbours one is the only neighbour of its colour that the
    other has: an entry of a symmetric matrix may be read from either column.

    A column gets the first colour that these do not have: its neighbours; the neighbours of its
    uncoloured neighbours; the third column of a path with two colours."""
    nodes = [[k for k in ks if k != j] for j, ks in enumerate(neighbours(pattern.tocsr()))]
    colours = [-1] * len(nodes)
    # by node: the neighbours of each colour, and the colours of neighbours that have another
    # neighbour of the node's own colour
    around: list[dict[int, list[int]]] = [{} for _ in nodes]
    blocked: list[set[int]] = [set() for _ in nodes]
    for v in np.argsort([-len(ks) for ks in nodes], kind="stable").tolist():
        taken = set(around[v])
        for w in nodes[v]:
            taken.update(around[w] if colours[w] < 0 else blocked[w])
        mine = colours[v] = next(c for c in range(len(taken) + 1) if c not in taken)
        for same in around[v].values():
            if len(same) > 1:
                for w in same:
                    blocked[w].add(mine)
        for w in nodes[v]:
            same = around[w].setdefault(mine, [])
            same.append(v)
            if colours[w] >= 0 and len(same) > 1:
                for x in same if len(same) == 2 else (v,):
                    blocked[x].add(colours[w])
    return np.array(colours, dtype=np.int64)


def read_by_symmetry(
    row: np.ndarray, col: np.ndarray, colours: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the colour and row of the product that holds each entry of a star coloured matrix:
    its own if alone of this colour in its row, else its mirror image's."""
    if not len(row):
        return row, col
    product = row.astype(np.int64) * (colours.max() + 1) + colours[col]
    _, which, count = np.unique(product, return_inverse=True, return_counts=True)
    alone = count[which] == 1
    return colours[np.where(alone, col, row)], np.where(alone, row, col)

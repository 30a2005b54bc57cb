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
    wanted = pattern if wanted is None else wanted
    columns = pattern.tocsc()
    pairs = [(neighbours(columns), neighbours(wanted.tocsr()))]
    if wanted is not pattern:
        pairs.append((neighbours(wanted.tocsc()), neighbours(pattern.tocsr())))
    colours = [-1] * pattern.shape[1]
    for j in np.argsort(-np.diff(columns.indptr), kind="stable").tolist():
        taken = {
            colours[k] for rows_of, columns_of in pairs for i in rows_of[j] for k in columns_of[i]
        }
        colours[j] = next(c for c in range(len(taken) + 1) if c not in taken)
    return np.array(colours)


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
    for v in np.argsort([-len(ks) for ks in nodes], kind="stable").tolist():
        taken = set()
        for w in nodes[v]:
            mine = colours[w]
            taken.add(mine)
            for x in nodes[w]:
                other = colours[x]
                if other in taken or other < 0:
                    continue
                if mine < 0 or any(colours[y] == mine for y in nodes[x] if y != w):
                    taken.add(other)
        colours[v] = next(c for c in range(len(taken) + 1) if c not in taken)
    return np.array(colours, dtype=np.int64)


def read_by_symmetry(
    row: np.ndarray, col: np.ndarray, colours: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each entry of a star coloured matrix, the colour and the row of the product that
    holds it: those of its column and row if no other entry of the row has this colour, else those
    of its mirror image."""
    if not len(row):
        return row, col
    product = row.astype(np.int64) * (colours.max() + 1) + colours[col]
    _, which, count = np.unique(product, return_inverse=True, return_counts=True)
    alone = count[which] == 1
    return colours[np.where(alone, col, row)], np.where(alone, row, col)

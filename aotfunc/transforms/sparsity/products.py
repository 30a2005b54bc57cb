"""Patterns made of the factors': products of matrices, distances of rows, samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch.fx import Node

from .pattern import Pattern, in_groups, joined, named_rows, picks, shared

aten = torch.ops.aten
Dependence = Any  # .dependence imports this file

#: op -> rule ``(dependence, result, *args) -> pattern``, None where there is no better one than
#: that of any op
RULES: dict[Any, Callable[..., Pattern | None]] = {}


def pattern_of(*ops: Any) -> Callable:
    """Make a decorator: register the function as the rule of these ops."""

    def register(rule: Callable) -> Callable:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


def indexed(d: Dependence, n: Node, result: str, *given: tuple[Any, str]) -> Pattern:
    """Return the pattern of ``n`` where an element depends on those of each given tensor that have
    its indices. ``result`` and each given text have a letter for each dimension, as for einsum; an
    index that the result does not have may be any, as ``*`` may be.

    Row p of ``x`` and row r of ``y`` make the distance (p, r): ``indexed(d, n, "pr", (x, "p*"),
    (y, "r*"))``."""
    parts = [sparse.csr_array((n.meta["val"].numel, d.count), dtype=bool)]
    for a, letters in given:
        if isinstance(a, Node) and a in d.active:
            kept = {i: result.index(c) for i, c in enumerate(letters) if c in set(result) - {"*"}}
            parts.append(shared(d.of(a), a.meta["val"].shape, n.meta["val"].shape, kept))
    return joined(parts)


# ----- products of matrices ----------------------------------------------------------------------


def kron(a: Any, b: Any) -> Pattern:
    return sparse.kron(a, b, format="csr").astype(bool)


@pattern_of(aten.mm.default, aten.mv.default, aten.bmm.default, aten.dot.default)
def products(d: Dependence, n: Node, a: Node, b: Node) -> Pattern:
    """Return the pattern of a product of matrices, of batches of them, or with vectors."""
    left, right = np.atleast_2d(d.nonzero(a)), d.nonzero(b)
    *batch, m, k = left.shape
    n_columns = 1 if right.ndim == 1 else right.shape[-1]
    rows, columns = sparse.eye_array(m, dtype=bool), sparse.eye_array(n_columns, dtype=bool)
    by_right = [kron(s, columns) for s in left.reshape(*(batch or [1]), m, k)]
    by_left = [kron(rows, s.T) for s in right.reshape(*(batch or [1]), k, n_columns)]
    blocks = lambda each: sparse.block_diag(each, format="csr").astype(bool)
    return joined([blocks(by_right) @ d.of(b), blocks(by_left) @ d.of(a)])


@pattern_of(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def product_and_sum(d: Dependence, n: Node, x: Node, a: Node, b: Node, *_: Any) -> Pattern:
    return joined([named_rows(x, n) @ d.of(x), products(d, n, a, b)])


@pattern_of(aten.addr.default)
def outer_product_and_sum(d: Dependence, n: Node, x: Node, a: Node, b: Node, *_: Any) -> Pattern:
    return joined([named_rows(x, n) @ d.of(x), indexed(d, n, "ij", (a, "i"), (b, "j"))])


@pattern_of(aten.addbmm.default)
def products_and_sum(d: Dependence, n: Node, x: Node, a: Node, b: Node, *_: Any) -> Pattern:
    return joined([named_rows(x, n) @ d.of(x), indexed(d, n, "ij", (a, "*i*"), (b, "**j"))])


# ----- distances ---------------------------------------------------------------------------------

BATCH = "abcdefgh"


def lettered(n: int, letters: str) -> str:
    """Return letters for ``n`` dimensions of a batch, numbered from the last, and those behind."""
    return BATCH[:n][::-1] + letters


@pattern_of(aten._cdist_forward.default)
def distances(d: Dependence, n: Node, x: Node, y: Node, *_: Any) -> Pattern:
    to = lambda a, letters: lettered(a.meta["val"].ndim - 2, letters)
    return indexed(d, n, to(n, "pr"), (x, to(x, "p*")), (y, to(y, "r*")))


@pattern_of(aten._cdist_backward.default)
def distances_backward(
    d: Dependence, n: Node, g: Node, x: Node, y: Node, p: float, norms: Node
) -> Pattern:
    to = lambda a, letters: lettered(a.meta["val"].ndim - 2, letters)
    given = ((g, "p*"), (x, "p*"), (y, "**"), (norms, "p*"))
    return indexed(d, n, to(n, "p*"), *[(a, to(a, letters)) for a, letters in given])


@pattern_of(aten._pdist_forward.default)
def pair_distances(d: Dependence, n: Node, x: Node, *_: Any) -> Pattern | None:
    rows, width = x.meta["val"].shape
    of_rows = in_groups(
        d.of(x), torch.arange(rows)[:, None].expand(rows, width), torch.arange(rows)
    )
    return joined([picks(i, rows) @ of_rows for i in torch.triu_indices(rows, rows, 1)])


# ----- slices, look-ups --------------------------------------------------------------------------


@pattern_of(aten.linalg_cross.default)
def cross_products(d: Dependence, n: Node, x: Node, y: Node, dim: int) -> Pattern:
    def to(a: Node) -> str:
        letters = [*lettered(a.meta["val"].ndim, "")]
        letters[dim if dim < 0 else dim - n.meta["val"].ndim] = "*"
        return "".join(letters)

    return indexed(d, n, to(n), (x, to(x)), (y, to(y)))


@pattern_of(aten.renorm.default)
def renormalised(d: Dependence, n: Node, x: Node, p: float, dim: int, most: float) -> Pattern:
    letters = ["*"] * x.meta["val"].ndim
    letters[dim] = "i"
    return indexed(d, n, "".join(letters), (x, "".join(letters)))


@pattern_of(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def likelihoods(
    d: Dependence, n: Node, x: Node, target: Node, weight: Any, reduction: int, *_: Any
) -> Pattern:
    """Return the pattern of each sample's loss, or of their sum."""
    letters = lettered(x.meta["val"].ndim - 1, "")
    own = letters[:1] + "*" + letters[1:] if letters else "*"
    return indexed(d, n, "" if reduction else letters, (x, own))


@pattern_of(aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
def likelihoods_backward(
    d: Dependence, n: Node, g: Node, x: Node, target: Node, weight: Any, reduction: int, *_: Any
) -> Pattern:
    letters = lettered(x.meta["val"].ndim - 1, "")
    own = letters[:1] + "*" + letters[1:] if letters else "*"
    return indexed(d, n, own, (g, "" if reduction else letters))


# ----- samples of images -------------------------------------------------------------------------


@pattern_of(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def sampled(d: Dependence, n: Node, x: Node, grid: Node, *_: Any) -> Pattern:
    places = BATCH[: n.meta["val"].ndim - 2]
    rest = "*" * len(places)
    return indexed(d, n, "nC" + places, (x, "nC" + rest), (grid, "n" + places + "*"))


@pattern_of(aten.grid_sampler_2d_backward.default, aten.grid_sampler_3d_backward.default)
def sampled_backward(d: Dependence, n: Node, g: Node, x: Node, grid: Node, *_: Any) -> Pattern:
    places = BATCH[: g.meta["val"].ndim - 2]
    rest = "*" * len(places)
    if n.args[1] == 0:  # the images' cotangent
        return indexed(d, n, "nC" + rest, (g, "nC" + rest), (grid, "n*" + rest))
    given = ((g, "n*" + places), (x, "n*" + rest), (grid, "n" + places + "*"))
    return indexed(d, n, "n" + places + "*", *given)

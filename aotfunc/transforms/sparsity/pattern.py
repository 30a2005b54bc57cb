"""Boolean matrices: which elements of one tensor depend on which of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.fx import Node

Pattern = Any  # a scipy.sparse.csr_array of bools


def tags(a: Any) -> Any:
    """Return a dtype that tells the elements of ``a`` apart; other values as they are."""
    if not isinstance(a, torch.dtype) or not (a.is_floating_point or a.is_complex):
        return a
    return torch.complex128 if a.is_complex else torch.float64


def joined(parts: Sequence[Pattern]) -> Pattern:
    """Return the union of some patterns."""
    found = parts[0]
    for part in parts[1:]:
        found = found + part
    return found


def picks(sources: Tensor, count: int) -> Pattern:
    """Return the matrix whose row i takes element ``sources[i]``, none for -1."""
    flat = sources.flatten().numpy(force=True)
    rows = np.flatnonzero(flat >= 0)
    return sparse.csr_array((np.ones(len(rows), bool), (rows, flat[rows])), (len(flat), count))


def named_rows(a: Node, n: Node) -> Pattern:
    """Return the matrix that broadcasts ``a`` to the shape of ``n``."""
    shape = a.meta["val"].shape
    return picks(
        torch.arange(a.meta["val"].numel).view(shape).expand(n.meta["val"].shape),
        a.meta["val"].numel,
    )


def selection_pattern(run: Any, x: Node) -> Pattern | None:
    """Return the pattern of a linear map of tensors like ``x`` whose every result is a multiple of
    one element, or whose every element goes to one result; None for other maps."""
    shape, count, dtype = (x.meta["val"].shape, x.meta["val"].numel, tags(x.meta["val"].dtype))
    found = sources_of(run, shape, dtype)
    if found is not None:
        return picks(found, count)
    start = torch.zeros(shape, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        out = run(start)
    pull = lambda g: torch.autograd.grad(out, start, g, retain_graph=True)[0]
    targets = sources_of(pull, out.shape, out.dtype)
    return None if targets is None else picks(targets, out.numel()).T.tocsr()


def sources_of(apply: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Return, for each result of a map that is linear over the reals, the number of the one
    element that it depends on, -1 where it is zero; None for other maps. Elements have random
    numbers as names: complex ones have one phase, so that the ratio of two is real."""
    phase = 1 + 0.7j if dtype.is_complex else 1
    run = lambda names: apply((names * phase).view(shape))
    generator = torch.Generator().manual_seed(0)
    count = int(np.prod(shape))
    names, *checks = torch.rand(3, count, generator=generator, dtype=torch.float64) + 1
    ordered = torch.arange(1, count + 1, dtype=torch.float64)
    first = run(names)
    ratio = (run(names * ordered) / first).real
    number = torch.where(first == 0, 0, ratio).round().long() - 1
    known = number >= 0
    if not count or bool((number >= count).any()):
        return number.fill_(-1) if not count else None
    for other in checks:
        expected = first * (other / names)[number.clamp(min=0)]
        if not torch.allclose(run(other)[known], expected[known], rtol=1e-9, atol=0):
            return None
        if bool((run(other)[~known] != 0).any()):
            return None
    return number


def in_groups(rows: Pattern, groups: Tensor, results: Tensor) -> Pattern:
    """Return the pattern of results that depend on all elements of one group; ``groups`` numbers
    the elements, ``results`` the results."""
    count = max([int(i.max()) + 1 for i in (groups, results) if i.numel()], default=0)
    return picks(results, count) @ (picks(groups, count).T.tocsr() @ rows)


def shared(
    rows: Pattern, given: Sequence[int], shape: Sequence[int], kept: dict[int, int]
) -> Pattern:
    """Return the pattern of a result of this shape, an element of which depends on those of a
    tensor of the shape ``given`` that have its index along ``kept``: dimensions of the tensor,
    each with the result's. One of size 1 is broadcast, and one that the result sums up is not
    kept."""
    kept = {i: d for i, d in kept.items() if given[i] in (1, shape[d])}
    sizes = [given[i] for i in kept]
    numbers = torch.arange(math.prod(sizes)).view(sizes)
    groups = numbers.view([n if i in kept else 1 for i, n in enumerate(given)])
    there = sorted(range(len(kept)), key=[*kept.values()].__getitem__)
    back = {d: given[i] for i, d in kept.items()}
    results = numbers.permute(there).reshape([back.get(d, 1) for d in range(len(shape))])
    return in_groups(rows, groups.expand(tuple(given)), results.expand(tuple(shape)))

"""Compute all prefixes of a stack by an associative function, in batched steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..capture.tree import flatten, structure, unflatten
from ..debug import at, user_line, where_defined
from ..errors import ArgumentError
from .as_python import UNROLLS, prefixes_in_python
from .dynamo import read_as
from .flow_bodies import path, tensors, trip_count
from .flow_readings import associative_scan_in_graph
from .vmap import vmap


@read_as(associative_scan_in_graph)
def associative_scan(f: Callable, xs: Any, reverse: bool = False, dim: int = 0) -> Any:
    """Return ``ys`` with ``ys[0] = xs[0]`` and ``ys[t] = f(ys[t - 1], xs[t])`` along ``dim``, for
    an associative ``f`` of two elements, in about ``2 log2(n)`` steps that each take all elements
    at once.

    ``xs`` is a tree of tensors, and ``f`` maps two trees of elements to a third. ``reverse``
    starts at the last element. Raises ArgumentError if ``f`` changes the tree, a shape or a dtype,
    or ``xs`` has no dimension ``dim``.

    >>> associative_scan(torch.maximum, torch.tensor([1, 3, 2, 5, 4]))
    tensor([1, 3, 3, 5, 5])
    """
    leaves, spec = flatten(xs)
    rows = tensors("associative_scan", "xs", leaves, spec)
    for k, x in enumerate(rows):
        if not -x.dim() <= dim < x.dim():
            raise ArgumentError(
                f"associative_scan: xs{path(spec, k)} has no dimension {dim}{at(user_line())}"
            )
    rows = [x.movedim(dim, 0).flip(0) if reverse else x.movedim(dim, 0) for x in rows]
    trip_count("associative_scan", rows, spec, None)

    def combined(x: list[Tensor], y: list[Tensor]) -> list[Tensor]:
        tree = vmap(f)(unflatten(x, spec), unflatten(y, spec))
        found, found_spec = flatten(tree)
        if found_spec != spec or not all(
            [(a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(found, x, strict=True)]
        ):
            raise ArgumentError(
                f"associative_scan: {where_defined(f)} must return what it gets, for all elements "
                f"{structure(unflatten(x, spec))}, not {structure(tree)}"
            )
        return found

    def prefixes(x: list[Tensor]) -> list[Tensor]:
        count = x[0].shape[0]
        if count < 2:
            return x
        odd = prefixes(combined([a[:-1:2] for a in x], [a[1::2] for a in x]))
        even = [a[:1] for a in x]
        if count > 2:
            before = [a[:-1] if count % 2 == 0 else a for a in odd]
            rest = combined(before, [a[2::2] for a in x])
            even = [torch.cat(parts) for parts in zip(even, rest, strict=True)]
        half = count // 2
        pairs = [
            torch.stack([a[:half], b], 1).flatten(0, 1) for a, b in zip(even, odd, strict=True)
        ]
        return [torch.cat([p, a[half:]]) for p, a in zip(pairs, even, strict=True)]

    found = prefixes_in_python(f, rows, spec) if UNROLLS.on else prefixes(rows)
    return unflatten([(y.flip(0) if reverse else y).movedim(0, dim) for y in found], spec)

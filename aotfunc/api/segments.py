"""Run loops in segments: the backward of each runs its steps again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map, tree_map_only

from .checkpoint import checkpoint


def scan_in_segments(
    scan: Callable,
    f: Callable,
    init: Any,
    xs: Any,
    length: int,
    reverse: bool,
    unroll: int,
    every: int,
) -> tuple[Any, Any]:
    """Run ``scan`` on segments of ``every`` steps, then on the remaining steps. Reverse mode keeps
    the first carry of each segment, and each carry of the remaining steps."""
    if every == 1:
        return scan(checkpoint(f), init, xs, length, reverse, unroll)
    count, rest = divmod(length, every)
    start, end = (rest, length) if reverse else (0, length - rest)
    rows_of = functools.partial(tree_map_only, torch.Tensor)
    blocks = rows_of(lambda x: x[start:end].unflatten(0, (count, every)), xs)
    segment = checkpoint(lambda carry, rows: scan(f, carry, rows, every, reverse, unroll))
    carry, ys = scan(segment, init, blocks, count, reverse)
    ys = rows_of(lambda y: y.flatten(0, 1), ys)
    if not rest:
        return carry, ys
    left = rows_of(lambda x: x[:rest] if reverse else x[end:], xs)
    carry, more = scan(checkpoint(f), carry, left, rest, reverse, unroll)
    first, last = (more, ys) if reverse else (ys, more)
    joined = lambda x, y: None if x is None else torch.cat([x, y])
    return carry, tree_map(joined, first, last)

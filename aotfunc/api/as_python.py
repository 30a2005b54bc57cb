"""Run loops and branches as Python runs them: what a comparison with eager PyTorch needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..capture.tree import flatten, unflatten


class Unrolls(threading.local):
    """Whether this thread does so."""

    on = False


UNROLLS = Unrolls()


@contextmanager
def as_python() -> Iterator[None]:
    """Let loops and branches inside of the block be Python's: a step after another, the branch
    that is taken."""
    outer, UNROLLS.on = UNROLLS.on, True
    try:
        yield
    finally:
        UNROLLS.on = outer


def scan_in_python(f: Callable, init: Any, xs: Any, steps: int, reverse: bool) -> Any:
    """Run a ``scan`` of at least one step."""
    rows, spec = flatten(xs)
    carry, ys = init, [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        carry, ys[t] = f(carry, None if xs is None else unflatten([x[t] for x in rows], spec))
    return carry, stacks_of(ys)


def while_in_python(cond_fn: Callable, body_fn: Callable, init: Any, max_steps: int | None) -> Any:
    """Run a ``while_loop``."""
    carry, count = init, 0
    while count != max_steps and cond_fn(carry):
        carry, count = body_fn(carry), count + 1
    return carry


def prefixes_in_python(f: Callable, rows: list[Tensor], spec: Any) -> list[Tensor]:
    """Return all prefixes of stacks by ``f``."""
    elements = [unflatten([x[t] for x in rows], spec) for t in range(len(rows[0]))]
    found = elements[:1]
    for x in elements[1:]:
        found.append(f(found[-1], x))
    return flatten(stacks_of(found))[0] if found else rows


def stacks_of(trees: list) -> Any:
    """Return a tree of stacks of the trees' tensors."""
    leaves, specs = zip(*map(flatten, trees), strict=True)
    parts = zip(*leaves, strict=True)
    whole = [torch.stack(x) if isinstance(x[0], Tensor) else x[0] for x in parts]
    return unflatten(whole, specs[0])

"""The Python that Dynamo reads in place of loops, and the function that its graph runs (see
:mod:`.readings`). Branches and ``while_loop`` have none: AOTAutograd, which may run the graph, has
no values to choose by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import ArgumentError
from .dynamo import enter, leave, node
from .readings import paired, refilled


def rows_of(xs: Any, dim: int = 0) -> tuple[list, list, Any, Any]:
    """Return the tensors of ``xs``, stand-ins for a row of each, their tree, and the number of
    rows."""
    leaves, spec = tree_flatten(xs)
    stacks, entered = all_tensors(leaves), []
    if not stacks or not all(-x.dim() <= dim < x.dim() for x in stacks):
        raise ArgumentError("there are no rows")
    if not all(x.size(dim) == stacks[0].size(dim) for x in stacks):
        raise ArgumentError("the numbers of rows differ")
    for x in stacks:
        without = [*x.shape[:dim], *x.shape[dim:][1:]]
        entered.append(enter(x.select(dim, 0) if x.size(dim) else x.new_zeros(without), False))
    return stacks, entered, spec, stacks[0].size(dim)


def all_tensors(leaves: list) -> list:
    """Return the leaves. Raises an error for others than tensors."""
    if not all(isinstance(x, Tensor) for x in leaves):
        raise ArgumentError("a loop takes and returns tensors")
    return leaves


def keep_shapes(before: list, after: list) -> bool:
    """Return whether these are as many tensors, of the same shapes and dtypes."""
    return all(
        isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype
        for x, y in zip(before, after, strict=True)
    )


def example_stack(y: Tensor, count: Any) -> Tensor:
    """Return an example of the stack of ``count`` results like ``y``."""
    return y.unsqueeze(0).repeat_interleave(count, 0)


def read_scan(f: Callable, init: Any, xs: Any, length: int | None, options: dict) -> tuple:
    carry, spec = tree_flatten(init)
    carry = all_tensors(carry)
    rows, entered, row_spec, count = ([], [], None, length) if xs is None else rows_of(xs)
    before = [enter(x, False) for x in carry]
    x = None if xs is None else tree_unflatten(entered, row_spec)
    if length is not None and length != count:
        raise ArgumentError("the numbers of steps differ")
    after, y = f(tree_unflatten(before, spec), x)
    new = paired(init, after, exact=True) if carry else []
    if not keep_shapes(carry, new):
        raise ArgumentError("the carry changes")
    leaves, y_spec = tree_flatten(y)
    ys, k = all_tensors([y for y in leaves if y is not None]), len(carry)
    examples = [*carry, *[example_stack(y, count) for y in ys]]
    how = (k, length, options)
    values = leave(examples, [*carry, *rows], [], [*before, *entered], [*new, *ys], [], how)
    return tree_unflatten(values[:k], spec), refilled(leaves, y_spec, values[k:])


def run_scan(
    scan: Callable,
    body: Callable,
    given: list,
    more: list,
    k: int,
    length: int | None,
    options: dict,
) -> list:
    @functools.wraps(body)
    def step(carry: tuple, row: tuple | None) -> tuple:
        outs = body(*carry, *(row or ()))[0]
        return tuple(outs[:k]), tuple(outs[k:])

    xs = tuple(given[k:]) or None
    after, ys = scan(step, tuple(given[:k]), xs, length, **options)
    return [*after, *ys]


def scan_in_graph(scan: Callable) -> Callable:
    def plain(f: Callable, init: Any, xs: Any, length: int | None, options: dict) -> tuple:
        return scan(f, init, xs, length, **options)

    def reads(
        f: Callable,
        init: Any,
        xs: Any = None,
        length: int | None = None,
        reverse: bool = False,
        unroll: int = 1,
        checkpoint: Any = 0,
        slots: int | None = None,
    ) -> tuple:
        options = {"reverse": reverse, "unroll": unroll, "checkpoint": checkpoint, "slots": slots}
        return node(scan, read_scan, run_scan, plain, f, init, xs, length, options)

    return reads


def read_map(f: Callable, xs: Any, batch_size: int | None = None) -> Any:
    rows, entered, spec, count = rows_of(xs)
    leaves, y_spec = tree_flatten(f(tree_unflatten(entered, spec)))
    ys = all_tensors([y for y in leaves if y is not None])
    examples = [example_stack(y, count) for y in ys]
    values = leave(examples, rows, [], entered, ys, [], (batch_size,))
    return refilled(leaves, y_spec, values)


def run_map(
    map: Callable, body: Callable, given: list, more: list, batch_size: int | None
) -> Sequence[Tensor]:
    step = functools.wraps(body)(lambda rows: tuple(body(*rows)[0]))
    return map(step, tuple(given), batch_size)


def map_in_graph(map: Callable) -> Callable:
    def reads(f: Callable, xs: Any, batch_size: int | None = None) -> Any:
        return node(map, read_map, run_map, map, f, xs, batch_size)

    return reads


def read_associative(f: Callable, xs: Any, reverse: bool, dim: int) -> Any:
    stacks, left, spec, _ = rows_of(xs, dim)
    right = rows_of(xs, dim)[1]
    result = f(tree_unflatten(left, spec), tree_unflatten(right, spec))
    outs = paired(xs, result, exact=True)
    if not keep_shapes(left, outs):
        raise ArgumentError("an element changes")
    values = leave(stacks, stacks, [], [*left, *right], outs, [], (reverse, dim))
    return tree_unflatten(values, spec)


def run_associative(
    associative_scan: Callable, body: Callable, given: list, more: list, reverse: bool, dim: int
) -> Sequence[Tensor]:
    combine = functools.wraps(body)(lambda left, right: tuple(body(*left, *right)[0]))
    return associative_scan(combine, tuple(given), reverse, dim)


def associative_scan_in_graph(associative_scan: Callable) -> Callable:
    def reads(f: Callable, xs: Any, reverse: bool = False, dim: int = 0) -> Any:
        how = (associative_scan, read_associative, run_associative, associative_scan)
        return node(*how, f, xs, reverse, dim)

    return reads

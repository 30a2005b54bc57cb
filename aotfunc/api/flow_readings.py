"""The Python that Dynamo reads in place of loops, and the function that its graph runs (see
:mod:`.readings`). Branches and ``while_loop`` have none: AOTAutograd, which may run the graph, has
no values to choose by."""

from __future__ import annotations

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
    if not stacks:
        raise ArgumentError("there are no rows")
    for x in stacks:
        without = [*x.shape[:dim], *x.shape[dim:][1:]]
        entered.append(enter(x.select(dim, 0) if x.size(dim) else x.new_zeros(without), False))
    return stacks, entered, spec, stacks[0].size(dim)


def all_tensors(leaves: list) -> list:
    """Return the leaves. Raises an error for others than tensors."""
    if not all(isinstance(x, Tensor) for x in leaves):
        raise ArgumentError("a loop takes and returns tensors")
    return leaves


def example_stack(y: Tensor, count: Any) -> Tensor:
    """Return an example of the stack of ``count`` results like ``y``."""
    return y.unsqueeze(0).repeat_interleave(count, 0)


def read_scan(f: Callable, init: Any, xs: Any, length: int | None, options: dict) -> tuple:
    carry, spec = tree_flatten(init)
    carry = all_tensors(carry)
    rows, entered, row_spec, count = ([], [], None, length) if xs is None else rows_of(xs)
    before = [enter(x, False) for x in carry]
    x = None if xs is None else tree_unflatten(entered, row_spec)
    after, y = f(tree_unflatten(before, spec), x)
    leaves, y_spec = tree_flatten(y)
    ys, k = all_tensors([y for y in leaves if y is not None]), len(carry)
    examples = [*carry, *[example_stack(y, count) for y in ys]]
    outs = [*(paired(init, after, exact=True) if carry else []), *ys]
    how = (k, length, options)
    values = leave(examples, [*carry, *rows], [], [*before, *entered], outs, [], how)
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
    return map(lambda rows: tuple(body(*rows)[0]), tuple(given), batch_size)


def map_in_graph(map: Callable) -> Callable:
    def reads(f: Callable, xs: Any, batch_size: int | None = None) -> Any:
        return node(map, read_map, run_map, map, f, xs, batch_size)

    return reads


def read_associative(f: Callable, xs: Any, reverse: bool, dim: int) -> Any:
    stacks, left, spec, _ = rows_of(xs, dim)
    right = rows_of(xs, dim)[1]
    result = f(tree_unflatten(left, spec), tree_unflatten(right, spec))
    values = leave(
        stacks, stacks, [], [*left, *right], paired(xs, result, exact=True), [], (reverse, dim)
    )
    return tree_unflatten(values, spec)


def run_associative(
    associative_scan: Callable, body: Callable, given: list, more: list, reverse: bool, dim: int
) -> Sequence[Tensor]:
    return associative_scan(
        lambda left, right: tuple(body(*left, *right)[0]), tuple(given), reverse, dim
    )


def associative_scan_in_graph(associative_scan: Callable) -> Callable:
    def reads(f: Callable, xs: Any, reverse: bool = False, dim: int = 0) -> Any:
        how = (associative_scan, read_associative, run_associative, associative_scan)
        return node(*how, f, xs, reverse, dim)

    return reads

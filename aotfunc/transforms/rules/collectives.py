"""Rules of the functional collectives of torch.distributed, which exchange tensors between
processes.

Each process differentiates the sum of what all processes compute, as each runs the same program:
the cotangents of a value that went to all come back from all. (The formulas are those of
transposition: a sum over processes is its own transpose; gathering and scattering are transposes
of each other.)

Collectives count in pieces of dimension 0, so a batch goes to dimension 1 meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .table import decompose_as, linear

space = torch.ops._c10d_functional


def mean_or_sum(how: str, name: str) -> None:
    if how not in ("sum", "avg"):
        raise NotImplementedError(
            f"{name} by {how!r} over the processes has no derivative here, only by 'sum' and 'avg'"
        )


def reverse_all_reduce(x: Tensor, how: str, group: Any) -> Tensor:
    mean_or_sum(how, "all_reduce")
    return space.wait_tensor(space.all_reduce(x.contiguous(), how, group))


def reverse_reduce_scatter(g: Tensor, x: Tensor, how: str, size: int, group: Any) -> Tensor:
    mean_or_sum(how, "reduce_scatter")
    all_of_it = space.wait_tensor(space.all_gather_into_tensor(g.contiguous(), size, group))
    return all_of_it / size if how == "avg" else all_of_it


def reverse_all_gather(g: Tensor, x: Tensor, size: int, group: Any) -> Tensor:
    return space.wait_tensor(space.reduce_scatter_tensor(g.contiguous(), "sum", size, group))


def sent_back(g: Tensor, x: Tensor, received: Any, sent: Any, group: Any) -> Tensor:
    return space.wait_tensor(space.all_to_all_single(g.contiguous(), sent, received, group))


def at_source(g: Tensor, x: Tensor, source: int, group: Any) -> Tensor:
    """Return the sum over all processes at the value's source, and zeros elsewhere."""
    mine = torch.distributed.distributed_c10d._resolve_process_group(group).rank() == source
    here = torch.full((), mine, dtype=torch.bool, device=g.device)
    return torch.where(
        here, reverse_all_reduce(g, "sum", group), 0
    )  # read by all: else some would not call


def uncoalesced(op: Any) -> Callable:
    """Return the collective of several tensors as one collective for each."""
    return lambda xs, *args: [op(x, *args) for x in xs]


def beside_pieces(op: Any) -> Callable:
    """Return the vmap rule of an op that cuts dimension 0 into pieces."""
    return lambda x, *args: op(x.movedim(0, 1).contiguous(), *args).movedim(1, 0)


if torch.distributed.is_available():
    linear(
        space.all_reduce, lambda g, x, *how: reverse_all_reduce(g, *how), batch=space.all_reduce
    )
    linear(space.wait_tensor, lambda g, x: g, batch=space.wait_tensor)
    linear(space.broadcast, at_source, batch=space.broadcast)
    for names in (space, torch.ops._c10d_functional_autograd):
        for op, transpose in (
            (names.all_gather_into_tensor, reverse_all_gather),
            (names.reduce_scatter_tensor, reverse_reduce_scatter),
            (names.all_to_all_single, sent_back),
        ):
            linear(op, transpose, batch=beside_pieces(op))
    decompose_as(space.all_reduce_coalesced, uncoalesced(space.all_reduce))
    for op in (space.all_gather_into_tensor, space.reduce_scatter_tensor):
        decompose_as(getattr(space, f"{op.__name__}_coalesced"), uncoalesced(op))

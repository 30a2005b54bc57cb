"""Ops over the samples of the ``vmap`` that named its axis.

Each sample differentiates the sum of the results of all samples, as a process of a parallel
program does (see :mod:`.collectives`): a sum over the axis is its own transpose. The batch of
another axis goes through the op like any other dimension.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor

from .schema import op_of_graphs
from .table import linear, nondiff

_library = torch.library.Library("aotfunc", "FRAGMENT")


def without_axis(*args: Any) -> NoReturn:
    raise RuntimeError(f"there is no vmap with axis_name={args[-1]!r} around this op")


defined = functools.partial(op_of_graphs, _library, without_axis)


#: the sum over the samples, in the argument's dtype
psum = defined("psum(Tensor x, str axis) -> Tensor", lambda x, axis: x.clone())
#: the values of all samples, at a new dimension 0 of this size
all_gather = defined(
    "all_gather(Tensor x, int size, str axis) -> Tensor",
    lambda x, size, axis: x.new_empty((size, *x.shape)),
)
#: the number of the sample, as a tensor like this 0-dim integer
axis_index = defined("axis_index(Tensor x, str axis) -> Tensor", lambda x, axis: x.clone())

OPS = (psum, all_gather, axis_index)


def of_this_sample(g: Tensor, x: Tensor, size: int, axis: str) -> Tensor:
    index = axis_index(torch.zeros(1, dtype=torch.int64, device=g.device), axis)
    return psum(g, axis).index_select(0, index).squeeze(0)


linear(psum, lambda g, x, axis: psum(g, axis), batch=lambda x, axis: psum(x, axis))
linear(
    all_gather, of_this_sample, batch=lambda x, size, axis: all_gather(x, size, axis).movedim(1, 0)
)
nondiff(axis_index)

"""Sum over rows in a kernel that also sums along them: blocks of rows first, then the blocks.

A kernel that runs row by row cannot finish a sum over rows, as other threads have the other rows.
It stores the sum of each block of rows, and a second kernel adds these few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from .reductions import REDUCTIONS
from .views import static_shape

#: rows of a block, whatever the number of threads
ROWS = 32

_library = torch.library.Library("aotfunc", "FRAGMENT")
_library.define("block_sums(Tensor x, int dims) -> Tensor")


def sums(x: Tensor, dims: int) -> Tensor:
    """Return the sum of each block of the points of the first ``dims`` dimensions."""
    rows = x.reshape(-1, *x.shape[dims:])
    return torch.stack([block.sum(0) for block in rows.split(ROWS)])


def meta_block_sums(x: Tensor, dims: int) -> Tensor:
    """Return a tensor like the result, without memory."""
    return meta_like(x, (-(-math.prod(x.shape[:dims]) // ROWS), *x.shape[dims:]))


def meta_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of another shape, without memory."""
    made = torch.empty(shape, dtype=x.dtype, device="meta")
    # not by an op of x, which would import Dynamo
    return FakeTensor(x.fake_mode, made, x.device) if isinstance(x, FakeTensor) else made


_library.impl("block_sums", sums, "CPU")
_library.impl("block_sums", meta_block_sums, "Meta")
block_sums = torch.ops.aotfunc.block_sums.default


def sum_in_blocks(graph: fx.Graph, within_kernels: Callable[[fx.Node], bool]) -> None:
    """Sum first over blocks where a tensor of the same shape is also summed along its rows, and
    one kernel may do both. Changes the graph."""
    asked = {n: reduced_dims(n) for n in graph.nodes if n.target in REDUCTIONS}
    if len(set(asked.values())) < 2:
        return
    part = joinable(graph, within_kernels)
    along = {(part[n], *sizes) for n, sizes in asked.items()}
    for n, (shape, dims) in asked.items():
        rest = tuple(range(len(dims), len(shape)))
        if n.target is not torch.ops.aten.sum.dim_IntList or (part[n], shape, rest) not in along:
            continue
        x, val = n.args[0], n.meta["val"]
        before = x.meta["val"]
        plain = before.dtype is val.dtype and before.is_contiguous() and before.numel() > 0
        leading = dims == tuple(range(len(dims))) and len(val.shape) == len(rest)
        if plain and leading and val.dtype in (torch.float32, torch.float64):
            with graph.inserting_before(n):
                first = graph.call_function(block_sums, (x, len(dims)))
            first.meta = {**n.meta, "val": meta_block_sums(before, len(dims))}
            n.args = (first, [0])


def joinable(graph: fx.Graph, within_kernels: Callable[[fx.Node], bool]) -> dict[fx.Node, fx.Node]:
    """Return a node for each value, the same for those that kernels may join, as one reads the
    other or both read a third."""
    later: dict[fx.Node, fx.Node] = {}  # value -> one of its part, the last one itself
    for n in graph.nodes:
        later[n] = n
        for m in n.all_input_nodes if within_kernels(n) else ():
            while later[m] is not m:
                later[m] = m = later[later[m]]
            later[m] = n
    part: dict[fx.Node, fx.Node] = {}
    for n in reversed(graph.nodes):
        part[n] = part.get(later[n], n)
    return part


def reduced_dims(n: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of a reduction's argument, and the dimensions that it reduces."""
    shape = static_shape(n.args[0])  # type: ignore[arg-type]
    dims = REDUCTIONS[n.target](*n.args, **n.kwargs).dims
    every = range(len(shape))
    return shape, tuple(sorted([every[d] for d in dims if shape] if dims else every))

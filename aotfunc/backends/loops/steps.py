"""Reduce to one number in two steps, so that several threads take part: to rows, then over them.

The rows depend on sizes alone, and so does the result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .blocks import meta_like
from .members import in_kernels, seen_through
from .views import source_of

aten = torch.ops.aten

#: fewest elements that are worth a second step, and fewest rows and elements of a row
MANY, FEW = 1 << 18, 16

#: elements of the rows into which a vector is cut
ROW = 4096

MEANS = (aten.mean.default, aten.mean.dim)

#: reduction to one number -> the reductions of its two steps
STEPS: dict[Any, Any] = {
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList, *MEANS), aten.sum.dim_IntList),
    **dict.fromkeys((aten.amax.default, aten.max.default), aten.amax.default),
    **dict.fromkeys((aten.amin.default, aten.min.default), aten.amin.default),
}


def in_steps(graph: fx.Graph) -> None:
    """Take two steps where a kernel makes one number of many elements. Changes the graph."""
    for n in list(graph.nodes):
        if n.target in STEPS and not n.kwargs and made_here(n.args[0]):
            val = n.args[0].meta["val"]
            plain = val.dtype in (torch.float32, torch.float64) and val.numel() >= MANY
            if plain and not n.meta["val"].dim():
                split_reduction(graph, n)


def made_here(x: Any) -> bool:
    """Return whether a kernel may compute a value. One in memory is PyTorch's to reduce."""
    while (source := source_of(x)) is not None:
        x = source
    return in_kernels(x) and not seen_through(x)


def split_reduction(graph: fx.Graph, n: Node) -> None:
    x, step = n.args[0], STEPS[n.target]
    val = x.meta["val"]  # type: ignore[union-attr]
    leading = next((d for d in range(val.dim()) if math.prod(val.shape[:d]) >= FEW), None)

    def call(target: Any, shape: Any, *args: Any) -> Node:
        with graph.inserting_before(n):
            new = graph.call_function(target, args)
        new.meta = {**n.meta, "val": meta_like(val, shape)}
        return new

    if leading is None:
        row = math.gcd(val.numel(), ROW)
        if row < FEW or not val.is_contiguous():
            return
        shape, leading = (val.numel() // row, row), 1
        x = call(aten.view.default, shape, x, list(shape))
    else:
        shape = val.shape
        if math.prod(shape[leading:]) < FEW:
            return
    rows = call(step, shape[:leading], x, [*range(leading, len(shape))])
    whole = call(step, (), rows, [*range(leading)])
    if n.target in MEANS:
        whole = call(aten.div.Tensor, (), whole, float(val.numel()))
    n.replace_all_uses_with(whole)
    graph.erase_node(n)

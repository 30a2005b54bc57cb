"""Compute real and imaginary parts in kernels, where a graph has views of them in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .blocks import meta_like
from .complexes import imag_part, real_part
from .members import in_kernels
from .recompute import readers_of
from .steps import made_here

aten = torch.ops.aten


def without_views_of_parts(graph: fx.Graph) -> None:
    """Replace ``view_as_real`` and ``view_as_complex`` between kernels in the graph."""
    for n in list(graph.nodes):
        if not all(map(in_kernels, readers_of(n))):
            continue
        if n.target is aten.select.int and n.args[0].target is aten.view_as_real.default:
            shown, dim, i = n.args
            (z,) = shown.args
            if dim % shown.meta["val"].dim() == z.meta["val"].dim() and made_here(z):
                replace(graph, n, (real_part, imag_part)[i], z)
        elif n.target is aten.view_as_complex.default and made_here(n.args[0]):
            replace(graph, n, aten.complex.default, *[part_row(graph, n, i) for i in (0, 1)])


def replace(graph: fx.Graph, n: Node, target: Any, *args: Node) -> None:
    """Put a call in the place of a node, and erase what only that node read."""
    val = n.meta["val"]
    with graph.inserting_before(n):
        new = graph.call_function(target, args)
    new.meta = {**n.meta, "val": meta_like(val, val.shape)}
    n.replace_all_uses_with(new)
    graph.erase_node(n)
    for a in list(n.args):
        if isinstance(a, Node) and not a.users and a.target is aten.view_as_real.default:
            graph.erase_node(a)


def part_row(graph: fx.Graph, n: Node, i: int) -> Node:
    """Return the row of ``n``'s argument that holds one of the parts."""
    (x,) = n.args
    with graph.inserting_before(n):
        part = graph.call_function(aten.select.int, (x, -1, i))
    part.meta = {**n.meta, "val": meta_like(x.meta["val"], n.meta["val"].shape)}  # type: ignore
    return part

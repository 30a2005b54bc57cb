"""Gather the parameters of one module by one collective, and reduce their gradients by one.

The parts of all are copied into one flat tensor and back, as FSDP2 does it: those of one size on
all processes, the last ones padded with zeros."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..trace.dtensors import mesh_and_placements
from ..trace.emit import remap
from ..trace.node_views import calls_view
from ..trace.placing import dtensor, dtensor_spec

layouts, space = torch.ops.aotfunc_layout, torch.ops._c10d_functional


class Pieces:
    """How a tensor of this shape lies in parts: in ``count`` pieces along ``dim``, the dimension
    of the ``mesh`` that ``axis`` numbers."""

    def __init__(self, shape: Sequence[int], layout: str) -> None:
        self.mesh, self.placements = mesh_and_placements(layout)
        ((self.axis, self.dim),) = [
            (i, p.dim) for i, p in enumerate(self.placements) if p.is_shard()
        ]
        self.count, self.length = self.mesh.size(self.axis), shape[self.dim]
        self.rest = [d for i, d in enumerate(shape) if i != self.dim]
        self.size = -(-self.length // self.count)
        self.numel = self.size * math.prod(self.rest)
        start = self.mesh.get_local_rank(self.axis) * self.size
        self.mine = max(0, min(self.length - start, self.size))

    def flat(self, t: Tensor, count: int) -> Tensor:
        """Return ``count`` padded pieces as rows."""
        rows = t.movedim(self.dim, 0)
        if missing := count * self.size - len(rows):
            rows = torch.cat([rows, rows.new_zeros([missing, *self.rest])])
        return rows.reshape(count, self.numel)

    def back(self, rows: Tensor, length: int) -> Tensor:
        """Return the first ``length`` of what lies in rows."""
        t = rows.reshape(-1, *self.rest)[:length]
        return t.movedim(0, self.dim).contiguous()

    def group(self, axis: int) -> str:
        return self.mesh.get_group(axis).group_name


def gathered(xs: Sequence[Any], pieces: Sequence[Pieces], nodes: Sequence[Node]) -> list[Tensor]:
    """Return the wholes of parts, in the dtype of the first node."""
    p, dtype = pieces[0], nodes[0].args[3]
    mine = torch.cat(
        [p.flat(x._local_tensor.to(dtype), 1) for x, p in zip(xs, pieces, strict=True)], 1
    )
    rows = space.all_gather_into_tensor(mine, p.count, p.group(p.axis))
    parts = space.wait_tensor(rows).split([p.numel for p in pieces], 1)
    return [p.back(t, p.length) for t, p in zip(parts, pieces, strict=True)]


def scattered(gs: Sequence[Any], pieces: Sequence[Pieces], nodes: Sequence[Node]) -> list[Any]:
    """Return the parts of the sums, or means, of what all processes have."""
    p = pieces[0]
    _, shape, _, dtype, reduce, _, sums, _, _ = nodes[0].args
    how = mesh_and_placements(sums)[1][0].reduce_op
    rows = torch.cat([p.flat(g, p.count) for g, p in zip(gs, pieces, strict=True)], 1)
    if reduce is not None:
        rows = rows.to(reduce)
    mine = space.wait_tensor(space.reduce_scatter_tensor(rows, how, p.count, p.group(p.axis)))
    for axis in range(p.mesh.ndim):
        if axis != p.axis:
            mine = space.wait_tensor(space.all_reduce(mine, how, p.group(axis)))
    found = []
    for t, p, n in zip(
        mine.to(dtype).split([p.numel for p in pieces], 1), pieces, nodes, strict=True
    ):
        _, shape, stride, dtype, *_ = n.args
        spec = dtensor_spec(p.mesh, p.placements, shape, stride, dtype)
        found.append(dtensor(p.back(t, p.mine), spec))
    return found


TOGETHER: dict[Any, Callable] = {
    layouts.gather.default: gathered,
    layouts.scatter.default: scattered,
}


def one_collective(n: Node, env: Mapping[Node, Any]) -> dict[Node, Any]:
    """Run a node, and all others of its call that have their argument, or a view shows it."""
    like = (n.target, *n.args[3:])
    args = {
        m: a
        for m in n.graph.nodes
        if m.target is n.target
        and (m.target, *m.args[3:]) == like
        and m not in env
        and (a := at_hand(m.args[0], env)) is not None
    }
    pieces = [Pieces(m.args[1], n.args[7]) for m in args]
    found = TOGETHER[n.target]([*args.values()], pieces, [*args])
    return dict(zip(args, found, strict=True))


def at_hand(n: Node, env: Mapping[Node, Any]) -> Any:
    """Return the value of a node that has one, or is a view or an item of one; else None."""
    if n in env:
        return env[n]
    if len(n._input_nodes) != 1 or not (n.target is operator.getitem or calls_view(n)):
        return None
    (above,) = n._input_nodes
    seen = at_hand(above, env)
    return None if seen is None else n.target(*remap(n.args, {above: seen}), **n.kwargs)

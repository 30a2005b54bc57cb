"""Prove which literals of a batched program are multiples of the batch's size, so that it serves
batches of any size.

Follow the batch through a finished graph: for each value, find the dimension that holds it. Every
op must treat the samples alike and apart from one another (:mod:`.apart` says how each op moves
the batch). Then each sample's results are one function of this sample and of unbatched values.
That function does not depend on the number of samples, so a property proved for the graph's own
size holds for any.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from ..graph import Program, draws
from .apart import OF_NUMBERS, part_rule_for
from .apart.parts import FACTORIES, Mixed, OpCall, Part, Walk


def size_multiples(
    program: Program, dims: Sequence[int | None], out_dims: Sequence[int | None], size: int
) -> dict[Node, tuple]:
    """Return the arguments, with Times in them, of the nodes of a batched program whose literals
    depend on its ``size``. ``dims`` and ``out_dims``: the batch dimension of each input and each
    result. Raises Mixed if some op may mix samples."""
    if program.mutated or size < 2:
        raise Mixed
    try:
        return follow_batch(program, dims, out_dims, Walk(size, multiples=False))
    except Mixed:
        return follow_batch(program, dims, out_dims, Walk(size, multiples=True))


def follow_batch(
    program: Program, dims: Sequence[int | None], out_dims: Sequence[int | None], walk: Walk
) -> dict:
    for i, p in enumerate(program.placeholders):
        dim = dims[i] if i < len(dims) else None
        walk.parts[p] = None if dim is None else Part(dim)
    for n in program.graph.nodes:
        if n.op == "call_function":
            walk.parts[n] = part_of(walk, n)
    for o, dim in zip(program.outputs, out_dims, strict=True):
        found = walk.parts[o] if isinstance(o, Node) else None
        if found != (None if dim is None else Part(dim % o.meta["val"].ndim)):
            raise Mixed
    return walk.args


def part_of(walk: Walk, n: Node) -> Any:
    """Return the part of a node's result; a list for several."""
    if n.target is operator.getitem:
        parent = walk.parts[n.args[0]]  # type: ignore[index]
        return parent[n.args[1]] if isinstance(parent, list) else parent  # type: ignore[index]
    if not isinstance(n.target, OpOverload) or draws(n):
        raise Mixed
    call = OpCall(walk, n)
    if not call.batched:
        return FACTORIES[n.target](call) if n.target in FACTORIES else None
    rule = part_rule_for(n.target)
    if rule is None or (
        n.target not in OF_NUMBERS and any(p is not None and p.number for _, p in call.tensors)
    ):
        raise Mixed
    found = rule(call)
    for part, val in (
        zip(found, call.val, strict=True) if isinstance(found, list) else [(found, call.val)]
    ):
        if part is not None and val.shape[part.dim : part.dim + 1] != (part.each * walk.size,):
            raise Mixed
    return found

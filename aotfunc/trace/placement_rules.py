"""Run ops on DTensors whose parts are traced, or have no values: by PyTorch's rules for their
placements, or by our own where those keep values or are wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .kinds import is_dtensor
from .placing import dtensor, dtensor_spec, everywhere, mirrored, replicated, resharded

aten = torch.ops.aten


def on_whole(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an op on the whole of its arguments, in all processes."""
    found = next(x for x in tree_leaves((args, kwargs)) if is_dtensor(x))
    args, kwargs = tree_map_only(is_dtensor, everywhere, (args, kwargs))
    return tree_map_only(Tensor, lambda o: replicated(o, found._spec.mesh), op(*args, **kwargs))


def rule_for(op: Any, args: tuple, kwargs: dict) -> tuple[Callable, Any]:
    """Return how an op runs on these DTensors, and its results without values. Raises what
    PyTorch raises for an op that has no rule for DTensors."""
    if op in PLACEMENT_RULES:
        return PLACEMENT_RULES[op], mirrored(PLACEMENT_RULES[op], *args, **kwargs)
    outs = mirrored(op, *args, **kwargs)
    placements = [p for o in tree_leaves(outs) if is_dtensor(o) for p in o._spec.placements]
    masks = [p.mask_buffer for p in placements if hasattr(p, "mask_buffer")]
    if not masks:
        return op, outs
    for m in masks:  # they hold values, which would be those of one call
        m.data, m.refcount = None, 0
    whole = functools.partial(on_whole, op)
    return whole, mirrored(whole, *args, **kwargs)


def embedding(weight: Any, indices: Any, *rest: Any) -> Any:
    """Look up rows. A process with some of them has zeros for others, to be added up."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = (weight if is_dtensor(weight) else indices)._spec.mesh
    weight, indices = replicated(weight, mesh), replicated(indices, mesh)
    ways = []
    for w, i in zip(weight._spec.placements, indices._spec.placements, strict=True):
        if w == Shard(0):
            ways.append((w, Replicate(), Partial()))
        elif w == Shard(1):
            ways.append((w, Replicate(), Shard(indices.ndim)))
        elif i.is_shard() and w.is_replicate():
            ways.append((w, i, i))
        else:
            ways.append((Replicate(), Replicate(), Replicate()))
    at_rows, at_indices, at_result = zip(*ways, strict=True)
    weight, indices = resharded(weight, at_rows), resharded(indices, at_indices)
    rows, where = weight._local_tensor, indices._local_tensor
    if Partial() in at_result:
        _, (first, _) = compute_local_shape_and_global_offset(weight.shape, mesh, at_rows)
        elsewhere = (where < first) | (where >= first + rows.shape[0])
        found = torch.embedding(rows, (where - first).masked_fill(elsewhere, 0))
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0)
    else:
        found = torch.embedding(rows, where)
    shape = (*indices.shape, weight.shape[1])
    stride = torch.empty(shape, device="meta").stride()
    return dtensor(found, dtensor_spec(mesh, at_result, shape, stride, weight.dtype))


#: ops that draw a number for each element -> those without a write, which graphs have
DRAWN = {
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.exponential_.default: aten.exponential.default,
    aten.geometric_.default: aten.geometric.default,
    aten.log_normal_.default: aten.log_normal.default,
    aten.normal_.default: aten.normal_functional.default,
    aten.uniform_.default: aten.uniform.default,
    **{
        op: op
        for op in (aten.bernoulli.default, aten.native_dropout.default)
        + (aten.rand_like.default, aten.randn_like.default)
    },
}


def drawn_in_parts(op: Any, x: Any) -> bool:
    """Return whether each process draws for its part of a DTensor from its own generator: so
    PyTorch does on devices for which it keeps no generators of all."""
    if op not in DRAWN or not is_dtensor(x) or any(p.is_partial() for p in x._spec.placements):
        return False
    return not hasattr(getattr(torch, x._spec.mesh.device_type, None), "set_rng_state")


def draw(op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Draw for the part of this process."""
    with _disable_current_modes():
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        wholes = op(like, *args, **kwargs)
    mesh, places = x._spec.mesh, x._spec.placements

    def placed(part: Tensor, whole: Tensor) -> Any:
        return dtensor(part, dtensor_spec(mesh, places, whole.shape, whole.stride(), whole.dtype))

    return tree_map(placed, op(x._local_tensor, *args, **kwargs), wholes)


#: losses whose rules in PyTorch take the elements of each process for all elements
PER_ELEMENT_LOSSES = [
    getattr(aten, name).default
    for name in ("binary_cross_entropy_with_logits", "huber_loss_backward", "mse_loss_backward")
    + ("binary_cross_entropy", "binary_cross_entropy_backward", "smooth_l1_loss_backward")
]
#: ops whose rules in PyTorch keep values, or are wrong
PLACEMENT_RULES: dict[Any, Callable] = {
    aten.embedding.default: embedding,
    **{op: functools.partial(draw, op) for op in DRAWN.values()},
    **{op: functools.partial(on_whole, op) for op in PER_ELEMENT_LOSSES},
}

"""Place a batch in an op that runs once for all samples: in front, beside the dimensions that it
broadcasts or names; folded into ``N``; or among the channels.

A batch arrives at dimension 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from .schema import Formula, call_op, overload, tensor_args

# ----- in front ----------------------------------------------------------------------------------


def align(x: Tensor, rank: int) -> Tensor:
    """Return ``x`` with the batch at 0 and ones behind it, to broadcast with ``rank`` others."""
    return (
        x.reshape(x.shape[0], *[1] * (rank + 1 - x.dim()), *x.shape[1:]) if x.dim() <= rank else x
    )


def elementwise(op: OpOverload) -> Formula:
    """Return the vmap rule of an op that broadcasts: align the ranks behind the batch."""
    where = tensor_args(op)

    def batch(*args: Any, batched: tuple[Any, ...]) -> Any:
        tensors = [args[i] for i in where]
        rank = max(
            x.dim() - b for x, b in zip(tensors, batched, strict=True) if isinstance(x, Tensor)
        )
        full = list(args)
        for i, x, b in zip(where, tensors, batched, strict=True):
            if b:
                full[i] = align(x, rank)
        return call_op(op, full)

    return batch


def shifted(op: OpOverload | OpOverloadPacket, *names: str, first: str = "self") -> Formula:
    """Return the vmap rule of an op on one tensor argument whose ``names`` are dimensions: each is
    counted past the batch.

    A dimension that is ``None`` or an empty list stands for all of them and becomes all but the
    batch."""
    op = overload(op)
    schema = [a.name for a in op._schema.arguments]
    x_at, dims_at = schema.index(first), [schema.index(name) for name in names]

    def batch(*args: Any) -> Any:
        full = list(args)
        x = full[x_at]
        # PyTorch lets a 0-dim tensor have dimensions 0 and -1: give it one, and take it away again
        if x.dim() == 1:
            full[x_at] = x.unsqueeze(1)
        for at in dims_at:
            full[at] = past_batch(full[at], max(x.dim() - 1, 1))
        outs = call_op(op, full)
        if x.dim() > 1:
            return outs
        return (
            tuple(o.reshape(x.shape) for o in outs)
            if isinstance(outs, tuple)
            else outs.reshape(x.shape)
        )

    return batch


def past_batch(dim: Any, rank: int) -> Any:
    """Return dimension(s) of a tensor of ``rank``, counted in the batched one (batch at 0)."""
    if isinstance(dim, int):
        return dim % rank + 1
    if not dim:
        return list(range(1, rank + 1))
    return [past_batch(d, rank) for d in dim]


def expand_lead(x: Tensor, batched: bool, size: Any) -> Tensor:
    """Return ``x`` with the batch at 0, repeated over it if it had none."""
    return x if batched else x.expand(size, *x.shape)


def with_batch(x: Tensor, carries: bool, size: int) -> Tensor:
    """Return ``x`` with the batch in front, repeated if it does not carry it yet.

    The repetition is a copy: some kernels read saved statistics and indices as if they were
    contiguous, and past their end."""
    return x if carries else x.expand(size, *x.shape).contiguous()


def all_batched(tensors: Sequence[Tensor | None], batched: Sequence[bool], size: int) -> list[Any]:
    """Return all of the tensors with the batch in front; an absent one stays ``None``."""
    return [None if t is None else with_batch(t, b, size) for t, b in zip(tensors, batched)]


# ----- into N, or among the channels -------------------------------------------------------------


def into(x: Tensor, dim: int, groups: int = 1) -> Tensor:
    """Move the batch from the front into ``dim`` (counted without it), inside ``groups``."""
    if groups == 1:
        return x.movedim(0, dim).flatten(dim, dim + 1)
    return x.unflatten(dim + 1, (groups, -1)).movedim(0, dim + 1).flatten(dim, dim + 2)


def out_of(x: Tensor, dim: int, size: int, groups: int = 1) -> Tensor:
    """Undo :func:`into`."""
    if groups == 1:
        return x.unflatten(dim, (size, -1)).movedim(dim, 0)
    return x.unflatten(dim, (groups, size, -1)).movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


def along_channels(vector: Tensor, spatial: int) -> Tensor:
    """Shape a vector over channels, or a batch, to broadcast with ``(..., N, C, *spatial)``."""
    return vector.reshape(*vector.shape[:-1], 1, -1, *[1] * spatial)


def planes(op: OpOverload | OpOverloadPacket, spatial: int) -> Formula:
    """Return the vmap rule of an op on images ``(N, C, *spatial)`` or ``(C, *spatial)``."""
    op = overload(op)
    where = tensor_args(op)

    def batch(*args: Any, batched: tuple[bool, ...], size: int) -> Any:
        full = list(args)
        images = all_batched([args[i] for i in where], batched, size)
        fold = images[0].dim() == spatial + 3
        for i, x in zip(where, images, strict=True):
            full[i] = x.flatten(0, 1) if fold else x
        out = call_op(op, full)
        if not fold:
            return out
        n = images[0].shape[1]
        apart = [
            o.reshape(size, n, *o.shape[1:]) for o in (out if isinstance(out, tuple) else (out,))
        ]
        return tuple(apart) if isinstance(out, tuple) else apart[0]

    return batch

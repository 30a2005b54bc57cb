"""Where a batch goes when an op takes images: folded into ``N``, or among the channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from aotfunc.transforms.rules.table import Formula, call_op, overload, tensor_args


def with_batch(x: Tensor, carries: bool, size: int) -> Tensor:
    """``x`` with the batch in front, repeated if it does not carry it yet.

    Really repeated: some kernels read saved statistics and indices as if they were contiguous, and
    past their end."""
    return x if carries else x.expand(size, *x.shape).contiguous()


def into(x: Tensor, dim: int, groups: int = 1) -> Tensor:
    """Move the batch from the front into dimension ``dim`` (counted without it), inside each of
    its ``groups``."""
    if groups == 1:
        return x.movedim(0, dim).flatten(dim, dim + 1)
    return x.unflatten(dim + 1, (groups, -1)).movedim(0, dim + 1).flatten(dim, dim + 2)


def out_of(x: Tensor, dim: int, size: int, groups: int = 1) -> Tensor:
    """Undo :func:`into`."""
    if groups == 1:
        return x.unflatten(dim, (size, -1)).movedim(dim, 0)
    return x.unflatten(dim, (groups, size, -1)).movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


def along_channels(vector: Tensor, spatial: int) -> Tensor:
    """A vector over the channels, or a batch of them, shaped to broadcast against ``(..., N, C,
    *spatial)``."""
    return vector.reshape(*vector.shape[:-1], 1, -1, *[1] * spatial)


def planes(op: OpOverload | OpOverloadPacket, spatial: int) -> Formula:
    """The vmap rule of an op whose tensor arguments are all images ``(N, C, *spatial)`` or ``(C,
    *spatial)``."""
    op = overload(op)
    where = tensor_args(op)

    def batch(*args: Any, batched: tuple[bool, ...], size: int) -> Any:
        full = list(args)
        images = [with_batch(args[i], b, size) for i, b in zip(where, batched, strict=True)]
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

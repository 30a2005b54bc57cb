"""Rules of ops that cut a tensor into pieces, join pieces, or surround them: split, cat, pads,
patches. All are linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batching import expand_lead, shifted
from .schema import Formula, aten, call_op, overload, overloads_named
from .table import jvp_of, linear


def by_folding(op: Any, trailing: int, tensors: int = 1) -> Formula:
    """Return the vmap rule of an op that acts on ``trailing`` dimensions of its first ``tensors``
    arguments and maps over one or two leading ones: fold the batch into those."""
    op = overload(op)

    def batch(*args: Any) -> Tensor:
        x = args[0]
        lead = x.dim() - trailing
        if lead == 2:  # one dimension and the batch: the op takes them as they are
            return call_op(op, args)
        folded = [t.flatten(0, lead - 2) for t in args[:tensors]]
        return call_op(op, [*folded, *args[tensors:]]).unflatten(0, x.shape[: lead - 1])

    return batch


# ----- cutting and joining -----------------------------------------------------------------------


def pieces_back(gs: Sequence[Tensor | None], x: Tensor, sizes: Sequence[Any], dim: int) -> Tensor:
    """Return the cotangent of ``x`` from those of its pieces along ``dim``."""
    there = [i for i, g in enumerate(gs) if g is not None]
    if len(there) == 1:
        start = sum(sizes[: there[0]])
        return aten.slice_backward(gs[there[0]], x.shape, dim, start, start + sizes[there[0]], 1)
    shapes = [[*x.shape[: dim % x.dim()], s, *x.shape[dim % x.dim() + 1 :]] for s in sizes]
    like: Any = gs[there[0]]
    return torch.cat(
        [like.new_zeros(s) if g is None else g for g, s in zip(gs, shapes, strict=True)], dim
    )


def split_back(gs: Sequence[Tensor | None], x: Tensor, size: Any, dim: int) -> Tensor:
    length, count = x.shape[dim], len(gs)
    return pieces_back(gs, x, [size] * (count - 1) + [length - size * (count - 1)], dim)


def unbind_back(gs: Sequence[Tensor | None], x: Tensor, dim: int) -> Tensor:
    there = [i for i, g in enumerate(gs) if g is not None]
    if len(there) == 1:
        return aten.select_backward(gs[there[0]], x.shape, dim, there[0])
    zero = torch.zeros_like(gs[there[0]])
    return torch.stack([zero if g is None else g for g in gs], dim)


for op in overloads_named("split.Tensor", "unsafe_split.Tensor", "split_copy.Tensor"):
    linear(op, split_back, batch=shifted(op, "dim"))
for op in overloads_named("split_with_sizes", "unsafe_split_with_sizes", "split_with_sizes_copy"):
    linear(op, pieces_back, batch=shifted(op, "dim"))
for op in overloads_named("unbind.int", "unbind_copy.int"):
    linear(op, unbind_back, batch=shifted(op, "dim"))


def skipped(x: Tensor, rank: int) -> bool:
    """Return whether ``cat`` ignores ``x``: an empty vector joins tensors of any rank."""
    return x.dim() == 1 and rank != 1 and x.shape[0] == 0


def cat_back(g: Tensor, tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    sizes = [0 if skipped(x, g.dim()) else x.shape[dim] for x in tensors]
    parts = aten.split_with_sizes(g, sizes, dim)
    return [
        torch.zeros_like(x) if skipped(x, g.dim()) else part
        for x, part in zip(tensors, parts, strict=True)
    ]


def batch_cat(tensors: Sequence[Tensor], dim: int, *, batched: Any, size: Any) -> Tensor:
    tensors = [expand_lead(x, b, size) for x, b in zip(tensors, batched[0], strict=True)]
    rank = max(x.dim() for x in tensors) - 1
    tensors = [x for x in tensors if rank == 1 or x.dim() != 2 or x.shape[1] != 0]
    return torch.cat(tensors, dim % rank + 1)


def batch_stack(tensors: Sequence[Tensor], dim: int, *, batched: Any, size: Any) -> Tensor:
    tensors = [expand_lead(x, b, size) for x, b in zip(tensors, batched[0], strict=True)]
    return torch.stack(tensors, dim % tensors[0].dim() + 1)


linear(aten.cat, cat_back, batch=batch_cat)
linear(aten.stack, lambda g, tensors, dim: list(g.unbind(dim)), batch=batch_stack)


def corners(tensors: Sequence[Tensor]) -> list[tuple[Any, Any, Any, Any]]:
    """List the first row and column, the height and the width of each block of ``block_diag``."""
    found, row, column = [], 0, 0
    for x in tensors:
        height, width = (1, 1) if x.dim() == 0 else (1, x.shape[0]) if x.dim() == 1 else x.shape
        found.append((row, column, height, width))
        row, column = row + height, column + width
    return found


def block_diag_back(g: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    where = zip(tensors, corners(tensors), strict=True)
    return [g[r : r + h, c : c + w].reshape(x.shape) for x, (r, c, h, w) in where]


def batch_block_diag(tensors: Sequence[Tensor], *, batched: Any, size: Any) -> Tensor:
    tensors = [expand_lead(x, b, size) for x, b in zip(tensors, batched[0], strict=True)]
    where = corners([x[0] for x in tensors])
    width = sum(w for *_, w in where)
    blocks = [x.reshape(size, h, w) for x, (_, _, h, w) in zip(tensors, where, strict=True)]
    return torch.cat(
        [
            torch.nn.functional.pad(x, (c, width - c - w))
            for x, (_, c, _, w) in zip(blocks, where, strict=True)
        ],
        1,
    )


linear(aten.block_diag, block_diag_back, batch=batch_block_diag)

# ----- pads and patches --------------------------------------------------------------------------

linear(
    aten.constant_pad_nd,
    lambda g, x, pad, value: aten.constant_pad_nd(g, [-p for p in pad], 0),
    batch=lambda x, pad, value: aten.constant_pad_nd(x, pad, value),
)


@jvp_of(aten.constant_pad_nd)
def _(tangents: Any, out: Tensor, x: Tensor, pad: Any, value: Any) -> Tensor:
    return aten.constant_pad_nd(tangents[0], pad, 0)


def pad_lines(kind: str, rank: int) -> None:
    """State the rules of reflection and replication pads of ``rank`` dimensions; the backward
    reads only the shape of its ``self``."""
    forward = getattr(aten, f"{kind}_pad{rank}d")
    backward = getattr(aten, f"{kind}_pad{rank}d_backward")
    linear(forward, lambda g, x, pad: backward(g, x, pad), batch=by_folding(forward, rank))
    linear(
        backward, lambda g, y, x, pad: forward(g, pad), None, batch=by_folding(backward, rank, 2)
    )


for kind in ("reflection", "replication"):
    for rank in (1, 2, 3):
        pad_lines(kind, rank)


def batch_patches(op: Any, rank: int) -> Formula:
    """Return the vmap rule of ``im2col`` or ``col2im``: fold the batch into theirs, if they have
    one (with ``rank`` dimensions they do not)."""

    def batch(x: Tensor, *rest: Any) -> Tensor:
        return (
            op(x, *rest)
            if x.dim() == rank + 1
            else op(x.flatten(0, 1), *rest).unflatten(0, x.shape[:2])
        )

    return batch


linear(
    aten.im2col,
    lambda g, x, *how: aten.col2im(g, x.shape[-2:], *how),
    batch=batch_patches(aten.im2col, 3),
)
linear(
    aten.col2im, lambda g, x, size, *how: aten.im2col(g, *how), batch=batch_patches(aten.col2im, 2)
)

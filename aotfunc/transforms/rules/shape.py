"""Rules of ops that give a tensor another shape or order and keep all its elements. All are
linear, each with its transpose.

A view and its functional ``*_copy`` twin share a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .batching import align, past_batch, shifted
from .schema import aten, overloads_named
from .table import jvp_of, linear, nondiff, vmap_of

# ----- the same elements under another shape -----------------------------------------------------


def known_size(size: Sequence[Any], numel: Any) -> list[Any]:
    """Return ``size`` with its -1 replaced."""
    rest = prod(s for s in size if not (isinstance(s, int) and s == -1))
    return [numel // rest if isinstance(s, int) and s == -1 else s for s in size]


def batch_reshape(x: Tensor, size: Sequence[Any]) -> Tensor:
    return x.reshape(x.shape[0], *known_size(size, prod(x.shape[1:])))


for op in overloads_named(
    "view", "_unsafe_view", "_reshape_alias", "_reshape_alias_copy", "view_copy", "_reshape_copy"
):
    linear(op, lambda g, x: g.reshape(x.shape), batch=batch_reshape)
    # a tangent need not have its primal's strides
    jvp_of(op)(lambda tangents, out, *_: tangents[0].reshape(out.shape))

for op in overloads_named("alias", "alias_copy", "lift", "lift_fresh", "lift_fresh_copy"):
    linear(op, lambda g, x: g, batch=op)

nondiff(*overloads_named("view.dtype", "view_copy.dtype"), batch=lambda op: op)


def batch_squeeze(x: Tensor, dim: Any = None) -> Tensor:
    rank = x.dim() - 1
    if dim is None:
        dim = range(rank)
    dims = {d % max(rank, 1) + 1 for d in (dim if isinstance(dim, Sequence) else [dim])}
    return x.reshape([s for d, s in enumerate(x.shape) if d not in dims or s != 1])


def squeeze_dim_back(g: Tensor, x: Tensor, dim: int) -> Tensor:
    return g.unsqueeze(dim) if x.dim() > g.dim() else g


for op in overloads_named("squeeze", "squeeze_copy", "squeeze.dims", "squeeze_copy.dims"):
    linear(op, lambda g, x: g.reshape(x.shape), batch=batch_squeeze)
for op in overloads_named("squeeze.dim", "squeeze_copy.dim"):
    linear(op, squeeze_dim_back, batch=batch_squeeze)
for op in overloads_named("unsqueeze", "unsqueeze_copy"):
    linear(
        op, lambda g, x, dim: g.squeeze(dim), batch=lambda x, dim: x.unsqueeze(dim % x.dim() + 1)
    )


def batch_expand(x: Tensor, size: Sequence[Any]) -> Tensor:
    return align(x, len(size)).expand(-1, *size)


for op in overloads_named(
    "expand", "expand_copy"
):  # the walker sums the cotangent back to the shape of x
    linear(op, lambda g, x: g, batch=batch_expand)


def repeat_back(g: Tensor, x: Tensor, repeats: Sequence[Any]) -> Tensor:
    new = len(repeats) - x.dim()
    shape: list[Any] = []
    summed: list[int] = []
    for d, r in enumerate(repeats):
        if d < new or not (isinstance(r, int) and r == 1):
            summed.append(len(shape))
            shape.append(r)
        if d >= new:
            shape.append(x.shape[d - new])
    return g.reshape(shape).sum(summed) if summed else g


def batch_repeat(x: Tensor, repeats: Sequence[Any]) -> Tensor:
    return align(x, len(repeats)).repeat(1, *repeats)


linear(aten.repeat, repeat_back, batch=batch_repeat)

# ----- another order of dimensions or elements ---------------------------------------------------


def permute_back(g: Tensor, x: Tensor, dims: Sequence[int]) -> Tensor:
    inverse = [0] * len(dims)
    for to, d in enumerate(dims):
        inverse[d] = to
    return g.permute(inverse)


def batch_permute(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.permute(0, *(d % (x.dim() - 1) + 1 for d in dims))


for op in overloads_named("permute", "permute_copy"):
    linear(op, permute_back, batch=batch_permute)
for op in overloads_named("transpose.int", "transpose_copy.int"):
    linear(op, lambda g, x, a, b: g.transpose(a, b), batch=shifted(op, "dim0", "dim1"))
for op in overloads_named("t", "t_copy"):
    linear(op, lambda g, x: g.t(), batch=lambda x: x.transpose(1, 2) if x.dim() == 3 else x)


def batch_flip(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.flip([d % (x.dim() - 1) + 1 for d in dims]) if x.dim() > 1 else x


def batch_roll(x: Tensor, shifts: Sequence[Any], dims: Sequence[int]) -> Tensor:
    if x.dim() == 1:
        return x
    if not dims:  # rolls the flattened tensor
        return x.flatten(1).roll(shifts, 1).reshape(x.shape)
    return x.roll(shifts, past_batch(dims, x.dim() - 1))


linear(aten.flip, lambda g, x, dims: g.flip(dims), batch=batch_flip)
linear(aten.roll, lambda g, x, shifts, dims: g.roll([-s for s in shifts], dims), batch=batch_roll)
linear(aten.rot90, lambda g, x, k, dims: g.rot90(-k, dims), batch=shifted(aten.rot90, "dims"))
linear(
    aten.pixel_shuffle,
    lambda g, x, r: torch.pixel_unshuffle(g, r),
    batch=aten.pixel_shuffle.default,
)
linear(
    aten.pixel_unshuffle,
    lambda g, x, r: torch.pixel_shuffle(g, r),
    batch=aten.pixel_unshuffle.default,
)
for op in overloads_named("channel_shuffle", "native_channel_shuffle"):
    linear(
        op,
        lambda g, x, groups: torch.channel_shuffle(g, x.shape[1] // groups),
        batch=lambda x, groups: torch.channel_shuffle(x.flatten(0, 1), groups).reshape(x.shape),
    )

# ----- complex numbers as pairs ------------------------------------------------------------------

for op in overloads_named("view_as_real", "view_as_real_copy"):
    linear(op, lambda g, x: torch.view_as_complex(g.contiguous()), batch=op)
for op in overloads_named("view_as_complex", "view_as_complex_copy"):
    linear(op, lambda g, x: torch.view_as_real(g.resolve_conj()), batch=op)

# ----- counts ------------------------------------------------------------------------------------

nondiff(aten.repeat_interleave.Tensor)


@vmap_of(aten.repeat_interleave.Tensor)
def _(repeats: Tensor, output_size: Any, *, shape: Any) -> Tensor:
    fits = (repeats >= 0).all().logical_and((repeats.sum(1) == shape[0]).all())
    aten._assert_async.msg(fits, f"repeat_interleave: the repeats must add up to {shape[0]}")
    places = (
        torch.arange(shape[0], device=repeats.device)
        .expand(repeats.shape[0], shape[0])
        .contiguous()
    )
    return torch.searchsorted(repeats.cumsum(1), places, right=True).to(repeats.dtype)

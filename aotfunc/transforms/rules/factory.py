"""Rules of making a tensor from numbers, or like another tensor: no derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from .batching import align
from .pointwise import copying
from .schema import aten, call_op, tensor_args
from .table import jvp_of, nondiff, vjp_of, vmap_of

# Made from numbers alone: there is nothing to differentiate or to batch.
for packet in (
    *(aten.zeros, aten.ones, aten.full, aten.empty, aten.empty_strided, aten.empty_permuted),
    *(aten.scalar_tensor, aten.arange, aten.range, aten.linspace, aten.logspace, aten.eye),
    *(aten.tril_indices, aten.triu_indices, aten.bartlett_window, aten.blackman_window),
    *(aten.hamming_window, aten.hann_window, aten.kaiser_window),
    aten._efficientzerotensor,
):
    for name in packet.overloads():
        op = getattr(packet, name)
        if "out" not in name and "names" not in name and not tensor_args(op):
            nondiff(op)

nondiff(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, batch=copying)


def per_sample_size(op: OpOverload) -> Callable[..., Tensor]:
    """Return the vmap rule of ``x.new_zeros(size)`` and its like: make one for each sample."""

    def batch(x: Tensor, shape: Any, *rest: Any) -> Tensor:
        return call_op(op, [x, [x.shape[0], *shape], *rest])

    return batch


def new_restrided(op: OpOverload) -> Callable[..., Tensor]:
    """Return the vmap rule of ``x.new_empty_strided``: samples follow each other."""

    def batch(x: Tensor, shape: Any, strides: Any, *rest: Any) -> Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        return call_op(op, [x, [x.shape[0], *shape], [extent, *strides], *rest])

    return batch


nondiff(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, batch=per_sample_size)
nondiff(aten.new_empty_strided, batch=new_restrided)


# ----- overwriting: the old value is lost, the new one goes through ------------------------------

nondiff(aten.zero, batch=lambda op: lambda x: op(x), zero=True)
nondiff(aten.fill.Scalar, batch=lambda op: lambda x, value: op(x, value), zero=True)


@vjp_of(aten.fill.Tensor)
def _(g: Tensor, out: Tensor, x: Tensor, value: Tensor) -> list[Tensor | None]:
    return [None, g]  # summed to the value's shape by the walker


@jvp_of(aten.fill.Tensor)
def _(tangents: tuple[Tensor | None, Tensor | None], out: Tensor) -> Tensor | None:
    return None if tangents[1] is None else tangents[1].expand(out.shape)


@vjp_of(aten.copy)
def _(g: Tensor, out: Tensor, x: Tensor, src: Tensor) -> list[Tensor | None]:
    return [None, g.to(src.device)]


@jvp_of(aten.copy)
def _(
    tangents: tuple[Tensor | None, Tensor | None], out: Tensor, x: Tensor, src: Tensor
) -> Tensor | None:
    return None if tangents[1] is None else aten.copy(x, tangents[1])


@vmap_of(aten.fill.Tensor, aten.copy)
def _(x: Tensor, src: Tensor, *, batched: tuple[bool, bool], size: int) -> Tensor:
    if not batched[0]:
        x = x.expand(size, *x.shape)
    if batched[1]:
        src = align(src, x.dim() - 1)
    return aten.copy(x, src)

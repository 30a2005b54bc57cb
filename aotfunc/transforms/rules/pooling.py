"""Rules of pooling: windows of maxima, of fractional maxima and of averages."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverloadPacket

from .batching import planes
from .schema import Formula, aten, overload
from .table import jvp_of, linear, vjp_of, vmap_of


def pick(x: Tensor, indices: Tensor, spatial: int) -> Tensor:
    """Take from each plane of ``x`` the values at ``indices`` into the flattened plane."""
    return x.flatten(-spatial).gather(-1, indices.flatten(-spatial)).reshape(indices.shape)


def max_pooling(
    op: OpOverloadPacket, backward: OpOverloadPacket, spatial: int, batch: Formula | None = None
) -> None:
    """Register a pooling ``(x, ...) -> (values, indices)`` and its backward op, which takes the
    indices last. ``batch`` is the pooling's vmap rule, if not all of its tensors are images."""
    vmap_of(op)(batch or planes(op, spatial))
    geometry = len(overload(backward)._schema.arguments) - 3  # the shapes tell it

    @vjp_of(op, diff_outputs=(0,))
    def _(g, out, x, *rest):
        return [backward(g[0], x, *rest[:geometry], out[1])]

    @jvp_of(op)
    def _(tangents, out, x):
        return pick(tangents[0], out[1], spatial), None

    linear(
        backward,
        lambda g, go, x, *rest: pick(g, rest[-1], spatial),
        None,
        None,
        batch=planes(backward, spatial),
    )


def drawn_pooling(op: OpOverloadPacket, spatial: int) -> Formula:
    """Return the vmap rule of a fractional pooling, whose last argument was drawn."""

    def batch(x: Tensor, kernel: Any, shape: Any, draws: Tensor) -> tuple[Tensor, Tensor]:
        size, images = x.shape[0], x.dim() == spatial + 3
        out = op(x.flatten(0, 1) if images else x, kernel, shape, draws.flatten(0, 1))
        values, indices = (o.unflatten(0, (size, -1)) if images else o for o in out)
        return values, indices

    return batch


max_pooling(aten.max_pool2d_with_indices, aten.max_pool2d_with_indices_backward, 2)
max_pooling(aten.max_pool3d_with_indices, aten.max_pool3d_with_indices_backward, 3)
max_pooling(aten.adaptive_max_pool2d, aten.adaptive_max_pool2d_backward, 2)
max_pooling(aten.adaptive_max_pool3d, aten.adaptive_max_pool3d_backward, 3)
for op, backward, d in (
    (aten.fractional_max_pool2d, aten.fractional_max_pool2d_backward, 2),
    (aten.fractional_max_pool3d, aten.fractional_max_pool3d_backward, 3),
):
    max_pooling(op, backward, d, drawn_pooling(op, d))


def max_unpooling(op: OpOverloadPacket, spatial: int) -> None:
    linear(op, lambda g, x, indices: pick(g, indices, spatial), None, batch=planes(op, spatial))


max_unpooling(aten.max_unpool2d, 2)
max_unpooling(aten.max_unpool3d, 3)


def average_pooling(op: OpOverloadPacket, backward: OpOverloadPacket, spatial: int) -> None:
    """Register an average pooling and its backward, which takes the cotangent first."""
    linear(op, lambda g, x, *geometry: backward(g, x, *geometry), batch=planes(op, spatial))
    linear(
        backward,
        lambda g, go, x, *geometry: op(g, *geometry),
        None,
        batch=planes(backward, spatial),
    )


average_pooling(aten.avg_pool2d, aten.avg_pool2d_backward, 2)
average_pooling(aten.avg_pool3d, aten.avg_pool3d_backward, 3)


def adaptive_average_pooling(
    op: OpOverloadPacket, backward: OpOverloadPacket, spatial: int
) -> None:
    """Register as :func:`average_pooling` does; the cotangent tells the output's size."""
    linear(op, lambda g, x: backward(g, x), batch=planes(op, spatial))
    linear(
        backward,
        lambda g, go, x: op(g, go.shape[-spatial:]),
        None,
        batch=planes(backward, spatial),
    )


adaptive_average_pooling(aten._adaptive_avg_pool2d, aten._adaptive_avg_pool2d_backward, 2)
adaptive_average_pooling(aten._adaptive_avg_pool3d, aten._adaptive_avg_pool3d_backward, 3)

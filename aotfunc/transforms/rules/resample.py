"""Rules of the ops that read an image at other places: resizing, sampling at a grid of points."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverloadPacket

from .batching import all_batched
from .schema import aten
from .table import linear, vjp_of, vmap_of

# ----- resizing ----------------------------------------------------------------------------------


def register_resizing(op: OpOverloadPacket, backward: OpOverloadPacket) -> None:
    """Register an interpolation ``(x, size, *how)`` and its ``(g, size, input_size, *how)``."""

    def batch_backward(
        g: Tensor, output_size: Any, input_size: Any, *how: Any, size: int
    ) -> Tensor:
        n, *others = input_size
        return backward(g.flatten(0, 1), output_size, [n * size, *others], *how).unflatten(
            0, (size, -1)
        )

    def batch(x: Tensor, *args: Any, size: int) -> Tensor:
        return op(x.flatten(0, 1), *args).unflatten(0, (size, -1))

    linear(op, lambda g, x, size, *how: backward(g, size, list(x.shape), *how), batch=batch)
    linear(backward, lambda a, g, size, input_size, *how: op(a, size, *how), batch=batch_backward)


for name in (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa"),
):
    if hasattr(aten, name):  # the last is new in PyTorch 2.13
        register_resizing(getattr(aten, name), getattr(aten, name + "_backward"))


# ----- sampling at a grid of points --------------------------------------------------------------


def sampling(op: OpOverloadPacket, backward: OpOverloadPacket) -> None:
    """Register a sampler ``(x, grid, *how)`` and its backward, with an output mask."""

    @vjp_of(op)
    def _(g, out, x, grid, *how, needs):
        return backward(g, x, grid, *how, [bool(n) for n in needs])

    @vmap_of(op)
    def _(x, grid, *how, batched, size):
        x, grid = (t.flatten(0, 1) for t in all_batched((x, grid), batched, size))
        return op(x, grid, *how).unflatten(0, (size, -1))

    @vmap_of(backward)
    def _(g, x, grid, *how, batched, size):
        flat = (t.flatten(0, 1) for t in all_batched((g, x, grid), batched, size))
        of_x, of_grid = backward(*flat, *how)
        return None if of_x is None else of_x.unflatten(0, (size, -1)), of_grid.unflatten(
            0, (size, -1)
        )


sampling(aten.grid_sampler_2d, aten.grid_sampler_2d_backward)
sampling(aten.grid_sampler_3d, aten.grid_sampler_3d_backward)

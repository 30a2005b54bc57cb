"""Batch fake quantisation (rounding to the values of an integer type): per tensor it is
elementwise; if scales differ between samples each sample is a channel.
"""

from __future__ import annotations

from typing import Any

import torch

from .batching import all_batched, elementwise
from .schema import aten
from .table import vmap_of

per_tensor = aten.fake_quantize_per_tensor_affine_cachemask.default
vmap_of(per_tensor)(elementwise(per_tensor))


@vmap_of(aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams)
def _(x, scale, zero, enabled, low, high, *, batched, size):
    op = aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
    if not any(batched[1:]):
        return op(x, scale, zero, enabled, low, high)
    tensors = all_batched((x, scale, zero, enabled), batched, size)
    x, scale, zero, enabled = (t.contiguous() for t in tensors)
    rows = x.reshape(size, -1)
    how = (scale.reshape(size), zero.reshape(size).to(torch.int32), 0, low, high)
    out, mask = aten.fake_quantize_per_channel_affine_cachemask(rows, *how)
    on = enabled.reshape(size, 1) == 1
    return torch.where(on, out, rows).reshape(x.shape), (mask | ~on).reshape(x.shape)


@vmap_of(aten.fake_quantize_per_channel_affine_cachemask)
def _(x, scale, zero, axis, low, high, *, batched, size) -> Any:
    op = aten.fake_quantize_per_channel_affine_cachemask
    axis %= x.dim() - batched[0]
    if not any(batched[1:]):
        return op(x, scale, zero, axis + 1, low, high)
    x, scale, zero = all_batched((x, scale, zero), batched, size)
    first = x.movedim(axis + 1, 1)
    out = op(first.flatten(0, 1).contiguous(), scale.flatten(), zero.flatten(), 0, low, high)
    return tuple(o.reshape(first.shape).movedim(1, axis + 1) for o in out)

"""Shape rules of convolutions and pooling. See :mod:`.rules`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .algebra import same_dtype
from .rules import new, shape_rule, sure, sure_in_order
from .sig import Sig

aten = torch.ops.aten


def per_dim(values: Sequence[int], n: int) -> list[int]:
    """Return one value per spatial dimension."""
    sure(len(values) in (1, n))
    return list(values) * (n if len(values) == 1 else 1)


@shape_rule(aten.convolution)
def _convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
    n = x.ndim - 2
    sure_in_order(x, w)  # other layouts: the device's kernel decides
    same_dtype(x, w, *([] if bias is None else [bias]))
    sure(
        n in (1, 2, 3)
        and w.ndim == x.ndim
        and groups > 0
        and 0 not in x.shape
        and 0 not in w.shape
    )
    steps, pads, gaps, extra = (per_dim(v, n) for v in (stride, padding, dilation, output_padding))
    sure(min(steps) > 0 and min(pads) >= 0 and min(gaps) > 0 and min(extra) >= 0)
    reach = [d * (k - 1) for d, k in zip(gaps, w.shape[2:], strict=True)]
    if transposed:
        channels = w.shape[1] * groups
        sure(x.shape[1] == w.shape[0] and w.shape[0] % groups == 0)
        sizes = [
            (i - 1) * s - 2 * p + r + o + 1
            for i, s, p, r, o in zip(x.shape[2:], steps, pads, reach, extra, strict=True)
        ]
    else:
        channels = w.shape[0]
        sure(x.shape[1] == w.shape[1] * groups and channels % groups == 0)
        sizes = [
            (i + 2 * p - r - 1) // s + 1
            for i, s, p, r in zip(x.shape[2:], steps, pads, reach, strict=True)
        ]
    sure(min(sizes) > 0 and (bias is None or bias.shape == (channels,)))
    return new(x, (x.shape[0], channels, *sizes))


@shape_rule(aten.convolution_backward)
def _convolution_backward(
    g, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask
):
    out = _convolution(x, w, None, stride, padding, dilation, transposed, output_padding, groups)
    sure(g.shape == out.shape and g.dtype is x.dtype and len(mask) == 3)
    return (
        new(x, x.shape) if mask[0] else None,
        new(w, w.shape) if mask[1] else None,
        new(g, bias_sizes) if mask[2] else None,
    )


def pooled_shape(
    x: Sig,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> tuple:
    """Return the shape after a two-dimensional pooling."""
    sure(x.ndim in (3, 4) and 0 not in x.shape)
    sure_in_order(x)
    sizes = []
    ks, ps, ds = (per_dim(v, 2) for v in (kernel, padding, dilation))
    for i, k, s, p, d in zip(
        x.shape[-2:], ks, per_dim(stride, 2) if stride else ks, ps, ds, strict=True
    ):
        sure(k > 0 and s > 0 and d > 0 and 0 <= p <= k // 2)
        room = i + 2 * p - d * (k - 1) - 1
        n = (-(-room // s) if ceil else room // s) + 1
        # the last window starts inside the input or its left padding
        n -= ceil and (n - 1) * s >= i + p
        sure(n > 0)
        sizes.append(n)
    return (*x.shape[:-2], *sizes)


@shape_rule(aten.max_pool2d_with_indices)
def _max_pool2d(x, kernel, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    shape = pooled_shape(x, kernel, stride, padding, dilation, ceil_mode)
    return new(x, shape), new(x, shape, torch.int64)


@shape_rule(aten.max_pool2d_with_indices_backward)
def _max_pool2d_backward(g, x, kernel, stride, padding, dilation, ceil_mode, indices):
    shape = pooled_shape(x, kernel, stride, padding, dilation, ceil_mode)
    sure(g.shape == indices.shape == shape and g.dtype is x.dtype)
    return new(x, x.shape)


@shape_rule(aten.avg_pool2d)
def _avg_pool2d(
    x, kernel, stride=(), padding=(0,), ceil_mode=False, count_include_pad=True, divisor=None
):
    sure(divisor != 0 and x.dtype.is_floating_point)
    return new(x, pooled_shape(x, kernel, stride, padding, (1,), ceil_mode))


@shape_rule(aten.avg_pool2d_backward)
def _avg_pool2d_backward(g, x, kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    sure(
        g.shape == pooled_shape(x, kernel, stride, padding, (1,), ceil_mode) and g.dtype is x.dtype
    )
    sure(x.dtype.is_floating_point and divisor != 0)
    return new(x, x.shape)


@shape_rule(aten._adaptive_avg_pool2d)
def _adaptive_avg_pool2d(x, size):
    sure(x.ndim in (3, 4) and len(size) == 2 and 0 not in x.shape and 0 not in size)
    sure_in_order(x)
    return new(x, (*x.shape[:-2], *size))


@shape_rule(aten._adaptive_avg_pool2d_backward)
def _adaptive_avg_pool2d_backward(g, x):
    sure(
        g.ndim == x.ndim
        and g.ndim in (3, 4)
        and g.dtype is x.dtype
        and g.shape[:-2] == x.shape[:-2]
        and 0 not in g.shape
    )
    sure_in_order(g, x)
    return new(x, x.shape)

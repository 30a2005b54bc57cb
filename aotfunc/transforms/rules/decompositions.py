"""Ops that are other names for ops of aten: each is transformed as its decomposition.

Kernels for one device or precision (``slow_conv2d``, ``_int_mm``), derivatives that PyTorch has as
ops of their own (``glu_jvp``), and the functional twins of views. Where a rule or PyTorch's own
formula exists, that comes first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .batching import elementwise, shifted
from .schema import aten, overloads_named
from .table import decompose_as, linear, nondiff, vmap_of

# ----- convolutions ------------------------------------------------------------------------------


def convolution(
    x, w, bias, stride, padding, dilation=None, transposed=False, output_padding=None
) -> Tensor:
    """Return the convolution of images ``(N, C, ...)``, or of one without ``N``."""
    spatial = w.dim() - 2
    single = x.dim() == spatial + 1
    ones, zeros = [1] * spatial, [0] * spatial
    how = (stride, padding, dilation or ones, transposed, output_padding or zeros, 1)
    out = aten.convolution(x.unsqueeze(0) if single else x, w, bias, *how)
    return out.squeeze(0) if single else out


def dilated(x, w, kernel_size, bias=None, stride=(1,), padding=(0,), dilation=(1,)):
    return convolution(x, w, bias, stride, padding, dilation)


def conv_transposed(
    x, w, kernel_size, bias=None, stride=(1,), padding=(0,), output_padding=(0,), dilation=(1,)
):
    return convolution(x, w, bias, stride, padding, dilation, True, output_padding)


def slow_conv(x, w, kernel_size, bias, stride, padding):
    return convolution(x, w, bias, stride, padding)


def slow_conv_backward(g, x, w, kernel_size, stride, padding, output_mask):
    spatial = w.dim() - 2
    how = (stride, padding, [1] * spatial, False, [0] * spatial, 1)
    return aten.convolution_backward(g, x, w, [w.shape[0]], *how, output_mask)


def over_time(x: Tensor, w: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """Convolve as ``conv_tbc``: ``(time, batch, channels)`` by ``(time, in, out)``."""
    return convolution(x.permute(1, 2, 0), w.permute(2, 1, 0), bias, [1], [pad]).permute(2, 0, 1)


decompose_as(aten.slow_conv_dilated2d, dilated)
decompose_as(aten.slow_conv_dilated3d, dilated)
decompose_as(aten.slow_conv_transpose2d, conv_transposed)
decompose_as(aten.slow_conv_transpose3d, conv_transposed)
decompose_as(aten._slow_conv2d_forward, slow_conv)
decompose_as(aten._slow_conv2d_backward.output_mask, slow_conv_backward)
decompose_as(aten.slow_conv3d_forward, slow_conv)
decompose_as(aten.conv_tbc, over_time)


# ----- products ----------------------------------------------------------------------------------

decompose_as(aten._int_mm, lambda x, y: x.to(torch.int32) @ y.to(torch.int32))
decompose_as(
    aten._compute_linear_combination, lambda x, weights: torch.tensordot(weights, x, dims=1)
)


def weight_norm_backward(
    g: Tensor, v: Tensor, scale: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Differentiate ``w = scale * v / norms``, norms over all dimensions but ``dim``."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    of_scale = (g * v).sum(others, keepdim=True) / norms
    return scale / norms * (g - v * of_scale / norms), of_scale


decompose_as(aten._weight_norm_interface_backward, weight_norm_backward)
decompose_as(aten._linalg_eigvals, lambda a: aten.linalg_eig(a)[0])


# ----- gated linear units ------------------------------------------------------------------------


def glu_tangent(out: Tensor, x: Tensor, dx: Tensor, dim: int) -> Tensor:
    da, db = dx.chunk(2, dim)
    s = torch.sigmoid(x.chunk(2, dim)[1])
    return da * s + out * (1 - s) * db


def glu_backward_tangent(
    gx: Tensor, g: Tensor, x: Tensor, dg: Tensor, dx: Tensor, dim: int
) -> Tensor:
    (a, b), (da, db) = x.chunk(2, dim), dx.chunk(2, dim)
    s = torch.sigmoid(b)
    slope = s * (1 - s)
    of_a = dg * s + g * slope * db
    of_b = slope * (dg * a + g * da + g * a * (1 - 2 * s) * db)
    return torch.cat([of_a, of_b], dim)


decompose_as(aten.glu_jvp, glu_tangent)
decompose_as(aten.glu_backward_jvp, glu_backward_tangent)


# ----- elements and views ------------------------------------------------------------------------

decompose_as(aten._add_relu.Tensor, lambda x, y, alpha=1: torch.relu(torch.add(x, y, alpha=alpha)))
decompose_as(aten._add_relu.Scalar, lambda x, y, alpha=1: torch.relu(torch.add(x, y, alpha=alpha)))
decompose_as(aten._aminmax, lambda x: tuple(aten.aminmax(x)))
decompose_as(
    aten._aminmax.dim,
    lambda x, dim, keepdim=False: tuple(aten.aminmax(x, dim=dim, keepdim=keepdim)),
)
# PyTorch's decompositions of Fourier transforms use prims
for name in ("conj_physical", "conj"):
    if hasattr(torch.ops.prims, name):
        op = getattr(torch.ops.prims, name).default
        linear(op, lambda g, x: g.conj(), batch=elementwise(op))


for op in overloads_named("_conj_copy"):
    linear(op, lambda g, x: g.conj(), batch=elementwise(op))
for op in overloads_named("_neg_view_copy"):
    linear(op, lambda g, x: -g, batch=elementwise(op))
# pairs of elements, whatever the shape
vmap_of(aten._dirichlet_grad)(aten._dirichlet_grad.default)
nondiff(*overloads_named("detach_copy"), batch=lambda op: op)
nondiff(*overloads_named("hash_tensor"), batch=lambda op: shifted(op, "dim"))


def power_sum(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    return (x if dtype is None else x.to(dtype)).abs().pow(ord).sum(dim, keepdim)


for op in overloads_named("linalg__powsum"):
    vmap_of(op)(shifted(op, "dim"))
    decompose_as(op, power_sum)


decompose_as(aten._stack, lambda tensors, dim=0: torch.stack(tensors, dim))


@vmap_of(aten._functional_assert_async.msg)
def _(x: Tensor, message: str, token: Tensor) -> Tensor:
    return aten._functional_assert_async.msg(x.all(), message, token)


# ----- numbers from tensors ----------------------------------------------------------------------


def numbers_between(start: Any, end: Any, steps: int, dtype: torch.dtype | None) -> Tensor:
    """Return ``linspace`` along a new last dimension, from both ends as the kernel does it."""
    some = start if isinstance(start, Tensor) else end
    if dtype is None:
        is_complex = any(
            x.is_complex() if isinstance(x, Tensor) else isinstance(x, complex)
            for x in (start, end)
        )
        dtype = torch.get_default_dtype().to_complex() if is_complex else torch.get_default_dtype()
    start, end = (x.to(dtype).unsqueeze(-1) if isinstance(x, Tensor) else x for x in (start, end))
    i = torch.arange(steps, device=some.device)
    step = (end - start) / max(steps - 1, 1)
    if steps < 2:  # one element, the start, or none
        return (start + step * i).to(dtype)
    return torch.where(i < steps // 2, start + step * i, end - step * (steps - 1 - i)).to(dtype)


def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None, **_: Any) -> Tensor:
    return numbers_between(start, end, steps, dtype)


def logspace(
    start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: Any = None, **_: Any
) -> Tensor:
    return torch.pow(base, numbers_between(start, end, steps, dtype))


for which in ("Tensor_Tensor", "Tensor_Scalar", "Scalar_Tensor"):
    for packet, body in ((aten.linspace, linspace), (aten.logspace, logspace)):
        decompose_as(getattr(packet, which), body)
    vmap_of(getattr(aten.linspace, which))(
        lambda start, end, steps, dtype: numbers_between(start, end, steps, dtype)
    )
    vmap_of(getattr(aten.logspace, which))(
        lambda start, end, steps, base, dtype: torch.pow(
            base, numbers_between(start, end, steps, dtype)
        )
    )


# ----- softmax of what a mask leaves -------------------------------------------------------------

KEYS = (
    1  # value of the argument `mask_type`: a mask (N, T) of the keys; others broadcast as they are
)


def masked_softmax(x: Tensor, mask: Tensor, dim: Any = None, mask_type: Any = None) -> Tensor:
    if mask_type == KEYS:
        mask = mask.reshape(mask.shape[0], *[1] * (x.dim() - 2), mask.shape[-1])
    return x.masked_fill(mask, -math.inf).softmax(-1 if dim is None else dim)


def masked_softmax_backward(g: Tensor, out: Tensor, mask: Tensor, dim: Any = None) -> Tensor:
    return aten._softmax_backward_data(g, out, -1 if dim is None else dim, out.dtype).masked_fill(
        mask, 0
    )


decompose_as(aten._masked_softmax, masked_softmax)
decompose_as(aten._masked_softmax_backward, masked_softmax_backward)

"""Open ops up into reductions and pointwise ops before kernels are formed.

A body that answers NotImplemented leaves its op as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir import ROUNDED, wide
from . import elements, extremes, losses, moved, norms, pooling, reduced, resized, softmax

aten = torch.ops.aten


def outer_product(x: Tensor, y: Tensor) -> Any:
    """Multiply matrices if the product sums nothing."""
    if x.shape[-1] != 1 or x.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    return (x * y).contiguous()


#: most multiplications that are no slower in a kernel of products, after which another adds the
#: bias and more, than in one call
FEW_PRODUCTS = 1 << 20


def small_addmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """Multiply small matrices, and add."""
    few = 0 < x.numel() * y.shape[-1] <= FEW_PRODUCTS
    dtypes = {bias.dtype, x.dtype, y.dtype}  # torch refuses to mix dtypes
    if beta != 1 or alpha != 1 or not few or len(dtypes) > 1 or dtypes - {*FLOATS}:
        return NotImplemented
    return x @ y + bias


FLOATS = (torch.float32, torch.float64)


def of_floats(body: Callable) -> Callable:
    """Wrap a body for tensors that are all float32, or all float64, and not empty."""
    return lambda *args, **options: body(*args, **options) if can_open(args) else NotImplemented


def of_any_floats(body: Callable) -> Callable:
    """Wrap a body for tensors of :func:`of_floats`, bfloat16 and float16, and float32."""
    return lambda *args, **options: (
        body(*args, **options) if can_open(args, ROUNDED) else NotImplemented
    )


def can_open(args: Sequence, more: Container[torch.dtype] = ()) -> bool:
    found = [a for a in args if isinstance(a, Tensor)]
    dtypes = {wide(t.dtype) if t.dtype in more else t.dtype for t in found}
    return (
        len(dtypes) == 1
        and not dtypes.isdisjoint(FLOATS)
        and found[0].numel() > 0
        and max([t.dim() for t in found]) > 0
    )


#: op -> its body. PyTorch's own softmax, gradients of group norm, and batch norm with running
#: statistics are faster than kernels of bfloat16 and float16, its group norm than one of bfloat16
OPENED: dict[Any, Callable] = {
    aten.mm.default: outer_product,
    aten.bmm.default: outer_product,
    aten.addmm.default: small_addmm,
    aten.baddbmm.default: small_addmm,
    aten._softmax.default: of_floats(softmax.softmax),
    aten._log_softmax.default: of_floats(softmax.log_softmax),
    aten._softmax_backward_data.default: of_floats(softmax.softmax_backward),
    aten._log_softmax_backward_data.default: of_floats(softmax.log_softmax_backward),
    aten.mse_loss.default: of_any_floats(losses.mse_loss),
    aten.mse_loss_backward.default: of_any_floats(losses.mse_loss_backward),
    aten.huber_loss.default: of_floats(losses.huber_loss),
    aten.huber_loss_backward.default: of_floats(losses.huber_loss_backward),
    aten.smooth_l1_loss.default: of_floats(losses.smooth_l1_loss),
    aten.smooth_l1_loss_backward.default: of_floats(losses.smooth_l1_loss_backward),
    aten.soft_margin_loss.default: of_floats(losses.soft_margin_loss),
    aten.soft_margin_loss_backward.default: of_floats(losses.soft_margin_loss_backward),
    aten.binary_cross_entropy_with_logits.default: of_floats(losses.cross_entropy_of_logits),
    aten.nll_loss_forward.default: losses.nll_loss,
    aten.nll_loss_backward.default: losses.nll_loss_backward,
    aten.max_pool2d_with_indices.default: pooling.max_pool,
    aten.avg_pool2d.default: pooling.avg_pool,
    aten.avg_pool2d_backward.default: pooling.avg_pool_backward,
    aten._adaptive_avg_pool2d.default: pooling.adaptive_avg_pool,
    aten._adaptive_avg_pool2d_backward.default: pooling.adaptive_backward,
    aten.argmax.default: extremes.arg("amax"),
    aten.argmin.default: extremes.arg("amin"),
    aten.max.dim: extremes.with_positions("amax"),
    aten.min.dim: extremes.with_positions("amin"),
    aten.aminmax.default: of_any_floats(reduced.aminmax),
    aten.linalg_vector_norm.default: of_any_floats(reduced.vector_norm),
    aten.norm.ScalarOpt_dim: of_any_floats(reduced.norm),
    aten.logsumexp.default: of_any_floats(reduced.logsumexp),
    aten._safe_softmax.default: of_floats(reduced.safe_softmax),
    aten.nansum.default: of_floats(reduced.nansum),
    aten.log_sigmoid_forward.default: of_any_floats(elements.log_sigmoid),
    aten.glu.default: of_any_floats(elements.glu),
    aten.glu_backward.default: of_any_floats(elements.glu_backward),
    aten._prelu_kernel_backward.default: of_floats(elements.prelu_backward),
    aten.logit.default: of_floats(elements.logit),
    aten.nan_to_num.default: of_any_floats(elements.nan_to_num),
    aten.native_dropout_backward.default: elements.dropout_backward,
    aten.repeat.default: moved.repeat,
    aten.roll.default: moved.roll,
    aten.pixel_shuffle.default: of_any_floats(moved.pixel_shuffle),
    aten.pixel_unshuffle.default: of_any_floats(moved.pixel_unshuffle),
    aten.channel_shuffle.default: of_any_floats(moved.channel_shuffle),
    **dict.fromkeys(
        (
            *(aten.upsample_nearest1d.default, aten.upsample_nearest2d.default),
            aten.upsample_nearest3d.default,
        ),
        of_floats(moved.upsample_nearest),
    ),
    **dict.fromkeys(
        (
            *(aten.upsample_nearest1d_backward.default, aten.upsample_nearest2d_backward.default),
            aten.upsample_nearest3d_backward.default,
        ),
        of_floats(moved.upsample_nearest_backward),
    ),
    aten.upsample_bilinear2d.default: resized.resizing(False),
    aten.upsample_trilinear3d.default: resized.resizing(False),
    aten.upsample_bicubic2d.default: resized.resizing(True),
    aten.upsample_bilinear2d_backward.default: resized.resizing_backward(False),
    aten.upsample_trilinear3d_backward.default: resized.resizing_backward(False),
    aten.upsample_bicubic2d_backward.default: resized.resizing_backward(True),
    aten.cat.default: moved.cat,
    aten.linalg_cross.default: of_floats(moved.cross),
    aten.cummax.default: extremes.cummax,
    aten.cummin.default: extremes.cummin,
    aten.var.correction: of_any_floats(norms.var),
    aten.std.correction: of_any_floats(norms.std),
    aten.std_mean.correction: of_any_floats(reduced.std_mean),
    aten.var_mean.correction: of_any_floats(norms.var_mean),
    aten.native_layer_norm.default: of_any_floats(norms.layer_norm),
    aten.native_layer_norm_backward.default: of_any_floats(norms.layer_norm_backward),
    aten._native_batch_norm_legit.no_stats: of_any_floats(norms.batch_norm),
    aten._native_batch_norm_legit_functional.default: of_any_floats(norms.batch_norm_functional),
    aten._native_batch_norm_legit_no_training.default: of_floats(norms.batch_norm_inference),
    aten.native_batch_norm_backward.default: of_any_floats(norms.batch_norm_backward),
    aten.native_group_norm.default: of_any_floats(norms.group_norm),
    aten.native_group_norm_backward.default: of_floats(norms.group_norm_backward),
}

"""Copy the arguments of kernels that read memory in one layout only.

PyTorch's own functions see to that before they call the kernels, and a capture records what they
do. A transform or a rule calls kernels with values of other layouts; some then refuse, and some
return other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .shapes.rules import CHANNELS_LAST, in_order
from .shapes.sig import Sig

aten = torch.ops.aten


def is_contiguous(sig: Sig) -> bool:
    """Return whether the strides are contiguous; those of dimensions of size 1 do not count."""
    return 0 in sig.shape or in_order(sig, range(sig.ndim))


def by_rows(sig: Sig) -> bool:
    """Return whether the last dimension is innermost, with no gaps."""
    return not sig.shape or sig.shape[-1] == 1 or sig.stride[-1] == 1


def image_format(sig: Sig) -> torch.memory_format:
    """Return the memory format of a batch of images: channels_last if ``sig`` has it."""
    for form, order in CHANNELS_LAST.items():
        if len(order) == sig.ndim and not is_contiguous(sig) and in_order(sig, order):
            return form
    return torch.contiguous_format


def densely(*positions: int) -> Callable:
    return lambda sigs: {
        i: torch.contiguous_format for i in positions if sigs[i] and not is_contiguous(sigs[i])
    }


def by_rows_of(*positions: int) -> Callable:
    return lambda sigs: {i: torch.contiguous_format for i in positions if not by_rows(sigs[i])}


def normalised(sigs: Sequence[Sig]) -> dict[int, torch.memory_format]:
    """Return the copies for a group norm: images in either format, weight and bias dense."""
    there = {} if image_format(sigs[0]) is not torch.contiguous_format else densely(0)(sigs)
    return there | densely(1, 2)(sigs)


def normalised_backward(sigs: Sequence[Sig]) -> dict[int, torch.memory_format]:
    """Return the copies for a gradient: the cotangent as the images."""
    there, form = densely(2, 3, 4)(sigs), image_format(sigs[1])
    if form is torch.contiguous_format:
        return there | densely(0, 1)(sigs)
    return there if image_format(sigs[0]) is form else there | {0: form}


#: op -> the arguments to copy, given their signatures, and into which format
READ_AS_LAID: dict[Any, Callable[[Sequence[Any]], dict[int, torch.memory_format]]] = {
    aten.native_group_norm.default: normalised,
    aten.native_group_norm_backward.default: normalised_backward,
    aten.native_layer_norm_backward.default: densely(3, 4),
    aten._scaled_dot_product_flash_attention_for_cpu.default: by_rows_of(0, 1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: by_rows_of(1, 2, 3, 4),
    aten._pdist_forward.default: densely(0),
    aten._pdist_backward.default: densely(0, 1, 3),
    aten.fractional_max_pool2d_backward.default: densely(4),
    aten.fractional_max_pool3d_backward.default: densely(4),
    aten.nll_loss2d_backward.default: densely(1),
    aten.linalg_matrix_exp.default: densely(0),
    aten.mkldnn_rnn_layer.default: densely(*range(7)),
    aten.mkldnn_rnn_layer_backward.default: densely(*range(10)),
}


def misread(op: Any, sigs: Sequence[Any]) -> dict[int, torch.memory_format]:
    """Return the arguments, by position, that this kernel would misread, and the memory format to
    copy each into; ``sigs`` has a signature for each tensor argument."""
    wanted = READ_AS_LAID.get(op)
    return {} if wanted is None else wanted(sigs)

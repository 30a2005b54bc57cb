"""Follow the batch through pointwise ops, which keep it if it is aligned, and unreduced losses."""

from __future__ import annotations

from typing import Any

from ...trace.shapes.rules import Unsure, broadcast_shape
from ...trace.shapes.sig import Sig
from .parts import Mixed, OpCall, broadcast_part, part_rule


@part_rule("clone _to_copy alias_copy zeros_like ones_like full_like fill.Scalar floor_divide")
@part_rule(
    "_prelu_kernel _prelu_kernel_backward ldexp.Tensor log_sigmoid_forward log_sigmoid_backward"
)
def aligned(c: OpCall) -> Any:
    """Return where a pointwise op holds the batch: as its arguments, aligned right."""
    try:
        shape = broadcast_shape(*[sig.shape for sig, _ in c.tensors])
    except Unsure:
        raise Mixed from None
    for val in c.val if isinstance(c.val, tuple) else (c.val,):
        if val.__class__ is not Sig or val.shape != shape:
            raise Mixed
    return c.each(broadcast_part(c.tensors, len(shape)))


@part_rule(
    "mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits"
)
@part_rule(
    "mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward"
)
@part_rule("soft_margin_loss soft_margin_loss_backward")
def losses(c: OpCall) -> Any:
    if c.arg["reduction"]:
        raise Mixed
    return aligned(c)

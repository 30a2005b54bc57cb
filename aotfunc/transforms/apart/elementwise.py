"""Pointwise ops keep the batch where it is aligned; so do losses that are not reduced."""

from __future__ import annotations

from typing import Any

from ...trace.shapes.rules import Unsure, broadcast
from ...trace.shapes.sig import Sig
from .parts import Call, Mixed, aligned, rule


@rule("clone _to_copy zeros_like ones_like full_like fill.Scalar floor_divide _prelu_kernel")
def pointwise(c: Call) -> Any:
    try:
        shape = broadcast(*[sig.shape for sig, _ in c.tensors])
    except Unsure:
        raise Mixed from None
    for val in c.val if isinstance(c.val, tuple) else (c.val,):
        if val.__class__ is not Sig or val.shape != shape:
            raise Mixed
    return c.each(aligned(c.tensors, len(shape)))


@rule("mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits")
@rule(
    "mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward"
)
def losses(c: Call) -> Any:
    if c.arg["reduction"]:
        raise Mixed
    return pointwise(c)

"""Record products of a batch of matrices and a matrix or vector that requires grad as eager mode
computes them: as one product.

Autograd is off below a recording, so that PyTorch's ``matmul`` takes a traced tensor for one that
requires no grad. It then expands the matrix and multiplies in batches, which rounds and lays out
gradients otherwise."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .traced import Traced

if TYPE_CHECKING:
    from .tracer import Trace

aten = torch.ops.aten


def spot(frame: FrameType) -> tuple:
    """Return the instruction that runs: both ops of a ``matmul`` come from one."""
    return frame.f_code, frame.f_lasti


def note_expand(trace: Trace, x: Tensor, size: Sequence[int], implicit: bool = False) -> Any:
    """Note which matrix, or vector, has become a batch, and where."""
    if x.__class__ is Traced and 0 < x.dim() < min(3, len(size)) and x.requires_grad:
        trace.expanded = weakref.ref(x), spot(sys._getframe(2))
    return NotImplemented


def fold_batches(trace: Trace, a: Tensor, b: Tensor) -> Any:
    """Multiply by the matrix or vector itself, if ``matmul`` has made a batch of it just now."""
    if trace.expanded is None:
        return NotImplemented
    (noted, where), trace.expanded = trace.expanded, None
    x = noted()
    if x is None or where != spot(sys._getframe(2)):
        return NotImplemented
    of_x = [t.__class__ is Traced and trace.root(t.ref) == trace.root(x.ref) for t in (a, b)]
    if of_x[0] == of_x[1] or (b if of_x[1] else a).shape[1:].numel() != x.numel():
        return NotImplemented
    with trace:
        if of_x[1]:
            return folded_product(a, x, b.shape[2])
        folded = folded_product(b.mT, x.t(), a.shape[1])
        return folded.mT.contiguous() if x.dim() == 2 else folded.mT


def folded_product(batch: Tensor, x: Tensor, columns: int) -> Tensor:
    """Return a batch of matrices times a matrix, or a vector as a column."""
    times = aten.mm if x.dim() == 2 else aten.mv
    folded = times.default(batch.flatten(0, 1), x)
    return aten._unsafe_view.default(folded, [*batch.shape[:2], columns])

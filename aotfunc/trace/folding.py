"""Record products of a batch of matrices and one matrix that requires grad as eager mode computes
them: as one product of matrices.

Autograd is off below a recording, so that PyTorch's ``matmul`` takes a traced matrix for one that
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
    """Note which matrix has become a batch, and where."""
    if x.__class__ is Traced and x.dim() == 2 < len(size) and x.requires_grad:
        trace.expanded = weakref.ref(x), spot(sys._getframe(2))
    return NotImplemented


def fold_batches(trace: Trace, a: Tensor, b: Tensor) -> Any:
    """Multiply by the matrix itself, if ``matmul`` has made a batch of it just now."""
    if trace.expanded is None:
        return NotImplemented
    (matrix, where), trace.expanded = trace.expanded, None
    x = matrix()
    if x is None or where != spot(sys._getframe(2)):
        return NotImplemented
    of_x = [t.__class__ is Traced and trace.root(t.ref) == trace.root(x.ref) for t in (a, b)]
    if of_x == [False, True]:
        with trace:
            product = aten.mm.default(a.reshape(-1, a.shape[2]), x)
            return aten._unsafe_view.default(product, [*a.shape[:2], x.shape[1]])
    if of_x == [True, False]:
        with trace:
            product = aten.mm.default(b.mT.reshape(-1, b.shape[1]), x.t())
            shape = [b.shape[0], b.shape[2], x.shape[0]]
            return aten._unsafe_view.default(product, shape).mT.contiguous()
    return NotImplemented

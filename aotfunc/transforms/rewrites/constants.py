"""Compute with constants: tensors filled with one number, which are written in one form and follow
every move.

A filled tensor is ``full``, or ``expand`` of a ``full`` with one element if its strides are zeros.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from ...trace.emit import Builder, infer_val
from ...trace.shapes.sig import Sig, contiguous_stride
from .table import EXACT, aten, fit_or_none, is_call, may_go, rewrite, tried

FULL = aten.full.default
VIEW, EXPAND = aten.view.default, aten.expand.default
PERMUTE, TRANSPOSE, T = aten.permute.default, aten.transpose.int, aten.t.default
TURNS = frozenset((PERMUTE, TRANSPOSE, T))
SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
RESHAPES = (VIEW, aten.unsqueeze.default, *SQUEEZES)
#: ops that return the same elements in another shape or order
MOVES = TURNS | {EXPAND, *RESHAPES}


def filled_with(a: Any) -> Any:
    """Return the number that fills ``a``; None if it is not known to be filled."""
    if a.__class__ in (int, float):
        return a
    while a.__class__ is Node and a.op == "call_function":
        target = a.target
        if target is FULL:
            value = a.args[1]
            return value if value.__class__ in (int, float) else None
        if target not in MOVES:
            return None
        a = a.args[0]
    return None


def is_one(a: Any) -> bool:
    return filled_with(a) == 1


def filled_constant(b: Builder, val: Sig, value: Any) -> Any:
    """Return a tensor of this signature filled with this number; None if constants have other
    strides.

    Its storage offset is 0, whatever was planned: another offset of a constant shows nowhere."""
    if val.plain or val.stride == contiguous_stride(val.shape):
        return full(b, val, value)
    short = [s for n, s in zip(val.shape, val.stride, strict=True) if n == 1]
    if not any(s for n, s in zip(val.shape, val.stride, strict=True) if n > 1):
        single = full(b, val, value, [1] * len(val.shape) if short and min(short) == 1 else ())
        return tried(b, val, EXPAND, single, list(val.shape))
    return None


def is_expanded(a: Any) -> bool:
    """Return whether ``a`` is an expanded constant."""
    return is_call(a, EXPAND) and is_call(a.args[0], FULL) and filled_with(a) is not None


def full(b: Builder, val: Sig, value: Any, shape: Any = None) -> Node:
    """Return ``full`` in its one form, so that equal ones merge."""
    value = plain_number(value, val.dtype)
    return b.call(
        FULL,
        list(val.shape if shape is None else shape),
        value,
        dtype=val.dtype,
        device=val.device,
    )


def plain_number(value: Any, dtype: torch.dtype) -> Any:
    """Return the shortest Python number with this value in ``dtype``."""
    if dtype not in EXACT or value.__class__ not in (int, float):
        return value
    try:
        value = float(value)
    except OverflowError:
        return value
    if not math.isfinite(value):
        return value
    if dtype is torch.float32:
        with np.errstate(all="ignore"):
            short = np.float32(value)
        if np.isfinite(short):
            value = float(str(short))
            if abs(value) > torch.finfo(dtype).max:  # the largest float32 is shorter rounded up
                value = float(short)
    whole = (
        value.is_integer() and abs(value) < 2**53 and (value != 0 or math.copysign(1, value) > 0)
    )
    return int(value) if whole else value


def of_dtype(a: Any, dtype: torch.dtype) -> bool:
    """Return whether the number that fills ``a`` is exact in this dtype, as 0.1 is not."""
    return a.__class__ is not Node or a.meta["val"].dtype is dtype


def constant_result(b: Builder, val: Sig, op: Any, a: Any, c: Any) -> Any:
    """Return the constant ``op(a, c)`` of two constants, computed in their dtype; None if it
    cannot be computed.

    Arithmetic gives the same bits wherever IEEE 754 holds. A quotient is the exception: a GPU
    multiplies by the reciprocal of a number, which is the same for the numerator one only."""
    if val.dtype not in EXACT or not (of_dtype(a, val.dtype) and of_dtype(c, val.dtype)):
        return None
    x, y = filled_with(a), filled_with(c)
    if op is np.divide and val.device.type != "cpu" and abs(x) != 1:
        return None
    real = np.float32 if val.dtype is torch.float32 else np.float64
    with np.errstate(all="ignore"):
        try:
            value = float(op(real(x), real(y)))
        except OverflowError:
            return None
    return filled_constant(b, val, value) if math.isfinite(value) else None


# ----- one way of writing them -------------------------------------------------------------------


@rewrite(FULL)
def _full(
    b: Builder, val: Sig, shape: Any, value: Any, pin_memory: Any = None, **named: Any
) -> Any:
    if pin_memory or value.__class__ not in (int, float, bool):
        return None
    short = plain_number(value, val.dtype)
    kept = short.__class__ is value.__class__ and (short == value or short != short)
    return None if kept and named.keys() == {"dtype", "device"} else full(b, val, short)


@rewrite(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(b: Builder, val: Sig, *_: Any, pin_memory: Any = None, **__: Any) -> Any:
    return None if pin_memory else filled_constant(b, val, 1)


@rewrite(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(b: Builder, val: Sig, *_: Any, pin_memory: Any = None, **__: Any) -> Any:
    return None if pin_memory else filled_constant(b, val, 0)


@rewrite(aten.scalar_tensor.default)
def _scalar_tensor(b: Builder, val: Sig, value: Any, **named: Any) -> Any:
    """Fill with infinity for a number beyond the dtype, which ``full`` refuses."""
    if value.__class__ in (int, float) and val.dtype.is_floating_point:
        if abs(value) > torch.finfo(val.dtype).max:
            value = torch.tensor(float(value), dtype=torch.float64).to(val.dtype).item()
    return _full_like(b, val, value, **named)


@rewrite(aten.full_like.default, aten.new_full.default)
def _full_like(b: Builder, val: Sig, *args: Any, pin_memory: Any = None, **_: Any) -> Any:
    value = args[-1]
    return (
        None
        if pin_memory or value.__class__ not in (int, float, bool)
        else filled_constant(b, val, value)
    )


# ----- moved and selected ------------------------------------------------------------------------


@rewrite(aten.select.int, aten.slice.Tensor, aten.as_strided.default, aten.clone.default)
def _part(b: Builder, val: Sig, x: Any, *_: Any, **__: Any) -> Any:
    """Replace a part of a constant by a smaller constant."""
    value = filled_with(x) if is_call(x, FULL, EXPAND) else None
    return None if value is None else filled_constant(b, val, value)


@rewrite(aten.sum.default, aten.sum.dim_IntList)
def _sum(b: Builder, val: Sig, x: Any, *_: Any, dtype: Any = None) -> Any:
    """Add up a constant of whole numbers, whose small sums are exact in any order."""
    value = filled_with(x) if is_call(x, FULL, EXPAND) else None
    if (
        value is None
        or dtype is not None
        or val.dtype not in EXACT
        or not val.numel
        or not float(value).is_integer()
    ):
        return None
    # a sum starts with 0, so minus zeros sum to 0
    total = value * (x.meta["val"].numel // val.numel) + 0.0
    return filled_constant(b, val, total) if abs(total) < 2**24 else None


@rewrite(aten.where.self)
def _where(b: Builder, val: Sig, condition: Any, x: Any, y: Any) -> Any:
    if not is_call(condition, FULL):
        return None
    taken, other = (x, y) if condition.args[1] else (y, x)
    return fit_or_none(val, taken) if may_go(other, taken) else None


# ----- dense where it matters not ----------------------------------------------------------------


def solid(b: Builder, val: Sig, op: Any, args: tuple, named: dict) -> Any:
    """Return the call on dense constants, not expanded, if the layout stays."""
    dense = tuple(
        [
            full(b, a.meta["val"], filled_with(a), a.meta["val"].shape) if is_expanded(a) else a
            for a in args
        ]
    )
    return b.node(op, dense, named, val) if infer_val(op, dense, named) is val else None


def _solid(op: Any, b: Builder, val: Any, *args: Any, **named: Any) -> Any:
    for a in args:
        if a.__class__ is Node and a.target is EXPAND and is_expanded(a):
            return solid(b, val, op, args, named)
    return None


def _solid_matrix(op: Any, b: Builder, val: Sig, *args: Any, **named: Any) -> Any:
    for a in args:
        if a.__class__ is Node and a.target is EXPAND and is_expanded(a):
            if 1 in a.meta["val"].shape:  # their strides distinguish a matrix from its transpose
                return None
            return solid(b, val, op, args, named)
    return None


for name in ("mm", "bmm", "addmm", "baddbmm"):
    op = getattr(aten, name).default
    rewrite(op)(partial(_solid_matrix, op))
for op in (
    *(aten.select_scatter.default, aten.slice_scatter.default, aten.index_put.default),
    *(aten.index_add.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default),
    *(aten.select_backward.default, aten.slice_backward.default),
    *(aten._softmax_backward_data.default, aten._log_softmax_backward_data.default),
    *(aten.gelu_backward.default, aten.silu_backward.default, aten.elu_backward.default),
    *(aten.max_pool2d_with_indices_backward.default, aten.avg_pool2d_backward.default),
    *(aten.native_layer_norm_backward.default, aten.native_batch_norm_backward.default),
    *(aten.convolution_backward.default, aten.embedding_dense_backward.default),
    aten.diagonal_backward.default,
):
    rewrite(op)(partial(_solid, op))

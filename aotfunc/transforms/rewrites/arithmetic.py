"""Rewrite arithmetic with one, with signs and with constants."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from ...trace.emit import Builder
from ...trace.shapes.sig import Sig
from .constants import constant_result, filled_constant, filled_with, is_one
from .table import EXACT, aten, fit_or_none, has_signature, rewrite

NEG = aten.neg.default


def is_bool(x: Any) -> bool:
    """Return whether ``x`` is a bool tensor, which cannot be subtracted."""
    return x.__class__ is Node and x.meta["val"].dtype is torch.bool


def negated(x: Any, val: Sig) -> bool:
    """Return whether ``x`` is a node ``-y`` of the result's dtype."""
    return x.__class__ is Node and x.target is NEG and x.meta["val"].dtype is val.dtype


@rewrite(aten.mul.Tensor)
def _mul(b: Builder, val: Sig, x: Any, y: Any) -> Any:
    if val.dtype.is_complex:  # inf and nan of one part reach the other
        return None
    m, n = filled_with(x), filled_with(y)
    if n is not None:
        if n == 1 and has_signature(x, val):
            return x
        if m is not None:
            return constant_result(b, val, operator.mul, x, y)
        if y.__class__ is Node and val.dtype in EXACT and y.meta["val"].dtype is val.dtype:
            return times_number(b, val, x, n)
    elif m is not None and x.__class__ is Node:
        if m == 1 and has_signature(y, val):
            return y
        if val.dtype in EXACT and x.meta["val"].dtype is val.dtype:
            return times_number(b, val, y, m)
    # pull minus signs out of products, where they meet others
    if negated(x, val):
        return fit_or_none(val, b.call(NEG, b.call(aten.mul.Tensor, x.args[0], y)))
    if negated(y, val):
        return fit_or_none(val, b.call(NEG, b.call(aten.mul.Tensor, x, y.args[0])))
    return None


def times_number(b: Builder, val: Sig, x: Any, n: Any) -> Any:
    """Return ``x`` times a filled tensor's number, unless that gives the shape."""
    return (
        fit_or_none(val, b.call(aten.mul.Tensor, x, n))
        if x.__class__ is Node and x.meta["val"].dtype is val.dtype
        else None
    )


@rewrite(aten.div.Tensor)
def _div(b: Builder, val: Sig, x: Any, y: Any) -> Any:
    if val.dtype.is_complex:
        return None
    if is_one(y) and has_signature(x, val):
        return x
    m = filled_with(x)
    if m is not None:
        if filled_with(y) is not None:
            return constant_result(b, val, np.divide, x, y)
        if (
            m == 1
            and val.dtype in EXACT
            and y.__class__ is Node
            and y.meta["val"].dtype is val.dtype
        ):
            return fit_or_none(val, b.call(aten.reciprocal.default, y))
    if negated(x, val):
        return fit_or_none(val, b.call(NEG, b.call(aten.div.Tensor, x.args[0], y)))
    if negated(y, val):
        return fit_or_none(val, b.call(NEG, b.call(aten.div.Tensor, x, y.args[0])))
    return None


@rewrite(NEG)
def _neg(b: Builder, val: Sig, x: Any) -> Any:
    if x.target is NEG and has_signature(x.args[0], val):
        return x.args[0]
    n = filled_with(x)
    return None if n is None or val.dtype not in EXACT else filled_constant(b, val, -float(n))


@rewrite(aten.add.Tensor)
def _add(b: Builder, val: Sig, x: Any, y: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        return None
    if is_bool(x) or is_bool(y):
        return None
    if negated(y, val):
        return (
            fit_or_none(val, b.call(aten.sub.Tensor, x, y.args[0]))
            if val.dtype.is_floating_point
            else None
        )
    if negated(x, val) and y.__class__ is Node and val.dtype.is_floating_point:
        return fit_or_none(val, b.call(aten.sub.Tensor, y, x.args[0]))
    return number_added(b, val, operator.add, x, y) if val.dtype in EXACT else None


@rewrite(aten.sub.Tensor)
def _sub(b: Builder, val: Sig, x: Any, y: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        return None
    if negated(y, val):
        return (
            fit_or_none(val, b.call(aten.add.Tensor, x, y.args[0]))
            if val.dtype.is_floating_point
            else None
        )
    return number_added(b, val, operator.sub, x, y) if val.dtype in EXACT else None


def number_added(b: Builder, val: Sig, op: Any, x: Any, y: Any) -> Any:
    """Return a sum with filled tensors as a constant (both) or with a number (one)."""
    m, n = filled_with(x), filled_with(y)
    if m is None and n is None:
        return None
    if m is not None and n is not None:
        return constant_result(b, val, op, x, y)
    adds = op is operator.add
    if n is not None:
        # x - 0 and x + -0 are x, but -0 + 0 is 0
        if n == 0 and np.signbit(n) == adds and has_signature(x, val):
            return x
        if (
            x.__class__ is y.__class__ is Node
            and x.meta["val"].dtype is y.meta["val"].dtype is val.dtype
        ):
            return fit_or_none(val, b.call(aten.add.Tensor if adds else aten.sub.Tensor, x, n))
    elif (
        x.__class__ is y.__class__ is Node
        and x.meta["val"].dtype is y.meta["val"].dtype is val.dtype
    ):
        return fit_or_none(val, b.call(aten.add.Tensor if adds else aten.rsub.Scalar, y, m))
    return None


@rewrite(aten.pow.Tensor_Scalar)
def _pow(b: Builder, val: Sig, x: Any, exponent: Any) -> Any:
    return x if exponent == 1 and has_signature(x, val) else None

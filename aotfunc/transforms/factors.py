"""Add and multiply the coefficients of series, of which None is zero: rational factors are
gathered in few ops."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from ..trace.emit import Builder

aten = torch.ops.aten


def sum_of(b: Builder, terms: Sequence[Any]) -> Any:
    """Return the sum of the terms."""
    found = None
    for t in terms:
        if found is None or t is None:
            found = t if found is None else found
            continue
        inner, factor = factored(t)
        if factor == 1:
            found = b.call(aten.add.Tensor, found, t)
        else:
            found = b.call(aten.add.Tensor, found, inner, alpha=ratio(factor))
    return found


def multiple(b: Builder, c: Any, factor: Fraction | float) -> Any:
    """Return ``factor c``. A fraction joins the factors inside of ``c``."""
    if c is None or factor == 1:
        return c
    if not isinstance(factor, Fraction):
        return b.call(aten.mul.Tensor, c, factor)
    inner, one = factored(c)
    factor *= one
    if inner.target is aten.addcmul.default and mild(value := inner.kwargs.get("value", 1)):
        found, left, right = inner.args
        value = factor * Fraction(value)
        return plus_product(b, multiple(b, found, factor), left, right, value)
    if inner.target is aten.mul.Tensor and inner.args[1].__class__ is Node:
        (left, one), (right, other) = map(factored, inner.args)
        inner, factor = b.call(aten.mul.Tensor, left, right), factor * one * other
    return inner if factor == 1 else b.call(aten.mul.Tensor, inner, ratio(factor))


def plus_product(b: Builder, found: Any, left: Any, right: Any, factor: Fraction) -> Any:
    """Return ``found + factor left right``."""
    (left, one), (right, other) = factored(left), factored(right)
    factor *= one * other
    value = {} if factor == 1 else {"value": ratio(factor)}
    return b.call(aten.addcmul.default, found, left, right, **value)


def alike(one: Any, other: Any) -> bool:
    """Return whether these are tensors of one dtype on one device."""
    if one.__class__ is not Node or other.__class__ is not Node:
        return False
    vals = one.meta["val"], other.meta["val"]
    return vals[0].dtype is vals[1].dtype and vals[0].device == vals[1].device


def factored(c: Any) -> tuple[Any, Fraction]:
    """Return a coefficient without a factor that is a mild real number, and this factor."""
    if c.__class__ is Node and c.target is aten.neg.default:
        return c.args[0], Fraction(-1)
    if c.__class__ is Node and c.target is aten.mul.Tensor:
        x, y = c.args
        if mild(y) and x.meta["val"] is c.meta["val"] and x.meta["val"].dtype is not torch.float16:
            return x, Fraction(y)
    return c, Fraction(1)


def mild(y: Any) -> bool:
    """Return whether products with and without the factor ``y`` have about the same range: they
    must not overflow where those of the function do not."""
    return isinstance(y, int | float) and 2**-24 <= abs(y) <= 2**24


def ratio(factor: Fraction) -> int | float:
    """Return a fraction as an argument of an op."""
    return int(factor) if factor.denominator == 1 and abs(factor) < 2**53 else float(factor)

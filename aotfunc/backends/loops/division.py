"""Divide with a rounded quotient or a remainder, as PyTorch's kernels for the CPU do.

A quotient of integers by a tensor is left to PyTorch, which raises for a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .functions import Rule, all_true, where
from .ir import Const, Expr, Operand, Unfit, function_of, number

aten = torch.ops.aten


def of_one_dtype(body: Callable[[Expr, Expr], Expr]) -> Callable[[Operand, Operand], Expr]:
    """Return a rule for tensors and numbers. It raises Unfit for integers by what may be 0."""

    def call(a: Operand, b: Operand) -> Expr:
        dtype = next(x.dtype for x in (a, b) if isinstance(x, Expr))
        x, y = [e if isinstance(e, Expr) else number(e, dtype) for e in (a, b)]
        if not dtype.is_floating_point and not (isinstance(y, Const) and y.value):
            raise Unfit("a division of integers by what may be 0")
        return body(x, y)

    return call


def rest_of(a: Expr, b: Expr) -> Expr:
    return function_of("fmod", a, b)


def to_add(rest: Expr, b: Expr) -> Expr:
    """Return whether a remainder has not the divisor's sign: the floor is one less then."""
    if isinstance(b, Const) and not b.given:
        return rest < 0 if b.value >= 0 else rest > 0
    other_sign = function_of("bitwise_xor", rest < 0, b < 0)
    return all_true(function_of("ne", rest, 0), other_sign)


def remainder(a: Expr, b: Expr) -> Expr:
    rest = rest_of(a, b)
    return where(to_add(rest, b), rest + b, rest)


def truncated(a: Expr, b: Expr) -> Expr:
    if a.dtype.is_floating_point:
        return function_of("trunc", a / b)
    return function_of("quotient", a, b)


def floored(a: Expr, b: Expr) -> Expr:
    """Return Python's quotient: that of ``a - rest``, which does not round up."""
    rest = rest_of(a, b)
    if not a.dtype.is_floating_point:
        quotient = truncated(a, b)
        return where(to_add(rest, b), quotient - 1, quotient)
    plain = a / b
    infinite = all_true(is_infinite(plain), function_of("bitwise_not", is_infinite(a)))
    exact = where(infinite, a, a - rest) / b
    exact = where(to_add(rest, b), exact - 1, exact)
    floor = function_of("floor", exact)
    floor = where(exact - floor > 0.5, floor + 1, floor)
    zero = function_of("copysign", number(0, a.dtype), plain)
    floor = where(function_of("eq", exact, 0), zero, floor)
    return where(function_of("eq", b, 0), plain, floor)


def is_infinite(x: Expr) -> Expr:
    return function_of("eq", function_of("abs", x), math.inf)


def div_rounded(a: Operand, b: Operand, rounding_mode: str | None = None) -> Expr:
    bodies = {"floor": floored, "trunc": truncated}
    if rounding_mode is None:
        return function_of("div", a, b)
    return of_one_dtype(bodies[rounding_mode])(a, b)


DIVISIONS: dict[Any, Rule] = {
    op: Rule("any", body)
    for body, ops in (
        (of_one_dtype(rest_of), (aten.fmod.Tensor, aten.fmod.Scalar)),
        (
            of_one_dtype(remainder),
            (aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor),
        ),
        (of_one_dtype(floored), (aten.floor_divide.default, aten.floor_divide.Scalar)),
        (div_rounded, (aten.div.Tensor_mode, aten.div.Scalar_mode)),
    )
    for op in ops
}

#: ops whose kernels round each of their steps, if a tensor of bfloat16 or float16 divides
STEPWISE = frozenset((aten.floor_divide.default, aten.div.Tensor_mode))

"""Formulas, as PyTorch's kernels compute them, for ops whose Inductor formulas give other numbers.

A body that answers NotImplemented leaves its op as it is: Inductor's formula is right for these
dtypes or devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

LOW = (torch.bfloat16, torch.float16)

#: coefficients of erf(x) / x in powers of x², enough for |x| < 1/2 in float32
ERF = [2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(7)]


def in_float32(body: Callable) -> Callable:
    """Return a formula computed in float32 if its arguments are of low precision, and rounded once
    at the end. Numbers are rounded first, as the kernels for the CPU do."""

    @functools.wraps(body)
    def call(*args: Any, **kwargs: Any) -> Any:
        low = next((a for a in args if isinstance(a, Tensor) and a.dtype in LOW), None)
        if low is None:
            return body(*args, **kwargs)

        def wide(a: Any) -> Any:
            if isinstance(a, Tensor):
                return a.float() if a.dtype in LOW else a
            return (
                rounded(a, low.dtype) if isinstance(a, float) and low.device.type == "cpu" else a
            )

        return body(*map(wide, args), **{k: wide(a) for k, a in kwargs.items()})

    return call


def rounded(x: float, dtype: torch.dtype) -> float:
    if not x or not math.isfinite(x):
        return x
    digits = 8 if dtype is torch.bfloat16 else 11
    part, exponent = math.frexp(x)
    x = math.ldexp(round(math.ldexp(part, digits)), exponent - digits)
    return x if abs(x) <= torch.finfo(dtype).max else math.copysign(math.inf, x)


def is_floating(*args: Any) -> bool:
    """Return whether the common dtype of these arguments is a real floating one."""
    return torch.result_type(*args).is_floating_point


def remainder(a: Any, b: Any) -> Any:
    """Compute the exact remainder: a - floor(a / b) * b loses digits where a is large."""
    if not is_floating(a, b):
        return NotImplemented
    rest = fmod(a, b)
    return torch.where((rest != 0) & ((b < 0) != (rest < 0)), rest + b, rest)


def fmod(a: Any, b: Any) -> Tensor:
    if not isinstance(a, Tensor):
        a = torch.full_like(b, a, dtype=torch.result_type(a, b))
    return torch.fmod(a, b)


def floor_division(a: Tensor, b: Any) -> Any:
    """Compute Python's floor division: floor(a / b) rounds up where the division does."""
    if not is_floating(a, b):
        return NotImplemented
    quotient, rest = a / b, fmod(a, b)
    # fmod may be nan there
    exact = torch.where(quotient.isinf() & ~a.isinf(), quotient, (a - rest) / b)
    exact = torch.where((rest != 0) & ((rest < 0) != (b < 0)), exact - 1, exact)
    floor = exact.floor()
    floor = torch.where(exact - floor > 0.5, floor + 1, floor)
    floor = torch.where(exact != 0, floor, torch.copysign(torch.zeros_like(quotient), quotient))
    return (
        torch.where(b == 0, quotient, floor)
        if isinstance(b, Tensor)
        else quotient
        if b == 0
        else floor
    )


def truncated_division(a: Tensor, b: Any) -> Any:
    """Divide integers by the floor, whose kernel raises for a zero; the other one crashes."""
    if is_floating(a, b):
        return NotImplemented
    floor = torch.div(a, b, rounding_mode="floor")
    return floor + ((floor * b != a) & ((a < 0) != (b < 0)))


def division(a: Tensor, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return floor_division(a, b)
    return truncated_division(a, b) if rounding_mode == "trunc" else NotImplemented


def only_on_cpu(body: Callable) -> Callable:
    return lambda x: body(x) if x.device.type == "cpu" and is_floating(x, x) else NotImplemented


def expm1(x: Tensor) -> Tensor:
    """Compute ``exp(x) - 1`` without the loss of digits for small values."""
    return torch.tanh(x / 2) * (x.exp() + 1)


def atanh(x: Tensor) -> Tensor:
    """Compute ``log((1 + x) / (1 - x)) / 2`` without the loss of digits for small values."""
    return (torch.log1p(x) - torch.log1p(-x)) / 2


def erf(x: Tensor) -> Any:
    """Compute small arguments by a series: Inductor is good to 1e-7 absolutely."""
    if x.dtype is torch.float64:
        return NotImplemented
    series = functools.reduce(
        lambda total, c: total * (x * x) + c, reversed(ERF[:-1]), torch.full_like(x, ERF[-1])
    )
    return torch.where(x.abs() < 0.5, x * series, torch.erf(x))


def scaled_sum(op: Callable) -> Callable:
    """Return the formula of a sum with a multiple that is not itself rounded."""

    def body(a: Tensor, b: Any, alpha: Any = 1) -> Any:
        return (
            NotImplemented
            if alpha == 1 or a.dtype not in LOW
            else in_float32(op)(a, b, alpha=alpha)
        )

    return body


def lerp(start: Tensor, end: Tensor, weight: Any) -> Any:
    """Compute without rounding after each step."""
    if start.dtype not in LOW:
        return NotImplemented
    return torch.lerp(
        start.float(), end.float(), weight.float() if isinstance(weight, Tensor) else weight
    )


FORMULAS: dict[Any, Callable] = {
    **dict.fromkeys(
        (aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor),
        in_float32(remainder),
    ),
    aten.fmod.Scalar: in_float32(lambda a, b: fmod(a, b) if is_floating(a, b) else NotImplemented),
    **dict.fromkeys((aten.div.Tensor_mode, aten.div.Scalar_mode), in_float32(division)),
    **dict.fromkeys(
        (aten.floor_divide.default, aten.floor_divide.Scalar), in_float32(floor_division)
    ),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), scaled_sum(torch.add)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), scaled_sum(torch.sub)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), scaled_sum(torch.rsub)),
    **dict.fromkeys((aten.lerp.Tensor, aten.lerp.Scalar), lerp),
    aten.expm1.default: in_float32(only_on_cpu(expm1)),
    aten.atanh.default: in_float32(only_on_cpu(atanh)),
    aten.erf.default: in_float32(only_on_cpu(erf)),
}

"""Rules of elementwise arithmetic: sums, products, powers, unary functions, copies, and piecewise
constant functions.

A formula ``(g, out, *args)`` is the derivative times ``g``, without conjugates (see
:func:`~.table.pointwise`). If aten has one fused backward, that is the formula; if the output
gives it in one op less, the output is used. Points without a derivative (ties, bounds, zeros)
follow ``torch.autograd``.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from .batching import elementwise
from .schema import aten, tensor_args
from .table import (
    jvp_of,
    linear,
    pointwise,
    series_as,
    times,
    total,
    vjp_of,
    vmap_of,
    wrong_in_autograd,
)


def functional(*packets: OpOverloadPacket) -> Iterator[OpOverload]:
    """Yield the overloads of ``packets`` that take and return tensors and write to none."""
    for packet in packets:
        for name in packet.overloads():
            op = getattr(packet, name)
            returns = [str(r.type) for r in op._schema.returns]
            if tensor_args(op) and returns == ["Tensor"] and not op._schema.is_mutable:
                yield op


def is_low_precision(x: Tensor) -> bool:
    """Return whether digits are so few that the order of products, PyTorch's then, shows."""
    return x.dtype in (torch.bfloat16, torch.float16)


# ----- sums, products, quotients -----------------------------------------------------------------

for op in functional(aten.add):
    pointwise(op, lambda g, out, x, y, alpha: g, lambda g, out, x, y, alpha: times(g, alpha))
for op in functional(aten.sub):
    pointwise(op, lambda g, out, x, y, alpha: g, lambda g, out, x, y, alpha: times(-g, alpha))
for op in functional(aten.rsub):
    pointwise(op, lambda g, out, x, y, alpha: times(-g, alpha), lambda g, out, x, y, alpha: g)
for op in functional(aten.mul):
    formulas = (lambda g, out, x, y: g * y, lambda g, out, x, y: g * x)
    pointwise(op, *formulas, linear=(0, 1))


def quotient_in_divisor(g: Tensor, out: Tensor, x: Any, y: Any) -> Tensor:
    return -(g * (out / y)) if is_low_precision(out) else -(g / y * out)


for op in (aten.div.Tensor, aten.div.Scalar):
    pointwise(op, lambda g, out, x, y: g / y, quotient_in_divisor)
# rounded: piecewise constant; rounding_mode=None: true division
for op in (aten.div.Tensor_mode, aten.div.Scalar_mode):
    pointwise(
        op,
        lambda g, out, x, y, mode: g / y if mode is None else torch.zeros_like(g),
        lambda g, out, x, y, mode: (
            quotient_in_divisor(g, out, x, y) if mode is None else torch.zeros_like(g)
        ),
    )
pointwise(aten.neg, lambda g, out, x: -g)
pointwise(aten.reciprocal, lambda g, out, x: -(g * (out * out)))
pointwise(
    aten.addcmul,
    lambda g, out, x, a, b, value: g,
    lambda g, out, x, a, b, value: g * times(b, value),
    lambda g, out, x, a, b, value: g * times(a, value),
)
pointwise(
    aten.addcdiv,
    lambda g, out, x, a, b, value: g,
    lambda g, out, x, a, b, value: times(g, value) / b,
    lambda g, out, x, a, b, value: -(times(g, value) / b * (a / b)),
)
pointwise(aten.lerp.Scalar, lambda g, out, x, y, w: g * (1 - w), lambda g, out, x, y, w: g * w)
pointwise(
    aten.lerp.Tensor,
    lambda g, out, x, y, w: g * (1 - w),
    lambda g, out, x, y, w: g * w,
    lambda g, out, x, y, w: g * (y - x),
)
for op in (aten.fmod.Tensor, aten.fmod.Scalar):
    pointwise(
        op,
        lambda g, out, x, y: g,
        lambda g, out, x, y: -(g * torch.div(x, y, rounding_mode="trunc")),
    )
for op in (aten.remainder.Tensor, aten.remainder.Scalar):
    pointwise(
        op,
        lambda g, out, x, y: g,
        lambda g, out, x, y: -(g * torch.div(x, y, rounding_mode="floor")),
    )
pointwise(aten.remainder.Scalar_Tensor, lambda g, out, x, y: -(g * aten.floor(x / y)))
pointwise(aten.frac, lambda g, out, x: g)
for op in functional(aten.ldexp):
    pointwise(
        op, lambda g, out, x, y: aten.ldexp(g, y), lambda g, out, x, y: g * out * math.log(2)
    )
    wrong_in_autograd("all", op)
linear(aten.deg2rad, lambda g, x: aten.deg2rad(g), batch=elementwise(aten.deg2rad.default))
linear(aten.rad2deg, lambda g, x: aten.rad2deg(g), batch=elementwise(aten.rad2deg.default))


# ----- powers, roots, exponentials, logarithms ---------------------------------------------------


def power_of_number(g: Tensor, out: Tensor, x: Tensor, n: Any) -> Tensor:
    if n == 0:
        return torch.zeros_like(g)
    if n == 1:
        return g
    if is_low_precision(out) and n != 2:
        return g * (x ** (n - 1) * n)
    return g * (x if n == 2 else x ** (n - 1)) * n


def power_in_base(g: Tensor, out: Tensor, x: Tensor, n: Tensor) -> Tensor:
    return g * torch.where(n == 0, 0, n * x ** (n - 1))


def power_in_exponent(g: Tensor, out: Tensor, x: Any, n: Tensor) -> Tensor:
    vanishes = (n.real if n.is_complex() else n) >= 0  # 0**n is constantly 0 there
    if isinstance(x, Tensor):
        return g * torch.where((x == 0) & vanishes, 0, out * x.log())
    if x == 0:
        return g * torch.where(vanishes, 0, out * -math.inf)
    if isinstance(x, complex):
        return g * (out * cmath.log(x))
    return g * (out * (math.log(x) if x > 0 else math.nan))


pointwise(aten.pow.Tensor_Scalar, power_of_number)
pointwise(aten.pow.Tensor_Tensor, power_in_base, power_in_exponent)
pointwise(aten.pow.Scalar, power_in_exponent)
pointwise(aten.sqrt, lambda g, out, x: g / (2 * out))
pointwise(aten.rsqrt, lambda g, out, x: g * out**3 * -0.5)
series_as(aten.rsqrt, lambda x: torch.reciprocal(torch.sqrt(x)))
pointwise(aten.exp, lambda g, out, x: g * out)
pointwise(aten.exp2, lambda g, out, x: g * out * math.log(2))
pointwise(aten.expm1, lambda g, out, x: g * (out + 1))
pointwise(aten.log, lambda g, out, x: g / x)
pointwise(aten.log2, lambda g, out, x: g / (x * math.log(2)))
pointwise(aten.log10, lambda g, out, x: g / (x * math.log(10)))
pointwise(aten.log1p, lambda g, out, x: g / (x + 1))
pointwise(
    aten.logaddexp,
    lambda g, out, x, y: g * aten.sigmoid(x - y),
    lambda g, out, x, y: g * aten.sigmoid(y - x),
)
pointwise(
    aten.logaddexp2,
    lambda g, out, x, y: g / (1 + 2.0 ** (y - x)),
    lambda g, out, x, y: g / (1 + 2.0 ** (x - y)),
)


def log_slope(log: Any, floor: float) -> Any:
    """Return ``log(y)``, or zero where ``x`` is 0 and ``y`` at most ``floor``."""

    def formula(g: Tensor, out: Tensor, x: Tensor, y: Any) -> Tensor:
        if isinstance(y, Tensor):
            return log(g, y).masked_fill((x == 0) & (y <= floor), 0)
        return log(g, y) if y > floor else log(g, y).masked_fill(x == 0, 0)

    return formula


in_x, in_y = log_slope(aten.xlogy, 0), lambda g, out, x, y: g * x / y
pointwise(aten.xlogy.Tensor, in_x, in_y)
pointwise(aten.xlogy.Scalar_Other, in_x)
pointwise(aten.xlogy.Scalar_Self, in_y)
in_x, in_y = log_slope(aten.special_xlog1py, -1), lambda g, out, x, y: g * x / (y + 1)
pointwise(aten.special_xlog1py, in_x, in_y)
pointwise(aten.special_xlog1py.other_scalar, in_x)
pointwise(aten.special_xlog1py.self_scalar, in_y)


# ----- circular and hyperbolic functions ---------------------------------------------------------

pointwise(aten.sin, lambda g, out, x: g * aten.cos(x))
pointwise(aten.cos, lambda g, out, x: -(g * aten.sin(x)))
pointwise(aten.tan, lambda g, out, x: g * (1 + out * out))
pointwise(aten.asin, lambda g, out, x: g * aten.rsqrt(1 - x * x))
pointwise(aten.acos, lambda g, out, x: -(g * aten.rsqrt(1 - x * x)))
pointwise(aten.atan, lambda g, out, x: g / (x * x + 1))
pointwise(aten.sinh, lambda g, out, x: g * aten.cosh(x))
pointwise(aten.cosh, lambda g, out, x: g * aten.sinh(x))
# tanh_backward and sigmoid_backward conjugate the output themselves, which a formula must not
pointwise(aten.tanh, lambda g, out, x: aten.tanh_backward(g, out.conj()))
pointwise(aten.sigmoid, lambda g, out, x: aten.sigmoid_backward(g, out.conj()))
pointwise(aten.asinh, lambda g, out, x: g * aten.rsqrt(x * x + 1))
pointwise(aten.acosh, lambda g, out, x: g * slope_of_acosh(x))
pointwise(aten.atanh, lambda g, out, x: g / (1 - x * x))


def slope_of_acosh(x: Tensor) -> Tensor:
    """Return ``1 / sqrt(x² - 1)``. Of real numbers it is one below -1, too, as autograd has it:
    a ``where`` that does not choose them has gradients of zero there, not NaN."""
    y = x if x.is_complex() else aten.abs(x)
    return aten.rsqrt(y - 1) * aten.rsqrt(y + 1)


def over_square(y: Tensor, x: Tensor, which: Tensor) -> Tensor:
    """Return ``which / (x² + y²)``, zero at the origin."""
    square = x * x + y * y
    return (which / square).masked_fill(square == 0, 0)


pointwise(
    aten.atan2,
    lambda g, out, y, x: g * over_square(y, x, x),
    lambda g, out, y, x: -(g * over_square(y, x, y)),
)
pointwise(aten.hypot, lambda g, out, x, y: g * (x / out), lambda g, out, x, y: g * (y / out))


@vjp_of(aten.tanh_backward)
def _(h: Tensor, out: Tensor, g: Tensor, y: Tensor) -> list[Tensor]:
    return [aten.tanh_backward(h, y.conj()), h.conj() * g * y.conj() * -2]


@jvp_of(aten.tanh_backward)
def _(tangents: tuple[Tensor | None, ...], out: Tensor, g: Tensor, y: Tensor) -> Tensor | None:
    tg, ty = tangents
    return total(
        None if tg is None else aten.tanh_backward(tg, y),
        None if ty is None else g * (ty * y).conj() * -2,
    )


@vjp_of(aten.sigmoid_backward)
def _(h: Tensor, out: Tensor, g: Tensor, y: Tensor) -> list[Tensor]:
    return [aten.sigmoid_backward(h, y.conj()), h.conj() * g * (1 - 2 * y).conj()]


@jvp_of(aten.sigmoid_backward)
def _(tangents: tuple[Tensor | None, ...], out: Tensor, g: Tensor, y: Tensor) -> Tensor | None:
    tg, ty = tangents
    return total(
        None if tg is None else aten.sigmoid_backward(tg, y),
        None if ty is None else g * (ty * (1 - 2 * y)).conj(),
    )


for op in (aten.tanh_backward.default, aten.sigmoid_backward.default):
    vmap_of(op)(elementwise(op))
series_as(aten.tanh_backward, lambda g, y: g * (1 - y * y).conj())
series_as(aten.sigmoid_backward, lambda g, y: g * (y - y * y).conj())


@vjp_of(aten.frexp.Tensor, diff_outputs=(0,))
def _(g: tuple[Tensor, None], outs: tuple[Tensor, Tensor], x: Tensor) -> list[Tensor]:
    return [aten.ldexp(g[0], -outs[1])]


vmap_of(aten.frexp.Tensor)(elementwise(aten.frexp.Tensor))


# ----- copies ------------------------------------------------------------------------------------


def copying(op: OpOverload) -> Any:
    """Return the vmap rule of an op whose ``memory_format`` may not fit the batch."""
    batch, at = elementwise(op), [a.name for a in op._schema.arguments].index("memory_format")

    def rule(*args: Any, batched: tuple[bool, ...]) -> Tensor:
        full = list(args)
        if full[at] in (torch.channels_last, torch.channels_last_3d):
            full[at] = torch.contiguous_format
        return batch(*full, batched=batched)

    return rule


linear(aten.clone, lambda g, x: g, batch=copying(aten.clone.default))
# the walker casts the dtype
linear(aten._to_copy, lambda g, x: g.to(x.device), batch=copying(aten._to_copy.default))
linear(aten._lazy_clone, lambda g, x: g, batch=elementwise(aten._lazy_clone.default))


# ----- no derivative: rounding, comparisons, logic, bits -----------------------------------------

for op in functional(
    *(aten.floor, aten.ceil, aten.trunc, aten.round, aten.sign, aten.floor_divide, aten.heaviside),
    *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge),
    *(aten.isnan, aten.isinf, aten.isposinf, aten.isneginf, aten.signbit),
    *(aten.logical_and, aten.logical_or, aten.logical_xor, aten.logical_not),
    *(aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor, aten.bitwise_not),
    *(aten.bitwise_left_shift, aten.bitwise_right_shift, aten.__lshift__, aten.__rshift__),
    *(aten.gcd, aten.lcm),
):
    pointwise(op)

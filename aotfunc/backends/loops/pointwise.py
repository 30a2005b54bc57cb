"""Lower ops that compute each element by itself to expressions.

A body gets its tensors as expressions in the dtype that the op computes in, and its numbers as
they are. It raises Unfit for arguments that it does not cover: the op is then called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .activations import ACTIVATIONS
from .complexes import imag_part, real_part
from .division import DIVISIONS
from .functions import (
    Rule,
    absolute,
    adder,
    all_true,
    clamp,
    exp,
    fn,
    is_nan,
    log1p,
    maximum,
    minimum,
    sigmoid,
    where,
)
from .ir import Expr, Operand, Unfit, function_of, number

aten = torch.ops.aten

RULES: dict[Any, Rule] = {**ACTIVATIONS, **DIVISIONS}
add_rule = adder(RULES)


# --- functions of one value ---

for _name in (
    *("sqrt", "rsqrt", "reciprocal", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("asinh", "acosh", "atanh", "erf", "erfc", "sigmoid", "lgamma"),
):
    add_rule("float", fn(_name), getattr(aten, _name).default)

for _name in ("neg", "abs"):
    add_rule("any", fn(_name), getattr(aten, _name).default)

for _name in ("floor", "ceil", "trunc", "round"):
    add_rule("float", fn(_name), getattr(aten, _name).default)


def sign(x: Expr) -> Expr:
    if x.dtype.is_complex:
        return function_of("sgn", x)
    return where(x > 0, 1, where(x < 0, -1, number(0, x.dtype)))


def angle(x: Expr) -> Expr:
    if x.dtype.is_complex:
        return function_of("angle", x)
    return where(is_nan(x), x, where(x < 0, math.pi, number(0, x.dtype)))


def conjugate(x: Expr) -> Expr:
    return function_of("conj", x) if x.dtype.is_complex else x


add_rule("any", lambda x: where(x < 0, 0, x), aten.relu.default)
add_rule("any", sign, aten.sign.default, aten.sgn.default)
add_rule("any", fn("complex"), aten.complex.default)
add_rule("any", fn("polar"), aten.polar.default)
add_rule("any", angle, aten.angle.default)
add_rule("any", conjugate, aten._conj_physical.default)
add_rule("any", fn("real"), real_part)
add_rule("any", fn("imag"), imag_part)
add_rule("float", lambda x: x - function_of("trunc", x), aten.frac.default)
add_rule("float", lambda x: x * sigmoid(x), aten.silu.default)
add_rule("any", lambda x: x * x, aten.square.default)

# --- arithmetic ---


def add(a: Operand, b: Operand, alpha: Any = 1) -> Expr:
    dtype = next(x.dtype for x in (a, b) if isinstance(x, Expr))
    if dtype.is_complex:  # multiplied by 1, too: an infinite part makes the other one NaN
        return function_of("add", a, function_of("mul", number(alpha, dtype), b))
    return function_of("add", a, b if alpha == 1 else b * alpha)


def subtract(a: Operand, b: Operand, alpha: Any = 1) -> Expr:
    dtype = next(x.dtype for x in (a, b) if isinstance(x, Expr))
    if dtype.is_complex:
        return add(a, b, -alpha)
    return function_of("sub", a, b if alpha == 1 else b * alpha)


add_rule("any", add, aten.add.Tensor, aten.add.Scalar)
add_rule("any", subtract, aten.sub.Tensor, aten.sub.Scalar)
add_rule("any", lambda a, b, alpha=1: subtract(b, a, alpha), aten.rsub.Tensor, aten.rsub.Scalar)
add_rule("any", lambda a, b: a * b, aten.mul.Tensor, aten.mul.Scalar)
add_rule("float", lambda a, b: a / b, aten.div.Tensor, aten.div.Scalar)
#: ops that round their numbers to bfloat16 or float16; others compute with them unrounded
ROUND_FIRST = frozenset(
    (
        *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar),
        *(aten.rsub.Tensor, aten.rsub.Scalar, aten.pow.Tensor_Scalar, aten.pow.Scalar),
        *(aten.fmod.Scalar, aten.remainder.Scalar, aten.remainder.Scalar_Tensor),
        aten.hardshrink.default,
        *(aten.hardshrink_backward.default, aten.softshrink_backward.default),
    )
)
#: ops that are computed of complex numbers, too
COMPLEX = frozenset(
    (
        *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar),
        *(aten.rsub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.mul.Scalar),
        *(aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.reciprocal.default),
        *(aten.exp.default, aten.square.default, aten.pow.Tensor_Scalar, aten.addcmul.default),
        *(aten.addcdiv.default, aten.abs.default, aten.angle.default, aten.sgn.default),
        *(aten.complex.default, aten.polar.default, aten._conj_physical.default),
        *(real_part, imag_part, aten.where.self, aten.masked_fill.Scalar),
        *(aten.masked_fill.Tensor, aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor),
        *(aten.ne.Scalar, aten.isnan.default, aten.clone.default, aten._to_copy.default),
    )
)
#: ops that multiply by one number of another dtype unrounded; all others round tensors of another
#: dtype
FACTORS = (aten.mul.Tensor, aten.div.Tensor)

add_rule("any", maximum, aten.maximum.default)
add_rule("any", minimum, aten.minimum.default)
add_rule("float", fn("atan2"), aten.atan2.default)
add_rule("float", lambda x, a, b, value=1: x + value * a * b, aten.addcmul.default)
add_rule("float", lambda x, a, b, value=1: x + value * a / b, aten.addcdiv.default)


def power(x: Expr, e: Any) -> Expr:
    if not x.dtype.is_floating_point and e not in (2, 3):
        raise Unfit("a power of integers")
    quick = {
        2: lambda: x * x,
        3: lambda: x * x * x,
        0.5: lambda: function_of("sqrt", x),
        -0.5: lambda: function_of("rsqrt", x),
        -1: lambda: function_of("reciprocal", x),
        -2: lambda: 1 / (x * x),
        4: lambda: (x * x) * (x * x),
        -3: lambda: 1 / (x * x) / x,  # reaches as far as the power does
        -4: lambda: 1 / (x * x) / (x * x),
    }
    return quick[e]() if e in quick else function_of("pow", x, e)


#: op -> how powers of 0.5 and -0.5 are computed in float16: eager takes no root there, which is
#: nan for -inf and -0.0 for -0.0
POWERS = {aten.pow.Tensor_Scalar: fn("pow")}

add_rule("any", power, aten.pow.Tensor_Scalar)
add_rule("float", fn("pow"), aten.pow.Tensor_Tensor, aten.pow.Scalar)


add_rule("any", lambda x, min=None, max=None: clamp(x, min, max), aten.clamp.default)
add_rule("any", lambda x, min=None, max=None: clamp(x, min, max), aten.clamp.Tensor)
add_rule("any", lambda x, min: clamp(x, min), aten.clamp_min.default, aten.clamp_min.Tensor)
add_rule("any", lambda x, max: clamp(x, None, max), aten.clamp_max.default, aten.clamp_max.Tensor)
add_rule("any", lambda x, min_val=-1, max_val=1: clamp(x, min_val, max_val), aten.hardtanh.default)


def lerp(start: Expr, end: Expr, weight: Any) -> Expr:
    near = start + weight * (end - start)
    far = end - (end - start) * (1 - weight)
    if not isinstance(weight, Expr):
        return near if abs(weight) < 0.5 else far
    return where(function_of("abs", weight) < 0.5, near, far)


add_rule("float", lerp, aten.lerp.Scalar, aten.lerp.Tensor)
add_rule("cast", lambda x, **_: x, aten._to_copy.default, aten.clone.default)

# --- comparisons, logic, bits, choice ---

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _op = getattr(aten, _name)
    add_rule("compare", fn(_name), _op.Tensor, _op.Scalar)

add_rule("compare", lambda x: function_of("ne", x, x), aten.isnan.default)
add_rule(
    "compare", lambda x: function_of("eq", function_of("abs", x), math.inf), aten.isinf.default
)
add_rule("truth", fn("bitwise_and"), aten.logical_and.default)
add_rule("truth", fn("bitwise_or"), aten.logical_or.default)
add_rule("truth", fn("bitwise_xor"), aten.logical_xor.default)
add_rule("truth", fn("bitwise_not"), aten.logical_not.default)
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    add_rule("bits", fn(_name), getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)
add_rule("bits", fn("bitwise_not"), aten.bitwise_not.default)
for _way, _short in (("left", aten.__lshift__), ("right", aten.__rshift__)):
    _op = getattr(aten, f"bitwise_{_way}_shift")
    _ops = (_op.Tensor, _op.Tensor_Scalar, _op.Scalar_Tensor, _short.Tensor, _short.Scalar)
    add_rule("bits", fn(f"bitwise_{_way}_shift"), *_ops)
add_rule("where", where, aten.where.self)
add_rule(
    "masked", lambda x, m, v: where(m, v, x), aten.masked_fill.Scalar, aten.masked_fill.Tensor
)

# --- rarer functions ---


def log_of_sum(exp_: Callable[[Expr], Expr], log1p_: Callable[[Expr], Expr]) -> Callable:
    """Return the logarithm of the sum of two powers, from their exponents."""

    def body(a: Expr, b: Expr) -> Expr:
        least, most = minimum(a, b), maximum(a, b)
        same = all_true(function_of("eq", a, b), function_of("eq", absolute(a), math.inf))
        return where(same, a, most + log1p_(exp_(least - most)))

    return body


def sinc(x: Expr) -> Expr:
    y = x * math.pi
    return where(function_of("eq", x, 0), 1, function_of("sin", y) / y)


def signbit(x: Expr) -> Expr:
    return (
        function_of("copysign", number(1, x.dtype), x) < 0 if x.dtype.is_floating_point else x < 0
    )


add_rule("float", log_of_sum(exp, log1p), aten.logaddexp.default)
add_rule(
    "float",
    log_of_sum(fn("exp2"), lambda x: log1p(x) * (1 / math.log(2))),
    aten.logaddexp2.default,
)
add_rule("float", fn("hypot"), aten.hypot.default)
add_rule("float", fn("copysign"), aten.copysign.Tensor, aten.copysign.Scalar)
add_rule("float", lambda a, b: where(is_nan(b), a, where(a >= b, a, b)), aten.fmax.default)
add_rule("float", lambda a, b: where(is_nan(b), a, where(a <= b, a, b)), aten.fmin.default)
add_rule("float", sinc, aten.sinc.default)
add_rule("float", lambda x: x * (math.pi / 180), aten.deg2rad.default)
add_rule("float", lambda x: x * (180 / math.pi), aten.rad2deg.default)
add_rule(
    "float",
    lambda x, y: where(function_of("eq", x, 0), y, where(x > 0, 1, number(0, x.dtype))),
    aten.heaviside.default,
)
add_rule("compare", lambda x: function_of("eq", x, math.inf), aten.isposinf.default)
add_rule("compare", lambda x: function_of("eq", x, -math.inf), aten.isneginf.default)
add_rule("compare", signbit, aten.signbit.default)

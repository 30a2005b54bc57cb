"""Ops that compute each element by itself, as expressions.

A body gets its tensors as expressions in the dtype that the op computes in, and its numbers as
they are. It raises Unfit for arguments that it does not cover: the op is then called as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .ir import Expr, Operand, Unfit, function_of, number

aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """``body`` computes an op; ``kind`` says in which dtype. *float*: that of the result, which is
    a floating-point number; *any*: that of the result, which is no bool; *bits*: that of the
    result, which is none of floating point; *compare*: the dtype that its arguments have in
    common, *truth*: likewise, and the result is a bool of bools; *where*: that of the result,
    after a bool; *cast*: that of the result."""

    kind: str
    body: Callable[..., Expr]


RULES: dict[Any, Rule] = {}


def add_rule(kind: str, body: Callable[..., Expr], *ops: Any) -> None:
    for op in ops:
        RULES[op] = Rule(kind, body)


def fn(name: str) -> Callable[..., Expr]:
    return lambda *args: function_of(name, *args)


def where(c: Expr, a: Operand, b: Operand) -> Expr:
    return function_of("where", c, a, b)


def maximum(a: Operand, b: Operand) -> Expr:
    return function_of("maximum", a, b)


def minimum(a: Operand, b: Operand) -> Expr:
    return function_of("minimum", a, b)


def exp(x: Expr) -> Expr:
    return function_of("exp", x)


def sigmoid(x: Expr) -> Expr:
    return function_of("sigmoid", x)


def tanh(x: Expr) -> Expr:
    return function_of("tanh", x)


def erf(x: Expr) -> Expr:
    return function_of("erf", x)


def log1p(x: Expr) -> Expr:
    return function_of("log1p", x)


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

add_rule("any", lambda x: where(x < 0, 0, x), aten.relu.default)
add_rule("any", lambda x: where(x > 0, 1, where(x < 0, -1, number(0, x.dtype))), aten.sign.default)
add_rule("float", lambda x: x - function_of("trunc", x), aten.frac.default)
add_rule("float", lambda x: x * sigmoid(x), aten.silu.default)
add_rule("any", lambda x: x * x, aten.square.default)

# --- arithmetic ---


def times_alpha(b: Operand, alpha: Any) -> Operand:
    return b if alpha == 1 else b * alpha


add_rule("any", lambda a, b, alpha=1: a + times_alpha(b, alpha), aten.add.Tensor, aten.add.Scalar)
add_rule("any", lambda a, b, alpha=1: a - times_alpha(b, alpha), aten.sub.Tensor, aten.sub.Scalar)
add_rule(
    "any", lambda a, b, alpha=1: b - times_alpha(a, alpha), aten.rsub.Tensor, aten.rsub.Scalar
)
add_rule("any", lambda a, b: a * b, aten.mul.Tensor, aten.mul.Scalar)
add_rule("float", lambda a, b: a / b, aten.div.Tensor, aten.div.Scalar)
#: these round their numbers to bfloat16 or float16, others compute with them as they are
ROUND_FIRST = frozenset(
    (
        *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar),
        *(aten.rsub.Tensor, aten.rsub.Scalar, aten.pow.Tensor_Scalar, aten.pow.Scalar),
        aten.fmod.Scalar,
    )
)
#: tensors of another dtype are rounded by all ops, but for one number by which these multiply
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


add_rule("any", power, aten.pow.Tensor_Scalar)
add_rule("float", fn("pow"), aten.pow.Tensor_Tensor, aten.pow.Scalar)


def clamp(x: Expr, low: Any = None, high: Any = None) -> Expr:
    if any(isinstance(a, float) and math.isnan(a) for a in (low, high)):
        raise Unfit("a bound that is nan")
    x = x if low is None else maximum(x, low)
    return x if high is None else minimum(x, high)


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
add_rule("float", fn("fmod"), aten.fmod.Tensor, aten.fmod.Scalar)
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
add_rule("where", where, aten.where.self)
add_rule(
    "masked", lambda x, m, v: where(m, v, x), aten.masked_fill.Scalar, aten.masked_fill.Tensor
)

# --- activations and their derivatives ---

BETA = math.sqrt(2 / math.pi)


def gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        return 0.5 * x * (1 + tanh(BETA * (x + 0.044715 * (x * x * x))))
    return x * 0.5 * (1 + erf(x * math.sqrt(0.5)))


def gelu_backward(g: Expr, x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        t = tanh(BETA * (x + 0.044715 * (x * x * x)))
        left = 0.5 * (1 + t)
        right = 0.5 * x * (1 - t * t) * (BETA * (1 + 3 * 0.044715 * (x * x)))
        return g * (left + right)
    cdf = 0.5 * (1 + erf(x * math.sqrt(0.5)))
    pdf = exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
    return g * (cdf + x * pdf)


def elu(x: Expr, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Expr:
    return where(x < 0, function_of("expm1", x * input_scale) * (alpha * scale), x * scale)


def softplus(x: Expr, beta: Any = 1, threshold: Any = 20) -> Expr:
    return where(x * beta > threshold, x, log1p(exp(x * beta)) / beta)


def softplus_backward(g: Expr, x: Expr, beta: Any, threshold: Any) -> Expr:
    z = exp(x * beta)
    return where(x * beta > threshold, g, g * z / (z + 1))


def silu_backward(g: Expr, x: Expr) -> Expr:
    s = sigmoid(x)
    return g * s * (1 + x * (1 - s))


def hardsigmoid(x: Expr) -> Expr:
    return clamp(x + 3, 0, 6) / 6


def between(low: float, high: float, inside: Expr, x: Expr) -> Expr:
    """Return a value where x lies inside of these bounds, 0 elsewhere."""
    return where(function_of("bitwise_and", x > low, x < high), inside, 0)


add_rule("float", hardsigmoid, aten.hardsigmoid.default)
add_rule("float", lambda g, x: between(-3, 3, g * (1 / 6), x), aten.hardsigmoid_backward.default)
add_rule("float", lambda x: x * clamp(x + 3, 0, 6) / 6, aten.hardswish.default)
add_rule("float", gelu, aten.gelu.default)
add_rule("float", gelu_backward, aten.gelu_backward.default)
add_rule("float", elu, aten.elu.default)
add_rule("float", softplus, aten.softplus.default)
add_rule("float", softplus_backward, aten.softplus_backward.default)
add_rule("float", silu_backward, aten.silu_backward.default)
add_rule("float", lambda g, y: g * (1 - y * y), aten.tanh_backward.default)
add_rule("float", lambda g, y: g * ((1 - y) * y), aten.sigmoid_backward.default)
add_rule(
    "any", lambda g, x, threshold: where(x <= threshold, 0, g), aten.threshold_backward.default
)
add_rule(
    "any", lambda x, threshold, value: where(x <= threshold, value, x), aten.threshold.default
)
add_rule("float", lambda x, slope=0.01: where(x > 0, x, x * slope), aten.leaky_relu.default)
add_rule(
    "float",
    lambda g, x, slope, is_result: where(x > 0, g, g * slope),
    aten.leaky_relu_backward.default,
)

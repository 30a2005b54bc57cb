"""Activations, losses of single elements, and their derivatives, as expressions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .functions import (
    Rule,
    adder,
    all_true,
    any_true,
    clamp,
    erf,
    exp,
    is_nan,
    log,
    log1p,
    log1p_of_exp,
    sigmoid,
    tanh,
    where,
)
from .ir import Expr, Unfit, function_of, number

aten = torch.ops.aten

ACTIVATIONS: dict[Any, Rule] = {}
add_rule = adder(ACTIVATIONS)


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


def zero_outside(low: float, high: float, inside: Expr, x: Expr) -> Expr:
    """Return the value ``inside`` if ``x`` lies between these bounds, else 0."""
    return where(function_of("bitwise_and", x > low, x < high), inside, 0)


add_rule("float", hardsigmoid, aten.hardsigmoid.default)
add_rule(
    "float", lambda g, x: zero_outside(-3, 3, g * (1 / 6), x), aten.hardsigmoid_backward.default
)
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


# --- of one value ---


def elu_backward(
    g: Expr, alpha: Any, scale: Any, input_scale: Any, is_result: bool, x: Expr
) -> Expr:
    slope = x + alpha * scale if is_result else exp(x * input_scale) * (alpha * scale)
    return where(x > 0, g * scale, g * input_scale * slope)


def mish_backward(g: Expr, x: Expr) -> Expr:
    t = tanh(log1p_of_exp(x))
    return g * (t + x * sigmoid(x) * (1 - t * t))


def log_sigmoid_backward(g: Expr, x: Expr, buffer: Expr) -> Expr:
    falling = buffer / (1 + buffer)
    return g * where(x < 0, 1 - falling, falling)


def shrunk(x: Expr, bound: Any, outside: Any) -> Expr:
    """Return 0 for values within a bound of 0, else ``outside``, also for NaN."""
    return where(all_true(x >= -bound, x <= bound), 0, outside)


def logit(x: Expr, eps: Any = None) -> Expr:
    if eps is not None:
        raise Unfit("a bound, which its dtype rounds")
    return log(x / (1 - x))


def logit_backward(g: Expr, x: Expr, eps: Any = None) -> Expr:
    if eps is not None:
        raise Unfit("a bound, which its dtype rounds")
    return where(all_true(x >= 0, x <= 1), g / (x * (1 - x)), math.nan)


def x_times(f: Callable[[Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """Return x * f(y), which is 0 for x = 0 unless y is NaN."""
    return lambda x, y: where(is_nan(y), math.nan, where(function_of("eq", x, 0), 0, x * f(y)))


def entropy(x: Expr) -> Expr:
    inside = where(
        x > 0, -x * log(x), where(function_of("eq", x, 0), 0, number(-math.inf, x.dtype))
    )
    return where(is_nan(x), x, inside)


add_rule("float", elu_backward, aten.elu_backward.default)
add_rule("float", lambda x, alpha=1.0: elu(x, alpha, 1, 1 / alpha), aten.celu.default)
add_rule(
    "any", lambda g, x, low, high: zero_outside(low, high, g, x), aten.hardtanh_backward.default
)
add_rule(
    "float",
    lambda g, x: where(x <= -3, 0, where(x >= 3, g, g * (x / 3 + 0.5))),
    aten.hardswish_backward.default,
)
add_rule("float", lambda x: x * tanh(log1p_of_exp(x)), aten.mish.default)
add_rule("float", mish_backward, aten.mish_backward.default)
add_rule("float", log_sigmoid_backward, aten.log_sigmoid_backward.default)
add_rule("float", lambda x, b=0.5: shrunk(x, b, x), aten.hardshrink.default)
add_rule(
    "float",
    lambda g, x, b: where(any_true(x < -b, x > b), g, 0),
    *(aten.hardshrink_backward.default, aten.softshrink_backward.default),
)
add_rule(
    "float", lambda x, b=0.5: shrunk(x, b, where(x > 0, x - b, x + b)), aten.softshrink.default
)
add_rule("float", lambda x, slope: where(x > 0, x, slope * x), aten._prelu_kernel.default)
add_rule("float", logit, aten.logit.default)
add_rule("float", logit_backward, aten.logit_backward.default)
add_rule("float", entropy, aten.special_entr.default)
add_rule("float", x_times(log), aten.xlogy.Tensor)
add_rule("float", x_times(log1p), aten.special_xlog1py.default)

"""Functions of expressions, by name; and the rule of an op that computes single elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .ir import Expr, Operand, Unfit, function_of


@dataclass(frozen=True)
class Rule:
    """``body`` computes an op; ``kind`` says in which dtype. *float*: the result's, a
    floating-point one; *any*: the result's, not bool; *bits*: the result's, an integer or bool;
    *compare*: the common dtype of the arguments; *truth*: likewise, and bools give a bool;
    *where*: the result's, after a bool; *cast*: the result's."""

    kind: str
    body: Callable[..., Expr]


def adder(rules: dict[Any, Rule]) -> Callable[..., None]:
    """Return ``add_rule(kind, body, *ops)``, which puts the rule of these ops into ``rules``."""
    return lambda kind, body, *ops: rules.update(dict.fromkeys(ops, Rule(kind, body)))


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


def log(x: Expr) -> Expr:
    return function_of("log", x)


def log1p_of_exp(x: Expr) -> Expr:
    return log1p(exp(x))


def absolute(x: Expr) -> Expr:
    return function_of("abs", x)


def is_nan(x: Expr) -> Expr:
    return function_of("ne", x, x)


def any_true(a: Expr, b: Expr) -> Expr:
    return function_of("bitwise_or", a, b)


def all_true(a: Expr, b: Expr) -> Expr:
    return function_of("bitwise_and", a, b)


def clamp(x: Expr, low: Any = None, high: Any = None) -> Expr:
    """Return x, also where a bound is a zero of the other sign, or the bound that it is beyond."""
    if any(isinstance(a, float) and math.isnan(a) for a in (low, high)):
        raise Unfit("a bound that is nan")
    x = x if low is None else function_of("maximum", low, x)
    return x if high is None else function_of("minimum", high, x)

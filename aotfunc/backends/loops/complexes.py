"""Make kernels of complex numbers kernels of their real and imaginary parts.

A complex tensor is in memory one of real numbers with steps twice as large, in which imaginary
parts come one element later. The formulas are those of PyTorch's kernels, so that infinities and
NaN give what they give there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .dtypes import cast
from .functions import absolute, all_true, any_true, exp, is_nan, where
from .ir import (
    Access,
    Accumulated,
    Apply,
    Cast,
    Const,
    Expr,
    Given,
    Kernel,
    Load,
    Store,
    Unfit,
    function_of,
    number,
    walk,
)

_library = torch.library.Library("aotfunc", "FRAGMENT")
for _part in ("real", "imag"):
    _library.define(f"{_part}_part(Tensor z) -> Tensor")
_library.impl("real_part", lambda z: torch.view_as_real(z)[..., 0].contiguous(), "CPU")
_library.impl("imag_part", lambda z: torch.view_as_real(z)[..., 1].contiguous(), "CPU")
real_part = torch.ops.aotfunc.real_part.default
imag_part = torch.ops.aotfunc.imag_part.default

#: the real and the imaginary part; a real number has one part
Parts = tuple[Expr, ...]


def complex_product(x: Parts, y: Parts) -> Parts:
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def divided(x: Parts, y: Parts) -> Parts:
    """Return the quotient by Smith's method: the lesser part of the divisor is divided by the
    greater one, so that neither is squared."""
    (a, b), (c, d) = x, y
    most, least = absolute(c), absolute(d)
    first, zero = most >= least, all_true(function_of("eq", c, 0), function_of("eq", d, 0))
    ratio = where(first, d, c) / where(first, c, d)
    scale = 1 / where(first, c + d * ratio, c * ratio + d)
    real = where(first, a + b * ratio, a * ratio + b) * scale
    imag = where(first, b - a * ratio, b * ratio - a) * scale
    return where(zero, a / most, real), where(zero, b / least, imag)


def reciprocal(x: Parts) -> Parts:
    c, d = x
    most, least = absolute(c), absolute(d)
    first, zero = most >= least, all_true(function_of("eq", c, 0), function_of("eq", d, 0))
    ratio = where(first, d, c) / where(first, c, d)
    scale = 1 / where(first, c + d * ratio, c * ratio + d)
    real, imag = where(first, 1, ratio + 0) * scale, where(first, 0 - ratio, -1) * scale
    return where(zero, 1 / most, real), where(zero, 0 / least, imag)


def size(x: Parts) -> Expr:
    return function_of("hypot", *x)


def sign(x: Parts) -> Parts:
    r = size(x)
    zero = function_of("eq", r, 0)
    return where(zero, 0, x[0] / r), where(zero, 0, x[1] / r)


def exponential(x: Parts) -> Parts:
    """Return exp(x), by half the real part twice: the whole may overflow too early."""
    a, b = x
    half, real = exp(a * 0.5), function_of("eq", b, 0)
    cos, sin = function_of("cos", b), function_of("sin", b)
    endless = is_nan(b - b)
    lost, grown = (
        all_true(function_of("eq", a, -torch.inf), endless),
        function_of("eq", a, torch.inf),
    )
    grown = all_true(grown, endless)
    return (
        where(lost, 0, where(grown, a, where(real, half * half, half * cos * half))),
        where(lost, 0, where(real, b, half * sin * half)),
    )


def from_polar(x: Parts, angle: Parts) -> Parts:
    return x[0] * function_of("cos", angle[0]), x[0] * function_of("sin", angle[0])


def part_by_part(fn: str) -> Callable[..., Parts]:
    """Return the function that computes the parts by themselves."""
    return lambda *args: tuple([function_of(fn, *parts) for parts in zip(*args, strict=True)])


#: function -> its parts, from those of its arguments
FORMULAS: dict[str, Callable[..., Parts]] = {
    "add": part_by_part("add"),
    "sub": part_by_part("sub"),
    "neg": part_by_part("neg"),
    "mul": complex_product,
    "div": divided,
    "reciprocal": reciprocal,
    "exp": exponential,
    "sgn": sign,
    "abs": lambda x: (size(x), number(0, x[0].dtype)),
    "angle": lambda x: (function_of("atan2", x[1], x[0]), number(0, x[0].dtype)),
    "conj": lambda x: (x[0], -x[1]),
    "real": lambda x: (x[0], number(0, x[0].dtype)),
    "imag": lambda x: (x[1], number(0, x[0].dtype)),
    "complex": lambda x, y: (x[0], y[0]),
    "polar": from_polar,
    "where": lambda c, x, y: (where(c[0], x[0], y[0]), where(c[0], x[1], y[1])),
    "eq": lambda x, y: (all_true(*part_by_part("eq")(x, y)),),
    "ne": lambda x, y: (any_true(*part_by_part("ne")(x, y)),),
}


def in_parts(kernel: Kernel) -> Kernel:
    """Return the kernel without complex numbers. Raises Unfit for an unknown function."""
    dtypes = {e.dtype for e in walk(kernel.values)} | {a.dtype for a in kernel.accesses}
    if not any(d.is_complex for d in dtypes):
        return kernel
    accesses: list[Access] = []
    place: list[int] = []
    for a in kernel.accesses:
        place.append(len(accesses))
        if a.dtype.is_complex:
            steps, start = tuple([2 * s for s in a.strides]), 2 * a.start
            a = replace(a, dtype=a.dtype.to_real(), strides=steps, start=start, part=0)
            accesses += [a, replace(a, start=start + 1, part=1)]
        else:
            accesses.append(a)
    parts: dict[Expr, Parts] = {}
    for e in walk(kernel.values):
        parts[e] = parts_of(e, [parts[a] for a in e.args], place)
    stores = []
    for s in kernel.stores:
        values = parts[s.value]
        if len(values) == 2 and (s.blocks or s.shift is not None):
            raise Unfit("complex numbers that are added up in memory")
        shift = parts[s.shift][0] if s.shift is not None else None
        stores += [
            Store(place[s.access] + i, value, s.blocks, shift, s.size)
            for i, value in enumerate(values)
        ]
    return replace(kernel, accesses=tuple(accesses), stores=tuple(stores), axes_of={})


def parts_of(e: Expr, args: list[Parts], place: list[int]) -> Parts:
    """Return a value's parts, given those of its arguments and new places of accesses."""
    dtype = e.dtype.to_real() if e.dtype.is_complex else e.dtype
    if isinstance(e, Const) and e.dtype.is_complex:
        real = Given(e.value.real) if e.given else e.value.real
        return number(real, dtype), number(e.value.imag, dtype)
    if isinstance(e, Load):
        rest = iter([a for (a,) in args])
        shift = next(rest) if e.shift is not None else None
        mask = next(rest) if e.mask is not None else None
        if not e.dtype.is_complex:
            return (Load(dtype, place[e.access], shift, mask),)
        shift = shift if shift is None else shift * 2
        return tuple([Load(dtype, place[e.access] + i, shift, mask) for i in (0, 1)])
    if isinstance(e, Cast):
        (x,) = args
        if e.dtype.is_complex:
            return tuple([cast(v, dtype) for v in (*x, number(0, dtype))[:2]])
        if len(x) == 2 and dtype is torch.bool:
            return (any_true(*[function_of("ne", v, 0) for v in x]),)
        return (cast(x[0], dtype),)
    if isinstance(e, Accumulated):
        if e.dtype.is_complex and e.fn != "sum":
            raise Unfit(f"{e.fn} of complex numbers")
        return tuple([type(e)(dtype, e.fn, x) for x in args[0]])
    if not isinstance(e, Apply):
        return (e,)
    if all(len(x) == 1 for x in args):
        return (Apply(dtype, e.fn, tuple([x for (x,) in args])),)
    if e.fn not in FORMULAS:
        raise Unfit(f"{e.fn} of complex numbers")
    return FORMULAS[e.fn](*args)

"""Define kernels: axes, accesses to memory that are affine in them, expressions, and stores.

A kernel computes its stores for every point of its axes. The last ``reduced`` of them are bound by
its ``Reduce`` expressions: such a value is one for each point of the other axes. The order of the
axes and ``Kernel.vector`` alone say how the loops run (which axis is outermost, which one is
computed in vectors); :mod:`.schedule` sets both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Expr:
    """A value at each point of the axes. It equals only itself, so that sharing can be seen."""

    dtype: torch.dtype

    @property
    def args(self) -> tuple[Expr, ...]:
        return ()

    def __add__(self, other: Operand) -> Expr:
        return function_of("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return function_of("add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return function_of("sub", self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return function_of("sub", other, self)

    def __mul__(self, other: Operand) -> Expr:
        return function_of("mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return function_of("mul", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return function_of("div", self, other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return function_of("div", other, self)

    def __neg__(self) -> Expr:
        return function_of("neg", self)

    def __lt__(self, other: Operand) -> Expr:
        return function_of("lt", self, other)

    def __le__(self, other: Operand) -> Expr:
        return function_of("le", self, other)

    def __gt__(self, other: Operand) -> Expr:
        return function_of("gt", self, other)

    def __ge__(self, other: Operand) -> Expr:
        return function_of("ge", self, other)


Operand = Expr | bool | int | float | complex


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """A number. One ``given`` with the call is an argument: the code does not depend on it."""

    value: Any
    given: bool = False


@dataclass(frozen=True, eq=False)
class Load(Expr):
    """The element of a tensor at this point, ``shift`` elements further, converted to this dtype.
    If ``mask`` is false it is 0, and no memory is read."""

    access: int
    shift: Expr | None = None
    mask: Expr | None = None

    @property
    def args(self) -> tuple[Expr, ...]:
        return tuple([e for e in (self.shift, self.mask) if e is not None])


@dataclass(frozen=True, eq=False)
class Position(Expr):
    """An integer that is affine in the axes."""

    ramp: int


@dataclass(frozen=True, eq=False)
class Apply(Expr):
    """A function of :data:`FUNCTIONS` of values that have one dtype (``where``: its last two)."""

    fn: str
    args: tuple[Expr, ...] = ()


@dataclass(frozen=True, eq=False)
class Cast(Expr):
    """The value in another dtype."""

    value: Expr

    @property
    def args(self) -> tuple[Expr, ...]:
        return (self.value,)


@dataclass(frozen=True, eq=False)
class Accumulated(Expr):
    fn: str
    value: Expr

    @property
    def args(self) -> tuple[Expr, ...]:
        return (self.value,)


class Reduce(Accumulated):
    """``fn`` (of :data:`REDUCTIONS`) of the value over the kernel's reduced axes."""


class Prefix(Accumulated):
    """``fn`` (sum, prod, max, min, logsumexp) of the values up to here on the reduced axis."""


def function_of(fn: str, *args: Operand) -> Expr:
    """Return ``fn`` of values of one dtype; a number becomes one of this dtype."""
    dtype = next(a.dtype for a in reversed(args) if isinstance(a, Expr))
    values = tuple([a if isinstance(a, Expr) else number(a, dtype) for a in args])
    return Apply(torch.bool if fn in COMPARISONS else dtype, fn, values)


class Given(float):
    """A number of the graph that other sizes may change."""


def number(value: Any, dtype: torch.dtype) -> Const:
    """Return a number as one of this dtype. Raises Unfit where the dtype does not hold it."""
    if dtype.is_floating_point or dtype.is_complex:
        given = isinstance(value, Given) and value not in (0, 1, -1)
        return Const(wide(dtype), torch.tensor(value, dtype=dtype).item(), given)
    if dtype is torch.bool:
        if value not in (0, 1):  # `isposinf` compares with infinity, which is not True
            raise Unfit(f"{value} is no {dtype}")
        return Const(dtype, bool(value))
    given = isinstance(value, Given)
    if value != value or value in (float("inf"), -float("inf")) or int(value) != value:
        raise Unfit(f"{value} is no {dtype}")
    info = torch.iinfo(dtype)
    if not info.min <= value <= info.max:
        raise Unfit(f"{value} is no {dtype}")
    return Const(dtype, int(value), given)


#: dtype that is computed as float32 -> the function that rounds to it
ROUNDED = {torch.bfloat16: "as_bf16", torch.float16: "as_f16"}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that the values of a tensor are computed in."""
    return torch.float32 if dtype in ROUNDED else dtype


class Unfit(Exception):
    """Raised for a value that no kernel, or not this one, can compute."""


#: function -> how the interpreter computes it
FUNCTIONS: dict[str, Any] = {
    name: getattr(torch, name)
    for name in (
        *("add", "sub", "mul", "neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "exp2"),
        *("expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan"),
        *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid", "lgamma"),
        *("pow", "atan2", "fmod", "hypot", "copysign", "floor", "ceil", "trunc", "round"),
        *("maximum", "minimum", "where", "eq", "ne", "lt", "le", "gt", "ge", "bitwise_and"),
        *("bitwise_or", "bitwise_xor", "bitwise_not", "bitwise_left_shift", "bitwise_right_shift"),
    )
} | {
    "div": torch.true_divide,
    "quotient": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "fma": lambda x, y, z: (x.double() * y.double() + z.double()).to(x.dtype),
    "as_bf16": lambda x: x.bfloat16().float(),
    "as_f16": lambda x: x.half().float(),
}

#: functions that take longer to compute than a value to read
SLOW = frozenset(
    (
        *("exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "erfc", "pow"),
        *("sin", "cos", "lgamma", "fmod", "quotient"),
    )
)

#: functions whose result is of dtype bool
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

REDUCTIONS: dict[str, Any] = {
    "sum": torch.sum,
    "prod": torch.prod,
    "max": torch.amax,
    "min": torch.amin,
    "any": torch.any,
    "all": torch.all,
}


@dataclass(frozen=True)
class Ramp:
    """A number that is ``start`` at the first point and grows by a step along each axis."""

    strides: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True)
class Access:
    """A walk of a kernel through a tensor: a step, in elements, for each axis, beginning at
    element ``start``. ``tensor`` says which of the caller's tensors it is. ``part`` is 0 for the
    real and 1 for the imaginary parts of complex numbers, whose elements they are."""

    name: str
    dtype: torch.dtype
    strides: tuple[int, ...]
    tensor: Any
    start: int = 0
    part: int | None = None


@dataclass(frozen=True)
class Store:
    """A value put into an output at each point, or for a reduction at each point of the other
    axes.

    With ``blocks`` it is added up over each block of the outer axes, see :mod:`.blocks`, and the
    output has an element for each block. With ``shift`` it is added to the element so much further
    in an output of ``size`` elements, which are 0 before."""

    access: int
    value: Expr
    blocks: bool = False
    shift: Expr | None = None
    size: int = 0

    @property
    def needs(self) -> list[Expr]:
        return [self.value] if self.shift is None else [self.value, self.shift]


@dataclass(frozen=True)
class Requirement:
    """A condition for running a kernel: ``low <= element < high`` in the window (shape, strides,
    start) of a tensor. ``error`` turns an element outside into the error to raise."""

    tensor: Any
    window: tuple[tuple[int, ...], tuple[int, ...], int]
    low: int
    high: int
    error: Callable[[int], Exception]


@dataclass(frozen=True)
class Kernel:
    """Loops over axes of these extents, outermost first, the last ``reduced`` of them bound by its
    reductions. ``vector`` is the axis of which several points are computed at once; ``cross`` is
    one that runs in blocks beside it, because some memory is contiguous along it."""

    name: str
    extents: tuple[int, ...]
    reduced: int
    accesses: tuple[Access, ...]
    stores: tuple[Store, ...]
    ramps: tuple[Ramp, ...] = ()
    vector: int = -1
    cross: int = -1
    checks: tuple[Requirement, ...] = ()
    comments: tuple[str, ...] = ()
    axes_of: dict[Expr, frozenset[int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def values(self) -> list[Expr]:
        """Return the stored values, and the computed places of stores."""
        return [e for s in self.stores for e in s.needs]

    @property
    def blocks(self) -> bool:
        """Return whether rows run in blocks, over which values are added up."""
        return any([s.blocks for s in self.stores])

    @property
    def scatters(self) -> list[Store]:
        """Return the stores that add values at computed indices."""
        return [s for s in self.stores if s.shift is not None]

    @property
    def outer(self) -> int:
        """Return the number of axes that are not reduced."""
        return len(self.extents) - self.reduced

    def axes(self, e: Expr) -> frozenset[int]:
        """Return the axes along which a value varies."""
        found = self.axes_of.get(e)
        if found is None:
            found = frozenset().union(*[self.axes(a) for a in e.args])
            if isinstance(e, Load | Position):
                walked = self.accesses[e.access] if isinstance(e, Load) else self.ramps[e.ramp]
                found |= {k for k, s in enumerate(walked.strides) if s}
            elif isinstance(e, Reduce):  # made at each point of the other axes, also if it is
                found = frozenset(range(self.outer))  # the same there
            elif isinstance(e, Prefix):
                found = frozenset(range(len(self.extents)))
            self.axes_of[e] = found
        return found

    def __str__(self) -> str:
        return kernel_text(self)


def walk(roots: Sequence[Expr]) -> Iterator[Expr]:
    """Yield every expression below these once, arguments first."""
    seen: set[Expr] = set()
    stack = [(e, False) for e in reversed(roots)]
    while stack:
        e, ready = stack.pop()
        if e in seen:
            continue
        if ready:
            seen.add(e)
            yield e
        else:
            stack.append((e, True))
            stack += [(a, False) for a in reversed(e.args)]


def value_names(kernel: Kernel) -> dict[Expr, str]:
    """Return a name for each value but numbers, ``v0``, ``v1``, …, as they are computed."""
    values = [e for e in walk(kernel.values) if not isinstance(e, Const)]
    return {e: f"v{i}" for i, e in enumerate(values)}


def kernel_text(kernel: Kernel) -> str:
    """Return the kernel as text: a line for each value and store."""
    axes = [f"i{k}" for k in range(len(kernel.extents))]
    names = value_names(kernel)

    def place(walked: Access | Ramp, shift: str = "") -> str:
        steps = [
            axis if s == 1 else f"{s}*{axis}"
            for axis, s in zip(axes, walked.strides, strict=True)
            if s
        ]
        return (
            " + ".join(
                [*steps, *[str(walked.start)] * (walked.start != 0), *[shift] * bool(shift)]
            )
            or "0"
        )

    def word(e: Expr) -> str:
        return repr(e.value) if isinstance(e, Const) else names[e]

    def text(e: Expr) -> str:
        if isinstance(e, Load):
            access = kernel.accesses[e.access]
            where = place(access, word(e.shift) if e.shift else "")
            return f"{access.name}[{where}]" + (f" if {word(e.mask)}" if e.mask else "")
        if isinstance(e, Position):
            return place(kernel.ramps[e.ramp])
        if isinstance(e, Cast):
            return f"{short(e.dtype)}({word(e.value)})"
        if isinstance(e, Accumulated):
            over = f"..{axes[-1]}" if isinstance(e, Prefix) else ", ".join(axes[kernel.outer :])
            return f"{e.fn}[{over}]({word(e.value)})"
        assert isinstance(e, Apply)
        return f"{e.fn}({', '.join([word(a) for a in e.args])})"

    ranges = [f"{a}<{n}" for a, n in zip(axes, kernel.extents, strict=True)]
    lines = [f"{kernel.name}: for {', '.join(ranges) or 'one point'}"]
    lines += [f"  {name}: {short(e.dtype)} = {text(e)}" for e, name in names.items()]
    for s in kernel.stores:
        access = kernel.accesses[s.access]
        where = place(access, word(s.shift) if s.shift else "")
        sign = "+=" if s.blocks or s.shift else "="
        lines.append(f"  {access.name}[{where}] {sign} {word(s.value)}")
    return "\n".join(lines)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

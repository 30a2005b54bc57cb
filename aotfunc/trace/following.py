"""Follow Python numbers from the arguments of a capture into its ops, so that one program serves
other numbers.

Each is replaced by a :class:`Number`, which computes as Python does and remembers how, as an
:class:`Expression`. An op that takes it gets the expression's value as an input of the program.
Any other use (a comparison, a text, a shape, ``math.sqrt``) asks for its value, and the expression
notes that it was ``asked``. PyTorch takes a ``SymFloat`` wherever it takes a number, and passes it
to the recording or asks it.
"""

from __future__ import annotations

import dis
import gc
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import SymFloat, SymInt, Tensor

from .scalars import TENSOR, generic
from .traced import quiet

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_UNARY = ("neg", "pos", "abs")
_BINARY_OP = dis.opmap["BINARY_OP"]
LOW = (torch.float16, torch.bfloat16)


class Expression:
    """A value: an operator with operands, the place of a followed number, or a constant."""

    def __init__(self, home: Following, place: int, value: float) -> None:
        self.home, self.place, self.value = home, place, value
        self.asked = False  # whether the recording depends on its value
        self.literal = False  # whether this program holds it as a literal
        self.tensor: Tensor | None = None

    def ask(self) -> Any:
        self.asked = True
        return self.value

    def input(self) -> Tensor:
        """Return the tensor that is this value's input of recordings, made on first use."""
        if self.tensor is None:
            (self.tensor,) = as_inputs([self.value])
            self.home.inputs.append(self)
        return self.tensor


def as_inputs(values: Sequence[float]) -> list[Tensor]:
    with quiet():
        return [torch.tensor(x, dtype=TENSOR.dtype, device=TENSOR.device) for x in values]


class Origin(NamedTuple):
    """The origin of an expression: ``op`` of the values at ``parts``; without an op, the number
    followed at place ``parts``, or the constant in it."""

    op: Callable | None
    parts: Any


class Following:
    """The numbers that one capture follows, by their place among those of the call. ``places`` are
    the arguments' leaves that hold them. A compiler that ``rounds`` inputs to the precision of
    other operands gets numbers as literals in low precision."""

    def __init__(self, values: dict[int, float], places: Sequence[int], rounds: bool) -> None:
        self.places, self.rounds = places, rounds
        self.steps: list[Origin] = []
        self.known: dict[Any, Expression] = {}
        self.inputs: list[Expression] = []
        self.made: list[weakref.ref] = []
        self.leaves = {i: self.expression(("given", i), x, i) for i, x in values.items()}

    def among(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves of the arguments for the capture."""
        new = list(leaves)
        for i, e in self.leaves.items():
            new[self.places[i]] = standing_for(e)
        return new

    def expression(self, key: tuple, value: float, parts: Any, op: Any = None) -> Expression:
        if key not in self.known:
            self.known[key] = Expression(self, len(self.steps), value)
            self.steps.append(Origin(op, parts))
        return self.known[key]

    def part(self, x: Any) -> Expression:
        if type(x) in KINDS.values():
            return x.expression
        return self.expression((type(x), repr(x)), x, (x,))

    def ask(self) -> None:
        """Make the recording depend on all followed numbers."""
        for e in self.leaves.values():
            e.ask()

    def asked(self) -> set[int]:
        """Return the places of the numbers whose values the function asked for."""
        return self.behind([e for e in self.known.values() if e.asked])

    def free(self) -> set[int]:
        """Return the places of numbers on whose values the recording does not depend."""
        fixed = self.behind([e for e in self.known.values() if e.asked or e.literal])
        return {*self.leaves} - fixed

    def behind(self, found: Sequence[Expression]) -> set[int]:
        """Return the places of the followed numbers that ``found`` expressions come from."""
        reached = {e.place for e in found}
        for place, (op, parts) in reversed([*enumerate(self.steps)]):
            if op is not None and place in reached:
                reached.update(parts)
        return {i for i, e in self.leaves.items() if e.place in reached}

    def escaped(self) -> bool:
        """Return whether a number outlives the capture: ``f`` returned it or stored it."""
        if any(ref() is not None for ref in self.made):
            gc.collect()
        kept = [x for ref in self.made if (x := ref()) is not None]
        for x in kept:
            object.__dict__["__class__"].__set__(x, _KEPT[type(x.expression.value)])
        return bool(kept)


class Node:
    """The attributes that PyTorch reads of a SymFloat's or SymInt's node."""

    def __init__(self, expression: Expression) -> None:
        self.expression = expression

    def is_int(self) -> bool:
        return type(self.expression.value) is int

    def is_float(self) -> bool:
        return type(self.expression.value) is float

    def is_bool(self) -> bool:
        return False

    def guard_float(self, file: str, line: int) -> float:
        return float(self.expression.ask())

    def guard_int(self, file: str, line: int) -> int:
        return int(self.expression.ask())

    def maybe_as_int(self) -> None:
        """Return None: the number is no constant."""


class Number:
    """The stand-in for a number during a capture."""

    def __init__(self, expression: Expression) -> None:
        self.node, self.expression = Node(expression), expression
        expression.home.made.append(weakref.ref(self))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.expression.value)

    def __hash__(self) -> int:
        raise TypeError("it would be kept by its value")

    __array_ufunc__ = None  # NumPy then leaves operators to the number

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.expression.ask(), dtype)

    def __reduce__(self) -> tuple:
        return type(self.expression.value), (self.expression.ask(),)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return self.__reduce__()

    def __copy__(self, memo: Any = None) -> Any:
        return self

    __deepcopy__ = __copy__


def as_number(x: Any) -> Any:
    """Return the number that a stand-in stands for."""
    return x.expression.ask() if type(x) in KINDS.values() else x


def asking(name: str) -> Callable:
    def method(self: Number, *args: Any) -> Any:
        return getattr(self.expression.ask(), name)(*map(as_number, args))

    return method


def computing(name: str, reflected: bool) -> Callable:
    op = getattr(operator, name)

    def method(self: Number, other: Any, *more: Any) -> Any:
        if isinstance(other, Tensor):
            return NotImplemented  # the tensor's operator takes a SymFloat
        left, right = (other, self) if reflected else (self, other)
        number = type(other) in KINDS or type(other) in KINDS.values()
        # sum() adds more precisely than `+`, so its additions are not followed
        if number and not more and (name != "add" or by_operator(sys._getframe(1))):
            return operator_result(self.expression.home, op, (left, right))
        return (pow if name == "pow" else op)(
            as_number(left), as_number(right), *map(as_number, more)
        )

    return method


def by_operator(frame: Any) -> bool:
    """Return whether the frame executes a ``+``, not a call of a function that adds."""
    return frame.f_code.co_code[frame.f_lasti] == _BINARY_OP


def computing_alone(name: str) -> Callable:
    op = getattr(operator, name)
    return lambda self: operator_result(self.expression.home, op, (self,))


def operator_result(home: Following, op: Callable, operands: tuple) -> Any:
    parts = [*map(home.part, operands)]
    value, places = op(*[p.value for p in parts]), tuple([p.place for p in parts])
    if type(value) not in KINDS:  # complex
        return op(*map(as_number, operands))
    return standing_for(home.expression((op, *places), value, places, op))


def methods_of(cls: type) -> dict[str, Callable]:
    """Return the methods of stand-ins for numbers of a class."""
    own = {*dir(object), "__getnewargs__", "__getformat__"} - {"__str__", "__repr__", "__format__"}
    methods = {n: asking(n) for n in dir(cls) if n not in own and callable(getattr(cls, n))}
    for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
        methods[name] = comparing(name)
    for name in _BINARY:
        methods |= {f"__{name}__": computing(name, False), f"__r{name}__": computing(name, True)}
    return methods | {f"__{name}__": computing_alone(name) for name in _UNARY}


def comparing(name: str) -> Callable:
    ask = asking(name)
    return lambda self, other: NotImplemented if isinstance(other, Tensor) else ask(self, other)


def kinds(bases: dict[type, tuple]) -> dict[type, type[Number]]:
    return {cls: type("Number", (Number, *of), methods_of(cls)) for cls, of in bases.items()}


#: the stand-ins for numbers of each class during a capture; after it, the plain ones for numbers
#: that were stored, since PyTorch makes a tensor without a value of a SymFloat
KINDS = kinds({float: (SymFloat,), int: (SymInt,)})
_KEPT = kinds({float: (), int: ()})


def standing_for(expression: Expression) -> Number:
    return KINDS[type(expression.value)](expression)


# ----- among the arguments of ops ----------------------------------------------------------------


def expressions_in(x: Any) -> Iterator[Expression]:
    """Return the expressions of the numbers among an op's arguments."""
    if (found := expression_of(x)) is not None:
        yield found
    elif type(x) in (tuple, list):
        for e in x:
            yield from expressions_in(e)
    elif type(x) is dict:
        yield from expressions_in([*x.values()])


def expression_of(x: Any) -> Expression | None:
    kind = type(x)
    if kind in KINDS.values():
        return x.expression
    if kind in (SymFloat, SymInt) and type(x.node) is Node:
        return x.node.expression
    number = getattr(x, "_wrapped_number", None) if kind is Tensor else None
    return None if number is None else expression_of(number)


def with_values(x: Any) -> Any:
    """Return an op's arguments with plain numbers."""
    if (found := expression_of(x)) is not None:
        return found.value
    if type(x) in (tuple, list):
        return type(x)(map(with_values, x))
    return {k: with_values(v) for k, v in x.items()} if type(x) is dict else x


# ----- for other numbers -------------------------------------------------------------------------


class Recipe:
    """The inputs of a program as expressions of followed numbers."""

    def __init__(self, following: Following, among: Sequence[Tensor]) -> None:
        self.steps = following.steps
        at = {id(t): i for i, t in enumerate(among)}
        used = [e for e in following.inputs if id(e.tensor) in at]
        self.inputs = [(at[id(e.tensor)], e.place, type(e.value)) for e in used]

    def inputs_for(self, values: Sequence[float]) -> list[tuple[int, Tensor]] | None:
        """Return the inputs for these numbers, each with its position among the closed-over
        tensors; None where they would have led to another program."""
        found: list[Any] = []
        try:
            for op, parts in self.steps:
                if op is not None:
                    found.append(op(*[found[i] for i in parts]))
                else:
                    found.append(values[parts] if type(parts) is int else parts[0])
        except ArithmeticError:
            return None
        if not all(type(found[p]) is cls and generic(found[p]) for _, p, cls in self.inputs):
            return None
        tensors = as_inputs([found[p] for _, p, _ in self.inputs])
        return [(i, t) for (i, *_), t in zip(self.inputs, tensors, strict=True)]

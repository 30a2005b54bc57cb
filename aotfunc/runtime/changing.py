"""Which Python numbers among the arguments may change without another capture: those that the
code does nothing with but compute with tensors.

A number may be asked in ways that nothing reports: ``math.sqrt(lr)`` reads it in C. So the code of
the function says first which parameters are only ever an operand of ``+ - * /``. In their places
the capture passes a :class:`Number`, which knows of every use; not where the user's own classes
have such operators, which may keep the number or look at its type."""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..capture.captured import Captured
from ..capture.instances import containers
from ..trace.scalars import TENSOR, bits_of, generic
from ..trace.traced import Traced, current, quiet
from ..trace.tracer import Trace
from .guards.keys import AnyNumber, describe_argument, environment_key, first_alike

_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/"}
_COMPREHENSIONS = frozenset({"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"})
#: what reads variables that the code does not name
_SEES = frozenset({"locals", "vars", "dir", "eval", "exec", "inspect", "_getframe"})
_LOADS = (
    *("LOAD_FAST", "LOAD_CONST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_SMALL_INT"),
    *("PUSH_NULL", "KW_NAMES", "NOP", "CACHE", "EXTENDED_ARG"),
)
#: instructions that take the top of the stack, and put one value there
_TAKES = frozenset(
    {"BINARY_OP", "BINARY_SUBSCR", "BINARY_SLICE", "UNARY_NEGATIVE", "LOAD_ATTR", "LOAD_METHOD"}
    | {"PRECALL", "CALL", "CALL_KW", "BUILD_TUPLE", "BUILD_LIST", "BUILD_SLICE"}
)


# ----- what the code does with its parameters ----------------------------------------------------


@functools.lru_cache(1024)
def computed_with(code: types.CodeType) -> frozenset[str]:
    """The parameters that are only ever an operand of ``+ - * /`` in a function's code."""
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return frozenset()
    if not _SEES.isdisjoint(code.co_names):
        return frozenset()
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return frozenset(n for n in named if only_computed_with(code, n))


def only_computed_with(code: types.CodeType, name: str) -> bool:
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        kind, given = step.opname, step.argval
        if isinstance(given, types.CodeType):
            inner = given.co_name in _COMPREHENSIONS and _SEES.isdisjoint(given.co_names)
            if name in given.co_freevars and not (inner and only_computed_with(given, name)):
                return False
        elif kind in ("MAKE_CELL", "LOAD_CLOSURE") or "CONST" in kind or "ATTR" in kind:
            continue
        elif isinstance(given, tuple) and name in given:  # LOAD_FAST_LOAD_FAST
            if not kind.startswith("LOAD_FAST") or given == (name, name):
                return False
            if not operand(steps, i + 1, 2 - given.index(name)):
                return False
        elif given == name and kind not in ("LOAD_GLOBAL", "LOAD_METHOD", "KW_NAMES"):
            if not kind.startswith(("LOAD_FAST", "LOAD_DEREF")) or not operand(steps, i + 1, 1):
                return False
    return True


def operand(steps: list[dis.Instruction], i: int, depth: int) -> bool:
    """Whether the value that is at this depth of the stack before step ``i`` is taken there by one
    of the operators."""
    for step in steps[i:]:
        effect = 0 if step.opname == "KW_NAMES" else dis.stack_effect(step.opcode, step.arg)
        if step.opname == "BINARY_OP" and depth <= 2:
            return step.argrepr in _OPERATORS.values()
        if step.opname in _TAKES:
            if depth <= max(1, 1 - effect) + (step.opname == "PRECALL"):
                return False
        elif not step.opname.startswith(_LOADS):
            return False
        depth += effect
    return False


# ----- during the capture ------------------------------------------------------------------------


class Number:
    """A number during a capture. ``places`` are those that it has among the trace's numbers; it is
    ``asked`` if it is used otherwise than with a traced tensor of this trace."""

    def __init__(self, value: float, trace: Trace) -> None:
        self.value, self.trace = value, trace
        self.places: list[int] = []
        self.asked = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.value.__class__

    __array_ufunc__ = None  # an array lets the number compute

    def computed(self, op: Callable, left: Any, right: Any, other: Any) -> Any:
        """``op(left, right)`` of the number and ``other``."""
        numbers, asked = self.trace.numbers, self.asked
        count, self.asked = len(numbers), True
        result = op(plain(left), plain(right))
        ours = type(other) is Traced and other.tracer is self.trace is current()
        if ours and bits_of(numbers[count:]) == bits_of([self.value]):
            self.places.append(count)
            self.asked = asked
        return result


def plain(x: Any) -> Any:
    if isinstance(x, Number):
        x.asked = True
        return x.value
    return x


def asking(name: str) -> Callable:
    def method(self: Number, *args: Any) -> Any:
        self.asked = True
        return getattr(self.value, name)(*map(plain, args))

    return method


def computing(op: Callable, reflected: bool) -> Callable:
    def method(self: Number, other: Any) -> Any:
        left, right = (other, self) if reflected else (self, other)
        return self.computed(op, left, right, other)

    return method


def kind_of(cls: type) -> type[Number]:
    """The class that stands for numbers of this one."""
    own = dir(object) + ["__getnewargs__"]
    methods = {n: asking(n) for n in dir(cls) if n not in own and callable(getattr(cls, n))}
    methods |= {n: asking(n) for n in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")}
    methods |= {n: asking(n) for n in ("__hash__", "__repr__", "__str__", "__format__")}
    for name in _OPERATORS:
        op = getattr(operator, name)
        methods |= {f"__{name}__": computing(op, False), f"__r{name}__": computing(op, True)}
    return type("Number", (Number,), methods)


KINDS = {cls: kind_of(cls) for cls in (float, int)}


# ----- calls -------------------------------------------------------------------------------------


class Numbers:
    """The numbers of a call that its function only computes with: by the position or the name of
    the argument."""

    def __init__(self, f: Callable, args: tuple, kwargs: dict) -> None:
        self.values: dict[int | str, float] = {}
        self.watching: dict[int | str, Number] = {}
        self.names: tuple[str, ...] = ()
        if isinstance(f, types.FunctionType) and (names := computed_with(f.__code__)):
            code = f.__code__
            self.names = code.co_varnames[: code.co_argcount]
            by_position = [i for i, n in enumerate(self.names) if n in names and i < len(args)]
            by_name = names.intersection(kwargs).difference(
                code.co_varnames[: code.co_posonlyargcount]  # it goes to **kwargs
            )
            given = [(i, args[i]) for i in by_position] + [(n, kwargs[n]) for n in by_name]
            self.values.update((at, x) for at, x in given if type(x) in KINDS and generic(x))

    def __bool__(self) -> bool:
        return bool(self.values)

    def put(self, args: tuple, kwargs: dict, into: Callable[[Any, Any], Any]) -> tuple:
        """The arguments with ``into(where, x)`` for each of the numbers."""
        values = self.values
        return (
            tuple([into(i, x) if i in values else x for i, x in enumerate(args)]),
            {n: into(n, x) if n in values else x for n, x in kwargs.items()},
        )

    def key(self, args: tuple, kwargs: dict) -> tuple:
        """What identifies the calls that differ in these numbers alone."""
        parts: list = []
        tensors: list[Tensor] = []
        given = self.put(args, kwargs, lambda _, x: AnyNumber(type(x).__name__))
        describe_argument(given, parts, tensors, [])
        shared = (first_alike(tensors), first_alike(containers(given)))
        return (AnyNumber, *parts, shared, *environment_key())

    def facts(self) -> dict[str, AnyNumber]:
        """What an entry says of them that serves any."""
        return {
            f"argument {self.names[at] if isinstance(at, int) else at}": AnyNumber(
                type(x).__name__
            )
            for at, x in self.values.items()
        }

    def watched(self, args: tuple, kwargs: dict) -> tuple:
        """The arguments for the capture under way."""
        trace = current()
        assert trace is not None
        self.watching = {at: KINDS[type(x)](x, trace) for at, x in self.values.items()}
        return self.put(args, kwargs, lambda at, _: self.watching[at])

    def inputs(self, rec: Captured) -> tuple | None:
        """For each number that is an input of the program which one it is, or the value that it
        always has; None where the capture depends on one of them."""
        if rec.trace.answered or any(n.asked for n in self.watching.values()):
            return None
        owner = {place: at for at, n in self.watching.items() for place in n.places}
        found = []
        for group in rec.numbers:
            owners = {owner.pop(place, None) for place in group}
            if len(owners) > 1:
                return None
            found.append((*owners, rec.trace.numbers[group[0]]))
        return None if owner else tuple(found)

    def tensors(self, inputs: Iterable[tuple[Any, float]]) -> list[Tensor]:
        """The inputs of a program that :meth:`inputs` described, for this call."""
        how = {"dtype": TENSOR.dtype, "device": TENSOR.device}
        with quiet():
            return [torch.tensor(self.values.get(at, x), **how) for at, x in inputs]

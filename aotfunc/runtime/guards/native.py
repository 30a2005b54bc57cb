"""The check of a large state as native code: the lines of the Python check, translated into steps
that ``check.cpp`` takes one by one.

A step calls what Python calls for its line, so both come to the same end. The native check answers
for a state that is the same; the Python check looks at every other one. Lines of unusual forms
stay Python functions between the steps."""

from __future__ import annotations

import ast
import ctypes
import functools
import operator
import sys
import types
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...cache import Cache
from ...errors import CompilerError
from ...native import store
from ...native.build import built
from ...native.fastcall import Unlike, address, check_objects, function

ITEM, ATTRIBUTE, TYPE, CALL, PYTHON = range(5)
SAME, ITEM_SAME, TYPE_SAME, ABSENT, FALSE, ITEM_FALSE, LENGTH = range(5, 12)

_translated = Cache(64)  # by the lines


@functools.cache
def steps_of() -> int | None:
    """Where ``aot_check`` is; None where it cannot be had."""
    try:
        check_objects()
        store.directory()
        source = Path(__file__).with_name("check.cpp").read_text()
        library = ctypes.CDLL(str(built(source)))
        for name, x in (("dict", dict), ("ordered_dict", OrderedDict), ("none", None)):
            ctypes.c_int64.in_dll(library, f"aot_{name}").value = id(x)
        return address(library.aot_check)
    except (CompilerError, OSError, AttributeError, ValueError, Unlike):
        return None


def native_check(
    source: str,
    lines: Sequence[str],
    paths: Sequence[str],
    python: Callable,
    space: dict[str, Any],
) -> Callable | None:
    """The check ``python``, of this source and with the globals ``space``, as a native function;
    None where that is not to be had, or most of it would stay Python."""
    if (at := steps_of()) is None:
        return None
    program = _translated.once(source, lambda: Translation(lines, paths))
    if program.left > len(lines) // 4:
        return None
    constants = tuple([find(space) for find in program.constants])
    data = (program.packed, constants, space["alike"], python)
    return function("check", at, data, __name__)


def has_plain_fields(cls: Any) -> bool:
    """Whether ``x.__dict__`` is what Python keeps there, for ``x`` of this class."""
    found = next((c.__dict__["__dict__"] for c in cls.__mro__ if "__dict__" in c.__dict__), None)
    return (
        isinstance(found, types.GetSetDescriptorType)
        and cls.__getattribute__ is object.__getattribute__
        and not issubclass(cls, type | types.FunctionType | types.ModuleType)
    )


class Other(Exception):
    """A line of another form."""


class Translation:
    """The steps of these lines, which find the tensors ``paths``."""

    def __init__(self, lines: Sequence[str], paths: Sequence[str]) -> None:
        self.registers = {"f": 0, "objects": 1}
        self.count = 2
        self.constants: list[Callable[[dict[str, Any]], Any]] = []  # of the check's globals
        self.places: dict[Any, int] = {}  # of constants
        self.typed: dict[int, str] = {}  # of a register: the constant that is its class
        self.steps: list[tuple[int, int, int, int]] = []
        self.words: list[int] = []  # what the steps of lines that stay Python need
        self.left = 0  # how many lines do
        others: list[tuple[str, ast.stmt]] = []
        done: list[tuple[int, int, int, int]] = []
        for line, statement in zip(lines, ast.parse("\n".join(lines)).body, strict=True):
            count, self.steps = self.count, []
            try:
                self.statement(statement)
            except Other:
                self.count = count
                self.typed = {r: cls for r, cls in self.typed.items() if r < count}
                others.append((line, statement))
                for name in bound(statement):
                    self.registers[name] = self.new()
            else:
                done += [*self.python(others, len(paths)), *self.steps]
                others = []
        done += self.python(others, len(paths))
        tensors = [self.registers[v] for v in paths]
        sizes = array("q", [len(done), self.count, len(tensors)])
        rest = array("i", [*[n for step in done for n in step], *tensors, *self.words])
        self.packed = sizes.tobytes() + rest.tobytes()

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def constant(self, key: Any, find: Callable[[dict[str, Any]], Any]) -> int:
        if key not in self.places:
            self.places[key] = ~len(self.constants)
            self.constants.append(find)
        return self.places[key]

    def text(self, x: str | int) -> int:
        """A constant that is compared by its value, and used as a key."""
        x = sys.intern(x) if isinstance(x, str) else x
        return self.constant((type(x), x), lambda space: x)

    def fields(self, cls: str | None) -> int:
        """How to get the `__dict__` of an object, whose class this constant is."""
        if cls is None:
            return self.text("__dict__")
        find = lambda space: None if has_plain_fields(space[cls]) else "__dict__"
        return self.constant(("fields", cls), find)

    def step(self, op: int, a: int, b: int = 0) -> int:
        to = self.new()
        self.steps.append((op, to, a, b))
        return to

    def statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(name)], value=value):
                self.registers[name] = self.value(value)
            case ast.If(test=ast.BoolOp(ast.Or(), tests), body=[ast.Return(None)]):
                for test in tests:
                    self.require(test)
            case ast.If(test=test, body=[ast.Return(None)]):
                self.require(test)
            case _:
                raise Other

    def value(self, x: ast.expr) -> int:
        """Where the value of this expression is found: in a register, or among the constants."""
        match x:
            case ast.Name(name) if name in self.registers:
                return self.registers[name]
            case ast.Name(name) if name.startswith("k"):
                return self.constant(name, operator.itemgetter(name))
            case ast.Constant(True | False | None as known):
                return self.constant(known, lambda space: known)
            case ast.Subscript(owner, ast.Constant(str() | int() as key)):
                return self.step(ITEM, self.value(owner), self.text(key))
            case ast.Attribute(owner, "__dict__"):
                a = self.value(owner)
                return self.step(ATTRIBUTE, a, self.fields(self.typed.get(a)))
            case ast.Attribute(owner, name):
                return self.step(ATTRIBUTE, self.value(owner), self.text(name))
            case ast.Call(ast.Name("type"), [of], []):
                return self.step(TYPE, self.value(of))
            case ast.Call(called, [], []):
                return self.step(CALL, self.value(called))
        raise Other

    def require(self, test: ast.expr) -> None:
        """That this is false."""
        match test:
            case ast.Compare(
                ast.Subscript(owner, ast.Constant(str() | int() as key)), [ast.IsNot()], [y]
            ):
                to = self.value(y)
                self.steps.append((ITEM_SAME, to, self.value(owner), self.text(key)))
            case ast.Compare(ast.Call(ast.Name("type"), [of], []), [ast.IsNot()], [y]):
                a, b = self.value(of), self.value(y)
                self.steps.append((TYPE_SAME, 0, a, b))
                if isinstance(y, ast.Name) and b < 0 <= a:
                    self.typed[a] = y.id
            case ast.Compare(x, [ast.IsNot()], [y]):
                self.steps.append((SAME, 0, self.value(x), self.value(y)))
            case ast.Compare(ast.Constant(str() as key), [ast.In()], [owner]):
                self.steps.append((ABSENT, 0, self.value(owner), self.text(key)))
            case ast.Compare(
                ast.Call(ast.Name("len"), [of], []), [ast.NotEq()], [ast.Constant(int() as n)]
            ) if n < 2**31:
                self.steps.append((LENGTH, n, self.value(of), 0))
            case ast.Subscript(owner, ast.Constant(str() | int() as key)):
                self.steps.append((ITEM_FALSE, 0, self.value(owner), self.text(key)))
            case ast.Name() | ast.Attribute():
                self.steps.append((FALSE, 0, self.value(test), 0))
            case _:
                raise Other

    def python(self, others: list[tuple[str, ast.stmt]], tensors: int) -> list:
        """The step that lets Python do these lines."""
        if not others:
            return []
        self.left += len(others)
        made = [name for _, statement in others for name in bound(statement)]
        names = {n.id for _, s in others for n in ast.walk(s) if isinstance(n, ast.Name)}
        given = sorted((names & self.registers.keys()) - {*made})
        body = "".join(f"    {line}\n" for line, _ in others)
        result = f"({', '.join(made)}{',' * (len(made) == 1)})"
        text = f"def part({', '.join(given)}):\n{body}    return {result}\n"
        space: dict[str, Any] = {}
        exec(compile(text, "<check>", "exec"), space)
        code = space["part"].__code__
        k = self.constant(text, lambda space: types.FunctionType(code, space))
        where = tensors + len(self.words)
        self.words += [len(given), len(made), *[self.registers[v] for v in given]]
        return [(PYTHON, where, k, self.registers[made[0]] if made else 0)]


def bound(statement: ast.stmt) -> list[str]:
    """The variables that are bound here."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]

"""The check of a large state as native code: the lines of the Python check, translated into steps
that ``check.cpp`` takes one by one.

A step calls what Python calls for its line, so both come to the same end. The native check answers
for a state that is the same; the Python check looks at every other one. Lines of unusual forms
stay Python functions between the steps."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import re
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
from ...native.fastcall import Unlike, address, check_objects, python_function

ITEM, ATTRIBUTE, TYPE, CALL, PYTHON = range(5)
SAME, ITEM_SAME, TYPE_SAME, ABSENT, FALSE, ITEM_FALSE, LENGTH = range(5, 12)

_translated = Cache(64)  # by the lines


@functools.cache
def steps_of() -> int | None:
    """Load ``aot_check``; None where it cannot be had."""
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
    """Return the check ``python``, of this source and with the globals ``space``, as a native
    function; None where that is not to be had, or most of it would stay Python."""
    if (at := steps_of()) is None:
        return None
    program = _translated.once(source, lambda: Translation(lines, paths))
    if program.left > len(lines) // 4:
        return None
    constants = tuple([find(space) for find in program.constants])
    data = (program.packed, constants, space["alike"], python)
    return python_function("check", at, data, __name__)


def has_plain_fields(cls: Any) -> bool:
    """Return whether ``x.__dict__`` is what Python keeps there, for ``x`` of this class."""
    found = next((c.__dict__["__dict__"] for c in cls.__mro__ if "__dict__" in c.__dict__), None)
    return (
        isinstance(found, types.GetSetDescriptorType)
        and cls.__getattribute__ is object.__getattribute__
        and not issubclass(cls, type | types.FunctionType | types.ModuleType)
    )


class Other(Exception):
    """Raised for a line whose form has no native step."""


#: the steps of a line to an object: a variable, then keys, attributes and calls
STEP = r"\['(?P<key>[^'\\]*)'\]|\[(?P<number>\d+)\]|\.(?P<name>\w+)|\(\)"
PLACE = rf"\w+(?:{re.sub('P<[a-z]+>', ':', STEP)})*"
OBJECT = rf"type\({PLACE}\)|{PLACE}"
BINDING = re.compile(rf"(\w+) = ({OBJECT})")
#: the condition that must be false
TEST = re.compile(
    rf"(?:'(?P<key>[^'\\]*)' in (?P<owner>{PLACE})|len\((?P<counted>{PLACE})\) != (?P<n>\d+)|"
    rf"(?P<x>{OBJECT})(?: is not (?P<y>{OBJECT}))?)(?: or |$)"
)
KNOWN = {"None": None, "True": True, "False": False}


@functools.lru_cache(4096)
def steps_in(path: str) -> list[tuple[int, Any]]:
    """List the steps to an object: ``(ITEM, key)``, ``(ATTRIBUTE, name)``, ``(CALL, None)``."""
    found: list[tuple[int, Any]] = []
    for key, number, name in map(re.Match.groups, re.finditer(STEP, path)):
        if name is not None:
            found.append((ATTRIBUTE, name))
        elif key is not None or number is not None:
            found.append((ITEM, key if number is None else int(number)))
        else:
            found.append((CALL, None))
    return found


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
        others: list[str] = []
        for line in lines:
            count, size = self.count, len(self.steps)
            try:
                self.translate(line)
            except Other:
                self.count = count
                del self.steps[size:]
                others.append(line)
                for name in bound(line):
                    self.registers[name] = self.new()
            else:
                if others:
                    self.steps[size:size] = [self.python(others, len(paths))]
                    others = []
        if others:
            self.steps.append(self.python(others, len(paths)))
        tensors = [self.registers[v] for v in paths]
        sizes = array("q", [len(self.steps), self.count, len(tensors)])
        rest = array("i", [*itertools.chain.from_iterable(self.steps), *tensors, *self.words])
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
        """Return a constant that is compared by its value, and used as a key."""
        x = sys.intern(x) if isinstance(x, str) else x
        return self.constant((type(x), x), lambda space: x)

    def fields(self, cls: str | None) -> int:
        """Return how to get the `__dict__` of an object, whose class this constant is."""
        if cls is None:
            return self.text("__dict__")
        find = lambda space: None if has_plain_fields(space[cls]) else "__dict__"
        return self.constant(("fields", cls), find)

    def step(self, op: int, a: int, b: int = 0) -> int:
        to = self.new()
        self.steps.append((op, to, a, b))
        return to

    def translate(self, line: str) -> None:
        if m := BINDING.fullmatch(line):
            self.registers[m[1]] = self.value(m[2])
            return
        tests, at = line.removeprefix("if ").removesuffix(": return"), 0
        while at < len(tests):
            if (m := TEST.match(tests, at)) is None:
                raise Other
            self.require(m)
            at = m.end()

    def value(self, place: str) -> int:
        """Return the place of the object: in a register, or among the constants."""
        if (known := self.registers.get(place)) is not None:
            return known
        if place.startswith("type("):
            return self.step(TYPE, self.value(place[5:-1]))
        name = re.match(r"\w+", place)[0]  # type: ignore[index]
        return self.after(self.variable(name), steps_in(place[len(name) :]))

    def variable(self, name: str) -> int:
        if (known := self.registers.get(name)) is not None:
            return known
        if name in KNOWN:
            return self.constant(KNOWN[name], lambda space: KNOWN[name])
        if name.startswith("k"):
            return self.constant(name, operator.itemgetter(name))
        raise Other

    def after(self, a: int, steps: list[tuple[int, Any]]) -> int:
        """Return the place that these steps lead to from ``a``."""
        for op, key in steps:
            if op == CALL:
                a = self.step(CALL, a)
            elif key == "__dict__" and op == ATTRIBUTE:
                a = self.step(op, a, self.fields(self.typed.get(a)))
            else:
                a = self.step(op, a, self.text(key))
        return a

    def require(self, test: re.Match) -> None:
        """Require that the condition is false."""
        key, owner, counted, n, x, y = test.groups()
        if key is not None:
            self.steps.append((ABSENT, 0, self.value(owner), self.text(key)))
        elif counted is not None:
            if int(n) >= 2**31:
                raise Other
            self.steps.append((LENGTH, int(n), self.value(counted), 0))
        elif x.startswith("type(") and y is not None:
            a, b = self.value(x[5:-1]), self.value(y)
            self.steps.append((TYPE_SAME, 0, a, b))
            if b < 0 <= a:
                self.typed[a] = y
        else:
            to = 0 if y is None else self.value(y)
            place, bracket, last = x.rpartition("[")
            if bracket and x.endswith("]"):
                [(_, key)] = steps_in(f"[{last}")
                op = ITEM_FALSE if y is None else ITEM_SAME
                self.steps.append((op, to, self.value(place), self.text(key)))
            elif y is None:
                self.steps.append((FALSE, 0, self.value(x), 0))
            else:
                self.steps.append((SAME, 0, self.value(x), to))

    def python(self, others: list[str], tensors: int) -> tuple[int, int, int, int]:
        """Return the step that lets Python do these lines."""
        self.left += len(others)
        made = [name for line in others for name in bound(line)]
        names = set(re.findall(r"\w+", " ".join(others)))
        given = sorted((names & self.registers.keys()) - {*made})
        body = "".join(f"    {line}\n" for line in others)
        result = f"({', '.join(made)}{',' * (len(made) == 1)})"
        text = f"def part({', '.join(given)}):\n{body}    return {result}\n"
        space: dict[str, Any] = {}
        exec(compile(text, "<check>", "exec"), space)
        code = space["part"].__code__
        k = self.constant(text, lambda space: types.FunctionType(code, space))
        where = tensors + len(self.words)
        self.words += [len(given), len(made), *[self.registers[v] for v in given]]
        return (PYTHON, where, k, self.registers[made[0]] if made else 0)


def bound(line: str) -> list[str]:
    """Return the variables that are bound here."""
    binds = not line.startswith(("if ", "return"))
    return re.findall(r"\w+", line.partition(" = ")[0]) if binds else []

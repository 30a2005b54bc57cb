"""Find the globals, closure variables and attributes that the code of a function reads."""

from __future__ import annotations

import dis
import functools
import itertools
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy

from ...cache import remembered
from ...debug import _OURS, _TORCH

_STDLIB = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_NUMPY = os.path.dirname(os.path.abspath(numpy.__file__)) + os.sep

#: calls of these change a container, and their results say nothing about it
_GROWS = frozenset({"append", "add", "extend", "update"})
#: functions that read attributes by names that the code does not hold
_BY_ANY_NAME = frozenset(
    {"vars", "__dict__", "attrgetter", "methodcaller", "asdict", "astuple", "eval", "exec"}
)
_EVALUATE = frozenset({"eval", "exec"})
_ASKS = frozenset({"getattr", "hasattr"})
_IMPORTS = frozenset({"import_module", "__import__"})
#: functions that make a text of an object, and the methods that they call
_TELLS = frozenset({"str", "repr", "format", "ascii"})
_TEXTS = frozenset({"__str__", "__repr__", "__format__"})


class Reads(NamedTuple):
    """``variables`` are globals and closure variables; ``written`` are names of either kind, or of
    attributes, that occur only in ``n += 1`` and ``names.append(x)``. With ``any_name`` attributes
    are read by names made at run time."""

    variables: frozenset[str]
    attributes: frozenset[str]
    written: frozenset[str]
    imports: frozenset[str]
    any_name: bool
    binds_globals: bool


@remembered(4096)
def reads_of(code: types.CodeType) -> Reads:
    """Find the names that a code object, and the functions defined in it, read."""
    variables: set[str] = set()
    attributes: set[str] = set()
    written: set[str] = set()
    imports: set[str] = set()
    any_name = binds_globals = False
    steps = instructions_of(code)
    for i, step in enumerate(steps):
        kind, name = step.opname, step.argval
        if kind.startswith(
            ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR")
        ):
            (written if _changes_only(steps, i) else variables).add(name)
            if name in _BY_ANY_NAME or (name in _ASKS and not _constant_name(steps, i + 1)):
                any_name = True
        elif kind.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM")):
            (written if _changes_only(steps, i) else attributes).add(name)
            any_name = any_name or name in _BY_ANY_NAME
        elif kind == "IMPORT_NAME":
            imports.add(name)
        elif kind == "STORE_GLOBAL":
            binds_globals = True
        elif kind.startswith("FORMAT") and not _raised(steps, i):
            attributes |= _TEXTS
    texts = {c for c in code.co_consts if isinstance(c, str)}
    if "globals" in variables:
        variables |= texts
        binds_globals = True
    if _IMPORTS & (variables | attributes) or (
        "modules" in variables | attributes and "sys" in variables | imports
    ):  # sys.modules["settings"], sys.modules[__name__]
        imports |= texts | ({"__name__"} & variables)
    if _TELLS & (variables | attributes):
        attributes |= _TEXTS
    evaluated = [*compiled_texts(texts)] if _EVALUATE & variables else []
    for const in (*code.co_consts, *evaluated):
        if isinstance(const, types.CodeType):
            inner = reads_of(const)
            variables |= inner.variables
            attributes |= inner.attributes
            written |= inner.written
            imports |= inner.imports
            any_name = any_name or inner.any_name
            binds_globals = binds_globals or inner.binds_globals
        else:  # getattr(x, "name"), case Point(x=0), get_submodule("layers.0")
            for text in const if isinstance(const, tuple) else (const,):
                if isinstance(text, str):
                    attributes.update(part for part in text.split(".") if part.isidentifier())
    return Reads(
        frozenset(variables),
        frozenset(attributes),
        frozenset(written - variables - attributes),
        frozenset(imports),
        any_name,
        binds_globals,
    )


class Operation(NamedTuple):
    """An instruction and the name or constant that it is about, if any."""

    opname: str
    argval: Any


def instructions_of(code: types.CodeType) -> list[Operation]:
    """Return a code object's instructions, those for two locals (Python 3.13) as two. (`dis` takes
    eight times as long: it also finds lines, jumps and texts.)"""
    local = (*code.co_varnames, *(n for n in code.co_cellvars if n not in code.co_varnames))
    tables = {_NAMES: code.co_names, _LOCALS: local + code.co_freevars, _CONSTS: code.co_consts}
    steps: list[Operation] = []
    above, raw = 0, code.co_code
    for op, low in zip(raw[::2], raw[1::2], strict=True):
        arg = above | low
        name, table, flags = _OPERATIONS[op]
        above = arg << 8 if table == _EXTENDED else 0
        if table == _TWO:
            parts = zip(re.findall("(?:LOAD|STORE)_FAST", name), (arg >> 4, arg & 15), strict=True)
            steps += [Operation(part, tables[_LOCALS][at]) for part, at in parts]
        elif table < _EXTENDED:
            steps.append(Operation(name, tables[table][arg >> flags] if table else None))
    return steps


_NOTHING, _NAMES, _LOCALS, _CONSTS, _TWO, _EXTENDED, _LEFT_OUT = range(7)


def _operation(op: int) -> tuple[str, int, int]:
    """Return an instruction's name, which table its argument is a place in, and how many of the
    argument's bits say something else."""
    name = dis.opname[op]
    if name == "EXTENDED_ARG":
        return name, _EXTENDED, 0
    if name in ("PUSH_NULL", "CACHE"):
        return name, _LEFT_OUT, 0
    if name.count("_FAST") == 2:
        return name, _TWO, 0
    if op in dis.hasname:
        own_flag = ("LOAD_GLOBAL", "LOAD_ATTR")[: 1 + (sys.version_info >= (3, 12))]
        return name, _NAMES, 2 if name == "LOAD_SUPER_ATTR" else int(name in own_flag)
    lists = ((_LOCALS, {*dis.haslocal, *dis.hasfree}), (_CONSTS, {*dis.hasconst}))
    return name, next((table for table, ops in lists if op in ops), _NOTHING), 0


_OPERATIONS = [*map(_operation, range(256))]


def compiled_texts(texts: Iterable[str]) -> Iterator[types.CodeType]:
    """Yield the code of the texts that are Python."""
    for text in texts:
        with suppress(SyntaxError, ValueError):
            yield compile(text, "<text>", "exec")


@remembered(4096)
def tells_apart(code: types.CodeType) -> bool:
    """Return whether a function calls ``type``, or goes on after errors."""
    kinds = [step.opname for step in instructions_of(code)]
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return (
        not {"type", "suppress"}.isdisjoint(code.co_names)
        or any("EXC_MATCH" in k for k in kinds)  # except Error:
        or ("PUSH_EXC_INFO", "POP_TOP") in itertools.pairwise(kinds)  # except:
        or any(map(tells_apart, inner))
    )


def _changes_only(steps: list[Operation], i: int) -> bool:
    """Return whether the load is for a change alone: ``n += 1``, ``names.append(x)``."""
    name, rest = steps[i].argval, [s.opname for s in steps[i + 1 : i + 5]]
    if rest[:1] and rest[0] in ("LOAD_METHOD", "LOAD_ATTR") and steps[i + 1].argval in _GROWS:
        return True
    if rest[1:3] == ["COPY", "COPY"]:  # counts[k] += 1
        return True
    if steps[i].opname == "LOAD_ATTR":
        return i > 0 and steps[i - 1].opname == "COPY"
    return (
        rest[1:3] == ["BINARY_OP", steps[i].opname.replace("LOAD", "STORE")]
        and steps[i + 3].argval == name
    )


def _raised(steps: list[Operation], i: int) -> bool:
    """Return whether the text that is made here is the message of an error."""
    makes = ("FORMAT", "BUILD_STRING", "CONVERT", "LOAD", "CALL", "PRECALL", "BINARY")
    return (
        next((s.opname for s in steps[i:] if not s.opname.startswith(makes)), "")
        == "RAISE_VARARGS"
    )


def _constant_name(steps: list[Operation], i: int) -> bool:
    """Return whether the second argument of the call whose arguments begin here is a constant."""
    i += 1
    while steps[i].opname == "LOAD_ATTR":
        i += 1
    call = next(
        (k for k in range(i, len(steps)) if steps[k].opname.startswith(("CALL", "PRECALL"))), i
    )
    made = any(
        s.opname.startswith(("FORMAT", "BUILD", "BINARY", "CONVERT")) for s in steps[i:call]
    )
    return steps[i].opname == "LOAD_CONST" and not made


#: their code is not followed: its reads are known, or hidden
CLOSED = frozenset({"python", "torch", "numpy", "aotfunc"})


@functools.lru_cache(4096)
def library_of(filename: str) -> str | None:
    """Return the library that a file belongs to, or None for a file of the user's."""
    for name, folder in (
        ("aotfunc", _OURS),
        ("torch", _TORCH),
        ("numpy", _NUMPY),
        ("python", "<frozen"),
    ):
        if filename.startswith(folder):
            return name
    _, installed, path = filename.partition(f"-packages{os.sep}")
    if installed:
        return path.partition(os.sep)[0].removesuffix(".py")
    return "python" if filename.startswith(_STDLIB) else None


@functools.lru_cache(4096)
def library_of_module(name: str) -> str | None:
    """Return the library that a module, named in full, belongs to."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return "python"
    return library_of(getattr(sys.modules.get(top), "__file__", None) or "")


#: methods of torch's modules that do not compute results
_NO_FORWARD = frozenset(
    {"__init__", "extra_repr", "__repr__", "__setstate__", "__getstate__", "reset_parameters"}
)


class LargeLibrary(Exception):
    """Raised where the functions name too many functions of a library, one another."""


class MoreState(Exception):
    """Raised where a function needs its state described otherwise."""


class Names:
    """The names by which the functions met so far read their state; they only become more.

    Of a library that the function uses every function is followed that another one names. Where
    these are more than ``MANY``, most of them never run (they load files, print, export): then
    those are followed that have ``ran`` while the function was captured."""

    MANY = 300

    def __init__(self, ran: set[Any] | None = None) -> None:
        self.ran = ran
        #: number of functions of large libraries seen to run
        self.learnt = 0
        self.attributes: set[str] = {"forward", "__wrapped__"}
        self.written: set[str] = set()
        self.variables: set[str] = set()
        self.of_torch: set[str] = {"training"}  # what the methods of torch's modules read
        #: libraries whose objects the function uses: their code is the user's
        self.opened: set[str] = set()
        self.any = False
        #: whether the functions read or bind the ``.grad`` of tensors from outside
        self.gradients = False
        #: whether the learning rates of optimizers may be tensors
        self.rates = True
        #: whether the functions could tell a number from its stand-in: they look at types, or go
        #: on after errors
        self.tells_apart = False
        self._entered: set[Any] = set()
        self._named: set[types.CodeType] = set()  # of libraries

    def __len__(self) -> int:
        sets = (self.attributes, self.written, self.of_torch, self.opened)
        return sum(map(len, sets)) + self.any + self.gradients

    def all(self) -> set[str]:
        """Return the names of variables and attributes."""
        return self.variables | self.attributes

    def learn(self, rates: bool, misses_gradients: bool) -> bool:
        """Return whether a capture that failed is to be tried again, with another description:
        with the gradients that it has asked for, or without ``rates`` that are tensors."""
        if misses_gradients and not self.gradients:
            self.gradients = True
        elif rates:
            self.rates = False
        else:
            return False
        return True

    def open(self, library: str | None) -> None:
        if library is not None and library not in CLOSED:
            self.opened.add(library)

    def follows(self, library: str | None, code: types.CodeType | None = None) -> bool:
        """Return whether code of this library is followed."""
        if library is None or library not in self.opened:
            return library is None
        if self.ran is None and code is not None:
            self._named.add(code)
            if len(self._named) > self.MANY:
                raise LargeLibrary
        return code is None or self.ran is None or code in self.ran

    def idle(self, library: str | None, code: types.CodeType) -> bool:
        """Return whether it is known that this function of a library has not run."""
        return library is not None and self.ran is not None and code not in self.ran

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note which functions of large libraries run inside."""
        if self.ran is None:
            yield
            return
        if sys.getprofile() is not None:  # what it would be told is not ours to take
            self.learnt += 1  # not known to be all, so that nothing is kept
            yield
            return
        seen: set[types.CodeType] = set()

        def note(frame: types.FrameType, event: str, _: Any) -> None:
            if event == "call":
                seen.add(frame.f_code)

        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)
            new = seen - self.ran
            self.learnt += sum(library_of(c.co_filename) in self.opened for c in new)
            self.ran |= new

    def enter(self, code: types.CodeType) -> Reads:
        reads = reads_of(code)
        if code not in self._entered:
            self._entered.add(code)
            self.attributes |= reads.attributes
            self.written |= reads.written
            self.variables |= reads.variables
            self.any = self.any or reads.any_name
            self.tells_apart = self.tells_apart or tells_apart(code)
        return reads

    def enter_class(self, cls: type) -> None:
        """Follow a class of torch's that is a module."""
        if cls not in self._entered:
            self._entered.add(cls)
            for name, f in cls.__dict__.items():
                if isinstance(f, types.FunctionType) and name not in _NO_FORWARD:
                    self.of_torch |= reads_of(f.__code__).attributes

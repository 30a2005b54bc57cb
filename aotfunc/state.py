"""The Python state that a function reads: a key for it, and a quick check that it is as it was.

From ``f`` and the objects among its arguments everything is followed that the code can name: closure variables,
globals, defaults, attributes of objects, modules and classes, elements of containers, and from the functions that are
met on the way, in turn. What is found is described by structure, never by address: two modules of one architecture are
the same state with other tensors. Tensors are inputs: the check fetches them by the path on which they were found.
"""

from __future__ import annotations

import argparse
import collections
import contextvars
import dataclasses
import functools
import os
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .guards import Named, bits, is_value, noted, tensor_facts
from .reads import CLOSED, Names, library_of, library_of_module
from .trace.traced import Traced

#: objects in a container that are looked at; of more only their number counts
LIMIT = 10_000

#: what the compiled function itself is called in descriptions, if it is an object
ROOT = "self"

_NOTHING = object()
_GROWING = (list, set, dict, collections.deque)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOW_HOOKS_ARE_CALLED = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)
_TABLES = ("_parameters", "_buffers", "_modules")
_NOT_STATE = frozenset(
    {*_HOOKS, *_HOW_HOOKS_ARE_CALLED, *_TABLES, "_non_persistent_buffers_set", "_state_dict_hooks"}
    | {"_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
)
_GLOBAL_HOOKS = tuple(n for n in vars(nn.modules.module) if n.startswith("_global_") and n.endswith("_hooks"))
#: methods that Python calls without naming them, but not while a function is computed
_NOT_CALLED = frozenset(
    {"__repr__", "__str__", "__format__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__"}
    | {"__deepcopy__", "__del__", "__init_subclass__", "__class_getitem__"}
)
_FUNCTION_RULES = frozenset({"forward", "backward", "setup_context", "vmap", "jvp"})
#: classes of which the instances are what is in them
_RECORDS = (types.SimpleNamespace, argparse.Namespace)
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
#: libraries' classes whose methods compute with their attributes
_READ_THEMSELVES = ("torch.nn.", "torch.distributions.", "torch.optim.", "collections")


class State:
    """What ``f`` and ``objects``, called ``labels``, reach now, by the names in ``names``."""

    def __init__(self, f: Callable, objects: Sequence[Any], labels: Sequence[str], names: Names) -> None:
        self.key: list[Any] = []
        self.tensors: list[Tensor] = []
        self.paths: list[str] = []  # the variables that hold the tensors
        self.facts: list[tuple[str, Any]] = []  # what is guarded, for people
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.opaque: list[Any] = []  # guarded by identity
        #: dictionaries, lists and cells, the variable that holds each, and what was in it
        self.owners: list[tuple[Any, str, dict]] = []
        self.names = names
        self.seen: dict[int, str] = {}
        self.distinct: list[str] = []
        self._kept: list[Any] = []
        self._classes: set[type] = set()
        self._globals: set[tuple[int, str]] = set()
        self._todo: list[tuple[Any, str, str]] = []
        self._static: dict[type, list[str]] = {}
        self._modules = False
        self.meet(f, "f", ROOT)
        for i, (x, label) in enumerate(zip(objects, labels, strict=True)):
            self.meet(x, f"objects[{i}]", label)
        self.finish()
        if self._modules:
            table = vars(nn.modules.module)
            where = self.constant(table)
            self.hooks([(table[n], f"{where}['{n}']", n) for n in _GLOBAL_HOOKS])
            self.finish()
        if len(self.distinct) > 1:
            ids = ", ".join(f"id({v})" for v in self.distinct)
            self.lines.append(f"if len({{{ids}}}) != {len(self.distinct)}: return")

    def finish(self) -> None:
        while self._todo:
            self.visit(*self._todo.pop())

    # ----- the pieces of a check --------------------------------------------------------------------------------------

    def constant(self, x: Any) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = x
        return name

    def require(self, expr: str, x: Any) -> None:
        """That ``expr`` is the object ``x``."""
        known = repr(x) if x is None or x is True or x is False else self.constant(x)
        self.lines.append(f"if {expr} is not {known}: return")

    def bind(self, expr: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expr}")
        return name

    def meet(self, x: Any, expr: str, label: str) -> None:
        """Describe ``x``, which ``expr`` yields, now if it is a plain value, and later otherwise."""
        if is_plain(x):
            self.key += (x.__class__, plain(x))
            self.facts.append((label, x))
            self.require(expr, x)
            return
        known = self.seen.get(id(x))
        if known is not None:
            self.key.append(known)
            self.lines.append(f"if {expr} is not {known}: return")
            return
        v = self.seen[id(x)] = self.bind(expr)
        self._kept.append(x)
        if isinstance(x, Tensor):
            facts = tensor_facts(x)
            self.key.append(facts)
            self.facts.append((label, facts))
            self.tensors.append(x)
            self.paths.append(v)
            if x.__class__ is not Traced and x.__dict__:
                self.attributes(x, self.bind(f"{v}.__dict__"), label, self.wants)
        else:
            self.key.append(v)
            self._todo.append((x, v, label))

    def visit(self, x: Any, v: str, label: str) -> None:
        cls = type(x)
        self.key.append(v)
        if isinstance(x, types.FunctionType):
            self.function(x, v, label)
        elif isinstance(x, types.ModuleType):
            self.python_module(x, v, label)
        elif isinstance(x, type):
            self.same(x, v, label)
            self.class_of(x)
            self.class_of(cls)
        elif isinstance(x, types.MethodType):
            self.key.append(cls)
            self.meet(x.__self__, f"{v}.__self__", "self" if label == ROOT else f"{label}.__self__")
            self.meet(x.__func__, f"{v}.__func__", label)
        elif isinstance(x, functools.partial):
            self.require(f"type({v})", cls)
            for name in ("func", "args", "keywords"):
                self.meet(getattr(x, name), f"{v}.{name}", label if name == "func" else f"{label}.{name}")
        elif isinstance(x, property | staticmethod | classmethod | functools.cached_property):
            self.parts(x, v, label, ("fget", "__func__", "func"))
        elif isinstance(x, list | tuple | collections.deque):
            self.sequence(x, v, label)
        elif isinstance(x, dict | types.MappingProxyType):
            self.dictionary(x, v, label)
        elif isinstance(x, set | frozenset | np.ndarray | slice | bytearray):
            self.content(x, v, label)
        elif isinstance(x, contextvars.ContextVar):
            self.same(x, v, label)
            if (now := x.get(_NOTHING)) is _NOTHING:
                self.lines.append(f"if {v}.get({self.constant(_NOTHING)}) is not {self.constant(_NOTHING)}: return")
            else:
                self.meet(now, f"{v}.get()", label)
        elif isinstance(x, weakref.ref):
            self.key.append(cls)
            self.meet(x(), f"{v}()", label)
        elif isinstance(x, nn.Module) and "_parameters" in x.__dict__:
            self.module(x, v, label)
        elif cls.__module__ == "aotfunc.aot" and cls.__name__ == "Compiled":
            self.key.append(cls)
            self.require(f"type({v})", cls)
            self.meet(x.f, f"{v}.f", label)
        else:
            self.object(x, v, label)

    # ----- functions --------------------------------------------------------------------------------------------------

    def function(self, f: types.FunctionType, v: str, label: str) -> None:
        """Code, defaults, closure variables, and the globals that it names."""
        code = f.__code__
        root = label == ROOT
        label = f.__name__ if root else label
        self.same(code, f"{v}.__code__", label)
        where = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
        self.facts[-1] = (label, Named(f"{f.__qualname__} at {where}", id(code)))
        library = library_of(code.co_filename)
        if root:
            self.names.open(library)
        known = not self.names.follows(library)
        self.meet(f.__defaults__, f"{v}.__defaults__", f"{label}.__defaults__")
        self.meet(f.__kwdefaults__, f"{v}.__kwdefaults__", f"{label}.__kwdefaults__")
        reads = None if known else self.names.enter(code)
        if f.__closure__:
            cells = self.bind(f"{v}.__closure__")
            for i, (name, cell) in enumerate(zip(code.co_freevars, f.__closure__, strict=True)):
                self.key.append(name)
                try:
                    x = cell.cell_contents
                except ValueError:  # not bound yet
                    self.key.append(_NOTHING)
                    self.lines.append(f"if not unbound({cells}[{i}]): return")
                    self.owners.append((cell, f"{cells}[{i}]", {}))
                    continue
                self.owners.append((cell, f"{cells}[{i}]", {"cell_contents": x}))
                if reads is None or name in reads.variables or not (name in reads.written and passing(x)):
                    self.meet(x, f"{cells}[{i}].cell_contents", name if root else f"{label}.{name}")
        if reads is not None:
            scope = f.__globals__
            scoped = ""
            for name in sorted(reads.variables | reads.written):
                if (id(scope), name) not in self._globals:
                    self._globals.add((id(scope), name))
                    scoped = scoped or self.constant(scope)
                    self.key.append(name)
                    x = scope.get(name, _NOTHING)
                    if x is _NOTHING:
                        self.key.append(None)
                        self.lines.append(f"if '{name}' in {scoped}: return")
                    elif name in reads.variables or not passing(x):
                        self.meet(x, f"{scoped}['{name}']", f"{scope.get('__name__')}.{name}")
            for name in sorted(reads.imports):
                if name in sys.modules:
                    self.meet(sys.modules[name], f"{self.constant(sys.modules)}['{name}']", name)
        wrapped = f.__dict__
        if wrapped:
            d = self.bind(f"{v}.__dict__")
            for name, x in wrapped.items():
                if name == "__wrapped__" or (not known and self.wants(name, x)):
                    self.key.append(name)
                    self.meet(x, f"{d}['{name}']", label if name == "__wrapped__" else f"{label}.{name}")

    def python_module(self, m: types.ModuleType, v: str, label: str) -> None:
        """The names that the code may look up in it."""
        self.require(v, m)
        self.key.append(m.__name__)
        d, table = None, vars(m)
        library = not self.names.follows(library_of_module(m.__name__))
        for name in sorted(self.names.attributes | self.names.written):
            x = table.get(name, _NOTHING)
            if x is _NOTHING or not self.wants(name, x):
                continue
            d = d or self.bind(f"{v}.__dict__")
            self.key.append(name)
            if library and not is_plain(x) and not isinstance(x, types.ModuleType):
                self.same(x, f"{d}['{name}']", f"{label}.{name}")
            else:
                self.meet(x, f"{d}['{name}']", f"{label}.{name}")

    # ----- containers -------------------------------------------------------------------------------------------------

    def sequence(self, x: Any, v: str, label: str) -> None:
        self.key += (type(x), len(x))
        self.require(f"type({v})", type(x))
        if isinstance(x, list):
            self.owners.append((x, v, dict(enumerate(x))))
        self.elements(x, v, label)
        self.extra(x, v, label)

    def elements(self, x: Sequence[Any], v: str, label: str) -> None:
        if not all(map(is_plain, x)):
            self.lines.append(f"if len({v}) != {len(x)}: return")
            for i, e in enumerate(x if len(x) <= LIMIT else ()):
                self.meet(e, f"{v}[{i}]", f"{label}[{i}]")
            return
        self.key.append(plain(tuple(x)))
        self.facts.append((label, tuple(x)))
        if len(x) <= 4:
            names = [f"{v}_{i}" for i in range(len(x))]
            self.lines.append(f"[{', '.join(names)}] = {v}")
            for name, e in zip(names, x, strict=True):
                self.require(name, e)
        else:
            k = self.constant(tuple(x))
            self.lines.append(f"if len({v}) != {len(x)} or not all(map(is_, {v}, {k})): return")

    def dictionary(self, x: Any, v: str, label: str) -> None:
        self.key += (type(x), len(x))
        self.lines.append(f"if type({v}) is not {self.constant(type(x))} or len({v}) != {len(x)}: return")
        if isinstance(x, dict):
            self.owners.append((x, v, dict(x)))
        whole = len(x) > LIMIT or (len(x) > 4 and all(map(is_plain, x.values())))
        if not whole and all(type(k) is str for k in x):
            self.key += x
            if len(x) > 1:
                self.lines.append(f"if [*{v}] != {self.constant([*x])}: return")
            for k, e in x.items():
                self.meet(e, f"{v}[{k!r}]", f"{label}[{k!r}]")
        else:
            self.elements([*x], self.bind(f"[*{v}]"), f"{label}.keys()")
            self.elements([*x.values()], self.bind(f"[*{v}.values()]"), f"{label}.values()")
        self.extra(x, v, label)

    def content(self, x: Any, v: str, label: str) -> None:
        """A set or an array, by what is in it."""
        now = content(x)
        self.key.append(now)
        self.facts.append((label, now))
        self.lines.append(f"if content({v}) != {self.constant(now)}: return")

    def extra(self, x: Any, v: str, label: str) -> None:
        """The attributes of a container of the user's own class."""
        if type(x).__module__.partition(".")[0] not in {"builtins", "collections", "torch"}:
            self.class_of(type(x))
            if getattr(x, "__dict__", None):
                self.attributes(x, self.bind(f"{v}.__dict__"), label, self.wants)

    # ----- objects ----------------------------------------------------------------------------------------------------

    def parts(self, x: Any, v: str, label: str, names: Sequence[str]) -> None:
        self.require(f"type({v})", type(x))
        self.key.append(type(x))
        for name in names:
            if hasattr(x, name):
                self.meet(getattr(x, name), f"{v}.{name}", label)

    def same(self, x: Any, expr: str, label: str) -> None:
        """An object that nothing is known of but its identity."""
        self.key.append(id(x))
        self.opaque.append(x)
        self.facts.append((label, noted(x)))
        try:
            weakref.ref(x)
        except TypeError:
            self.require(expr, x)
        else:
            self.lines.append(f"if {expr} is not {self.constant(weakref.ref(x))}(): return")

    def object(self, x: Any, v: str, label: str) -> None:
        cls = type(x)
        library = library_of_module(cls.__module__)
        self.names.open(library)
        whole = any(c.__module__.startswith(_READ_THEMSELVES) for c in cls.__mro__)
        slots = [n for c in cls.__mro__ for n in slots_of(c) if self.names.any or n in self.names.attributes]
        opaque = not whole and library in ("torch", "aotfunc")
        if opaque or (library == "python" and not (slots or hasattr(x, "__dict__"))):
            self.same(x, v, label)
            return
        self.require(f"type({v})", cls)
        self.key.append(id(cls))
        self.opaque.append(cls)
        self.class_of(cls)
        for name in slots:
            self.key.append(name)
            if (e := getattr(x, name, _NOTHING)) is _NOTHING:
                self.lines.append(f"if hasattr({v}, '{name}'): return")
            else:
                self.meet(e, f"{v}.{name}", f"{label}.{name}")
        told = len(slots) + (isinstance(x, _RECORDS) or dataclasses.is_dataclass(x))
        if hasattr(x, "__dict__"):
            d = self.bind(f"{v}.__dict__")
            self.lines.append(f"if len({d}) != {len(x.__dict__)}: return")
            told += self.attributes(x, d, label, (lambda *_: True) if whole else self.wants)
        if told:
            self.distinct.append(v)
        else:  # there is nothing to tell it by but that it is itself
            self.same(x, v, label)

    def attributes(self, x: Any, d: str, label: str, wanted: Callable[[str, Any], bool]) -> int:
        """Those that the code may name; how many there are. ``d`` holds the dictionary of ``x``."""
        table, count = x.__dict__, 0
        self.owners.append((table, d, dict(table)))
        for name, e in table.items():
            if wanted(name, e):
                self.key.append(name)
                self.meet(e, f"{d}[{name!r}]", f"{label}.{name}")
                count += 1
        if hidden := [n for n in self.static(type(x)) if n not in table]:
            self.lines.append(f"if {' or '.join(f'{n!r} in {d}' for n in hidden)}: return")
        return count

    def static(self, cls: type) -> list[str]:
        """The names that instances find in their class, unless they have one of their own."""
        if cls not in self._static:
            named = self.names.attributes
            self._static[cls] = sorted({n for c in cls.__mro__ if c is not object for n in c.__dict__ if n in named})
        return self._static[cls]

    def wants(self, name: str, x: Any) -> bool:
        names = self.names
        return names.any or name in names.attributes or (name in names.written and not passing(x))

    def module(self, m: nn.Module, v: str, label: str) -> None:
        """Its mode, plain attributes, parameters, buffers, children and hooks."""
        cls, table = type(m), m.__dict__
        self._modules = True
        self.require(f"type({v})", cls)
        self.key.append(id(cls))
        self.opaque.append(cls)
        self.class_of(cls)
        d = self.bind(f"{v}.__dict__")
        library = library_of_module(cls.__module__)
        self.names.open(library)
        users = library not in CLOSED
        if users:
            self.lines.append(f"if len({d}) != {len(table)}: return")
        of_torch = self.names.of_torch

        def wanted(name: str, x: Any) -> bool:
            return name not in _NOT_STATE and (name in of_torch or self.wants(name, x))

        self.attributes(m, d, label, wanted)
        for name in _TABLES:
            children = table[name]
            self.key.append(len(children))
            counted = users or (name == "_modules" and (children or cls.__module__ == nn.Sequential.__module__))
            if not children and counted:
                self.lines.append(f"if {d}['{name}']: return")
            elif children:
                t = self.bind(f"{d}['{name}']")
                self.owners.append((children, t, dict(children)))
                if counted:
                    self.lines.append(f"if len({t}) != {len(children)}: return")
                for k, child in children.items():
                    self.key.append(k)
                    self.meet(child, f"{t}[{k!r}]", f"{label}.{k}")
        if self.hooks([(table[n], f"{d}['{n}']", f"{label}.{n}") for n in _HOOKS]):
            for name in _HOW_HOOKS_ARE_CALLED:
                self.meet(table[name], f"{d}['{name}']", f"{label}.{name}")

    def hooks(self, tables: Sequence[tuple[dict, str, str]]) -> bool:
        """Tables of hooks, which are nearly always empty."""
        full = any(t for t, _, _ in tables)
        self.key.append(full)
        if full:
            for t, expr, label in tables:
                self.meet(t, expr, label)
        else:
            self.lines.append(f"if {' or '.join(e for _, e, _ in tables)}: return")
        return full

    def class_of(self, cls: type) -> None:
        """The attributes of a class and of its bases that the code may name."""
        if cls in self._classes:
            return
        self._classes.add(cls)
        named = self.names.attributes
        if issubclass(cls, torch.autograd.Function):
            named = named | _FUNCTION_RULES
        for owner in cls.__mro__:
            library = library_of_module(owner.__module__) in CLOSED
            if owner is object or owner is nn.Module or (library and not issubclass(owner, nn.Module)):
                continue
            table = owner.__dict__
            p = self.constant(table)
            self.key += (id(owner),)
            self.opaque.append(owner)
            if library:
                self.names.enter_class(owner)
                if "forward" in table:
                    self.same(table["forward"], f"{p}['forward']", f"{owner.__name__}.forward")
                continue
            self.lines.append(f"if len({p}) != {len(table)}: return")
            for name, e in table.items():
                if isinstance(e, _SLOTS) or name == "__classcell__":
                    continue
                elif name.startswith("__"):
                    called = isinstance(e, types.FunctionType) and name not in _NOT_CALLED
                    if called and not (name == "__init__" and issubclass(cls, nn.Module)):
                        self.key.append(name)
                        self.meet(e, f"{p}['{name}']", f"{owner.__name__}.{name}")
                elif name in named or (self.wants(name, e) and name != "_abc_impl"):
                    self.key.append(name)
                    self.meet(e, f"{p}['{name}']", f"{owner.__name__}.{name}")


class Check:
    """A quick way to tell whether a state is still the one that was looked at, and to fetch its tensors."""

    def __init__(self, state: State) -> None:
        self.source = ""
        self.space: dict[str, Any] = {}
        self.renew(state)

    def renew(self, state: State) -> None:
        """Take the objects of an equal state for those to compare with. (Another thread may be checking meanwhile.)"""
        source, found = check_source(state), {**state.constants, "alike": metadata_check(state.tensors)}
        if source == self.source:
            self.space.update(found)
            return
        space = {"is_": is_, "content": content, "unbound": unbound, **found}
        exec(source, space)
        self.tensors: Callable[[Callable, Sequence[Any]], tuple | None] = space["tensors"]
        self.source, self.space = source, space


def check_source(state: State) -> str:
    """The check as Python: a function of ``f`` and the objects among the arguments to the tensors that are reached, or
    to None where the state is another one.
    """
    body = "".join(f"        {line}\n" for line in state.lines)
    found = ", ".join(state.paths) + ("," if len(state.paths) == 1 else "")
    alike = " if alike(*found) else None" if found else ""
    return f"""def tensors(f, objects):
    try:
{body}    except (LookupError, AttributeError, TypeError, ValueError):
        return
    found = ({found})
    return found{alike}
"""


def is_plain(x: Any) -> bool:
    """A plain value, or a tuple of them."""
    return is_value(x) or (x.__class__ in (tuple, torch.Size) and all(map(is_plain, x)))


def plain(x: Any) -> Any:
    return tuple([(e.__class__, plain(e)) for e in x]) if isinstance(x, tuple) else bits(x)


def passing(x: Any) -> bool:
    """Whether a value that the code only adds to need not be looked at: a counter, a list that is appended to."""
    return isinstance(x, int | float | complex | str) or type(x) in _GROWING


def slots_of(cls: type) -> Sequence[str]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def unbound(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def content(x: Any) -> Any:
    """A description of a set, an array or a slice that compares equal where it has the same elements."""
    if isinstance(x, np.ndarray):
        return (x.dtype, x.shape, x.strides, x.tobytes() if x.dtype.kind != "O" else tuple(map(id, x.flat)))
    if isinstance(x, slice):
        return (slice, *[(type(i), i) for i in (x.start, x.stop, x.step)])
    return (type(x), bytes(x) if isinstance(x, bytearray) else frozenset([(type(e), bits(e)) for e in x]))


def metadata_check(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether tensors have the shapes, strides, dtypes, devices and requires_grad that these have."""
    if not any(t.__class__ is Traced for t in tensors):
        try:
            from torch._C._dynamo.guards import TensorGuards

            shapes = [list(t.shape) for t in tensors]
            strides = [list(t.stride()) for t in tensors]
            return TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
        except (ImportError, TypeError, RuntimeError):
            pass
    facts = [tensor_facts(t) for t in tensors]
    return lambda *now: [tensor_facts(t) for t in now] == facts


def look(f: Callable, objects: Sequence[Any], labels: Sequence[str], names: Names) -> State:
    """The state, looked at again while functions are found that read other names."""
    while True:
        known = len(names)
        state = State(f, objects, labels, names)
        if len(names) == known:
            return state

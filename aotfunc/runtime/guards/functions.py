"""Functions as state: code, defaults, closures, and the globals and parts that they name."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

from ...trace import entering
from .containers import Containers
from .description import NOTHING, is_plain, passing
from .keys import Named
from .reads import library_of, library_of_module
from .telling import has_settings, set_attributes, tells

#: the name of the compiled function itself in descriptions, if it is an object
ROOT = "self"

#: what a function says of itself
_OWN = frozenset({"__name__", "__qualname__", "__doc__", "__annotations__"})


class Functions(Containers):
    """Describes functions and Python modules."""

    def function(self, f: types.FunctionType, v: str, label: str) -> None:
        """Describe code, defaults, closure variables, and the globals that the code names."""
        code = f.__code__
        root = label == ROOT
        label = f.__name__ if root else label
        self.same(code, f"{v}.__code__", label)
        where = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
        self.facts[-1] = (label, Named(f"{f.__qualname__} at {where}", id(code)))
        library = library_of(code.co_filename)
        if root:
            self.names.open(library)
        known = not self.names.follows(library, code)
        if self.names.idle(library, code):
            return
        self.meet(f.__defaults__, f"{v}.__defaults__", f"{label}.__defaults__")
        self.meet(f.__kwdefaults__, f"{v}.__kwdefaults__", f"{label}.__kwdefaults__")
        reads = None if known else self.names.enter(code)
        # the wrapped function is all that an entry into aotfunc calls
        entry = code.co_filename == entering.__file__ and "__wrapped__" in f.__dict__
        if f.__closure__ and not entry:
            cells = self.bind(f"{v}.__closure__")
            for i, (name, cell) in enumerate(zip(code.co_freevars, f.__closure__, strict=True)):
                self.key.append(name)
                try:
                    x = cell.cell_contents
                except ValueError:  # not bound yet
                    self.key.append(NOTHING)
                    self.lines.append(f"if not unbound({cells}[{i}]): return")
                    self.owners.append((cell, f"{cells}[{i}]", {}))
                    continue
                self.owners.append((cell, f"{cells}[{i}]", {"cell_contents": x}))
                if (
                    reads is None
                    or name in reads.variables
                    or not (name in reads.written and passing(x))
                ):
                    self.meet(
                        x, f"{cells}[{i}].cell_contents", name if root else f"{label}.{name}"
                    )
                else:
                    self.may_grow(x, f"{cells}[{i}].cell_contents")
        if reads is not None:
            scope = f.__globals__
            scoped = ""
            if reads.binds_globals:
                scoped = self.constant(scope)
                self.owners.append((scope, scoped, dict(scope)))
            for name in sorted(reads.variables | reads.written):
                if (id(scope), name) not in self._globals:
                    self._globals.add((id(scope), name))
                    scoped = scoped or self.constant(scope)
                    self.key.append(name)
                    x = scope.get(name, NOTHING)
                    if x is NOTHING:
                        self.key.append(None)
                        self.lines.append(f"if {name!r} in {scoped}: return")
                    elif name in reads.variables or not passing(x):
                        self.meet(x, f"{scoped}[{name!r}]", f"{scope.get('__name__')}.{name}")
                    else:
                        self.may_grow(x, f"{scoped}[{name!r}]")
            for name in sorted(reads.imports):
                name = scope["__name__"] if name == "__name__" else name
                modules = self.constant(sys.modules)
                if name in sys.modules:
                    self.meet(sys.modules[name], f"{modules}[{name!r}]", name)
                else:  # it may be imported where it can be
                    self.lines.append(f"if {name!r} in {modules}: return")
        if f is os.getenv:
            self.meet(os.environ, self.constant(os.environ), "os.environ")
        for name in sorted(_OWN & self.names.attributes):
            self.meet(getattr(f, name), f"{v}.{name}", f"{label}.{name}")
        wrapped = f.__dict__
        if not known:
            self.owners.append((wrapped, f"{v}.__dict__", dict(wrapped)))
        d = self.bind(f"{v}.__dict__") if wrapped else ""
        for name, x in wrapped.items():
            if name == "__wrapped__" or (not known and self.wants(name, x)):
                self.key.append(name)
                self.meet(
                    x, f"{d}[{name!r}]", label if name == "__wrapped__" else f"{label}.{name}"
                )
            elif not known and name in self.names.written:
                self.may_grow(x, f"{d}[{name!r}]")

    def describe_settings(self, x: Any, v: str, label: str) -> None:
        """Describe what attributes of one of torch's objects tell."""
        self.require(f"type({v})", type(x))
        for name, value in set_attributes(x, self.names.attributes):
            self.key.append(name)
            self.meet(value, f"{v}.{name}", f"{label}.{name}")

    def python_module(self, m: types.ModuleType, v: str, label: str) -> None:
        """Describe the names that the code may look up in the module."""
        self.require(v, m)
        self.key.append(m.__name__)
        d, table = None, vars(m)
        if has_settings(m):
            self.describe_settings(m, v, label)
        library = not self.names.follows(library_of_module(m.__name__))
        if not library:
            self.owners.append((table, f"{v}.__dict__", dict(table)))
        for name in sorted(self.names.attributes | self.names.written):
            x = table.get(name, NOTHING)
            if x is NOTHING or not self.wants(name, x):
                if not library:
                    self.may_grow(x, f"{v}.__dict__[{name!r}]")
                continue
            d = d or self.bind(f"{v}.__dict__")
            self.key.append(name)
            read = isinstance(x, types.ModuleType | os._Environ) or x is os.getenv
            read = read or has_settings(x)
            if library and not is_plain(x) and not read and not tells(x):
                self.same(x, f"{d}[{name!r}]", f"{label}.{name}")
            else:
                self.meet(x, f"{d}[{name!r}]", f"{label}.{name}")

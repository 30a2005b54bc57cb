"""Objects, modules and classes as state: named attributes, modes, tables and hooks."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ...cache import remembered
from ...capture.gathering import fsdp_state, prepare_group, settings
from ...trace.holding import slots_of
from ...trace.traced import Traced, current
from .description import NOTHING, Description, passing
from .keys import Named, noted
from .parallel import check_parallel
from .rates import has_rate
from .reads import CLOSED, library_of_module, reads_of

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
#: methods that Python calls unnamed, but not while a function computes, unless it makes texts
_NOT_CALLED = frozenset(
    """
    __repr__ __str__ __format__ __reduce__ __reduce_ex__ __getstate__ __setstate__ __copy__
    __deepcopy__ __del__ __init_subclass__
    """.split()
)
_FUNCTION_RULES = frozenset({"forward", "backward", "setup_context", "vmap", "jvp"})
#: classes whose instances are known by their content
_RECORDS = (types.SimpleNamespace, argparse.Namespace)
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
#: libraries' classes whose methods compute with their attributes
_READ_THEMSELVES = (
    *("torch.nn.", "torch.distributions.", "torch.optim.", "torch.amp.grad"),
    *("collections", "numpy."),
)
_MODULES = frozenset({"numpy", "threading", "queue", "multiprocessing.sharedctypes"})


class Objects(Description):
    """Describes objects."""

    def parts(self, x: Any, v: str, label: str, names: Sequence[str]) -> None:
        self.require(f"type({v})", type(x))
        self.key.append(type(x))
        for name in names:
            if hasattr(x, name):
                self.meet(getattr(x, name), f"{v}.{name}", label)

    def same(self, x: Any, expr: str, label: str) -> None:
        """Describe an object by its identity alone."""
        self.key.append(id(x))
        self.opaque.append(x)
        self.facts.append((label, noted(x)))
        try:
            weakref.ref(x)
        except TypeError:
            self.require(expr, x)
        else:
            self.lines.append(f"if {expr} is not {self.constant(weakref.ref(x))}(): return")

    def moving(self, x: Any, label: str) -> None:
        """Describe an object that differs at each look: the function is captured at every call."""
        token = object()
        self.key.append(token)
        self.facts.append(
            (label, Named(f"a {type(x).__qualname__}, which changes when it is used", id(token)))
        )
        self.lines.append("return")

    def logger(self, x: logging.Logger, v: str, label: str) -> None:
        """Describe which messages a logger lets through; their destination decides nothing."""
        self.require(v, x)
        now = (x.getEffectiveLevel(), x.disabled, x.manager.disable)
        self.key += (id(x), now)
        self.opaque.append(x)
        self.facts.append((label, now))
        state = f"({v}.getEffectiveLevel(), {v}.disabled, {v}.manager.disable)"
        self.lines.append(f"if {state} != {now}: return")

    def object(self, x: Any, v: str, label: str) -> None:
        cls = type(x)
        library = library_of_module(cls.__module__)
        self.names.open(library)
        modules = [c.__module__ for c in cls.__mro__]
        whole = any(m in _MODULES or m.startswith(_READ_THEMSELVES) for m in modules)
        every = slots_of(cls)
        everything = self.wide or self.names.any
        slots = [n for n in every if everything or n in self.names.attributes]
        opaque = not whole and library in ("torch", "aotfunc")
        if opaque or (library == "python" and not (slots or hasattr(x, "__dict__"))):
            self.same(x, v, label)
            return
        self.require(f"type({v})", cls)
        self.key.append(id(cls))
        self.opaque.append(cls)
        self.class_of(cls)
        if isinstance(x, torch.optim.Optimizer):
            self._optimizers = True
            if self.names.rates and current() is None:
                self._groups |= {id(group) for group in x.param_groups if has_rate(group)}
        if every:
            self.owners.append((Slots(x), f"Slots({v})", dict(Slots(x).items())))
        for name in slots:
            self.key.append(name)
            if (e := getattr(x, name, NOTHING)) is NOTHING:
                self.lines.append(f"if hasattr({v}, {name!r}): return")
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
        """Describe and count the attributes of ``x``, in ``d``, that code may name."""
        table, count = x.__dict__, 0
        self.owners.append((table, d, dict(table)))
        for name, e in table.items():
            if wanted(name, e):
                self.key.append(name)
                self.meet(e, f"{d}[{name!r}]", f"{label}.{name}")
                count += 1
            elif name in self.names.written:
                self.may_grow(e, f"{d}[{name!r}]")
        if hidden := [n for n in self.static(type(x)) if n not in table]:
            self.lines.append(f"if {' or '.join(f'{n!r} in {d}' for n in hidden)}: return")
        return count

    def gradient(self, x: torch.Tensor, v: str, label: str) -> None:
        """Describe the gradient of a leaf, and the hooks that see it."""
        self.graded.add(id(x))
        self._gradients.add(id(x.grad))
        self.owners.append((Gradient(x), f"Gradient({v})", {"grad": x.grad}))
        self.meet(x.grad, f"{v}.grad", f"{label}.grad")
        name = "_post_accumulate_grad_hooks"
        self.meet(getattr(x, name), f"{v}.{name}", f"{label}.{name}")

    def static(self, cls: type) -> list[str]:
        """Return the names that instances without one of their own find in their class."""
        if cls not in self._static:
            named = self.names.attributes
            self._static[cls] = sorted(
                {n for c in cls.__mro__ if c is not object for n in c.__dict__ if n in named}
            )
        return self._static[cls]

    def wants(self, name: str, x: Any) -> bool:
        names = self.names
        if names.any or name in names.attributes:
            return True
        return not passing(x) if name in names.written else self.wide

    def module(self, m: nn.Module, v: str, label: str) -> None:
        """Describe a module's mode, plain attributes, parameters, buffers, children and hooks."""
        check_parallel(m, label, torch.is_grad_enabled())
        cls, table = type(m), m.__dict__
        self._modules = True
        self.require(f"type({v})", cls)
        if "parametrizations" in table["_modules"]:
            self._parametrized = True
            if parametrize._cache_enabled:  # its parameters are kept by its id
                self.same(m, v, label)
        if fsdp_state(m) is not None:
            prepare_group(m, label)
            now = settings(m)
            self.key += map(tuple, now)
            self.lines.append(f"if {self.constant(settings)}({v}) != {self.constant(now)}: return")
        self.key.append(id(cls))
        self.opaque.append(cls)
        self.class_of(cls)
        self.owners.append((Kind(m), f"Kind({v})", {"__class__": cls}))
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
            t = self.bind(f"{d}[{name!r}]") if children else f"{d}[{name!r}]"
            self.owners.append((children, t, dict(children)))
            if users or (
                name == "_modules" and (children or cls.__module__ == nn.Sequential.__module__)
            ):
                changed = f"len({t}) != {len(children)}" if children else t
                self.lines.append(f"if {changed}: return")
            for k, child in children.items():
                self.key.append(k)
                self.meet(child, f"{t}[{k!r}]", f"{label}.{k}")
        if self.hooks([(table[n], f"{d}[{n!r}]", f"{label}.{n}") for n in _HOOKS]):
            for name in _HOW_HOOKS_ARE_CALLED:
                self.meet(table[name], f"{d}[{name!r}]", f"{label}.{name}")

    def hooks(self, tables: Sequence[tuple[dict, str, str]]) -> bool:
        """Describe tables of hooks, which are nearly always empty."""
        full = any(t for t, _, _ in tables)
        self.key.append(full)
        if full:
            for t, expr, label in tables:
                self.meet(t, expr, label)
        else:
            self.lines.append(f"if {' or '.join(e for _, e, _ in tables)}: return")
            self.owners += [(t, expr, {}) for t, expr, _ in tables]
        return full

    def class_of(self, cls: type) -> None:
        """Describe the attributes of a class and of its bases that the code may name."""
        if cls in self._classes:
            return
        self._classes.add(cls)
        named = self.names.attributes
        function, module = issubclass(cls, torch.autograd.Function), issubclass(cls, nn.Module)
        if function:
            named = named | _FUNCTION_RULES
        for owner in cls.__mro__:
            library = library_of_module(owner.__module__) in CLOSED
            if (
                owner is object
                or owner is nn.Module
                or (library and not issubclass(owner, nn.Module))
            ):
                continue
            table = owner.__dict__
            p = self.constant(table)
            self.key += (id(owner),)
            if (owner, function, module) in self._bases:
                continue
            self._bases.add((owner, function, module))
            self.opaque.append(owner)
            if library:
                self.names.enter_class(owner)
                if "forward" in table:
                    self.same(table["forward"], f"{p}['forward']", f"{owner.__name__}.forward")
                self.functional(owner)
                continue
            self.lines.append(f"if len({p}) != {len(table)}: return")
            self.require(f"{self.constant(owner)}.__mro__", owner.__mro__)
            if "__subclasses__" in named:
                known = f"{self.constant(owner)}.__subclasses__()"
                self.meet(owner.__subclasses__(), known, f"{owner.__name__}.__subclasses__()")
            attributes = Attributes(owner)
            self.owners.append((attributes, self.constant(attributes), dict(attributes.items())))
            for name, e in table.items():
                if isinstance(e, _SLOTS) or name == "__classcell__":
                    continue
                elif name.startswith("__"):
                    method = isinstance(e, types.FunctionType | staticmethod | classmethod)
                    called = method and (name not in _NOT_CALLED or name in named)
                    if called and not (name == "__init__" and module):
                        self.key.append(name)
                        self.meet(e, f"{p}[{name!r}]", f"{owner.__name__}.{name}")
                elif name in named or (self.wants(name, e) and name != "_abc_impl"):
                    self.key.append(name)
                    self.meet(e, f"{p}[{name!r}]", f"{owner.__name__}.{name}")
                elif name in self.names.written:
                    self.may_grow(e, f"{p}[{name!r}]")

    def functional(self, cls: type) -> None:
        """Describe the functions of ``torch.nn.functional`` that a torch class's methods call."""
        table = vars(torch.nn.functional)
        if found := [n for n in functions_of(cls) if n not in self._functions and n in table]:
            self._functions.update(found)
            where = self.constant(table)
            for name in found:
                self.same(table[name], f"{where}[{name!r}]", f"torch.nn.functional.{name}")


@remembered(1024)
def functions_of(cls: type) -> tuple[str, ...]:
    """List the functions of ``torch.nn.functional`` that a class's methods lead to."""
    table = vars(torch.nn.functional)
    methods = [f for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    names = {n for f in methods for n in reads_of(f.__code__).attributes}
    called = [f for n in names if isinstance(f := table.get(n), types.FunctionType)]
    names |= {n for f in called for n in reads_of(f.__code__).variables}
    return tuple(
        sorted(
            n
            for n in names
            if isinstance(table.get(n), types.FunctionType | types.BuiltinFunctionType)
        )
    )


class AsDictionary:
    """Part of an object as a dictionary that can be written to."""

    owner: Any = object  # the class whose setting of attributes runs no other code

    def __init__(self, x: Any) -> None:
        self.x = x

    def __setitem__(self, name: str, value: Any) -> None:
        self.owner.__setattr__(self.x, name, value)

    def __delitem__(self, name: str) -> None:
        self.owner.__delattr__(self.x, name)


class Attributes(AsDictionary):
    """The attributes of a class."""

    owner = type

    def items(self) -> list[tuple[str, Any]]:
        return list(vars(self.x).items())


class Slots(AsDictionary):
    """The slots of an object."""

    def items(self) -> list[tuple[str, Any]]:
        return [(n, getattr(self.x, n)) for n in slots_of(type(self.x)) if hasattr(self.x, n)]


class Gradient(AsDictionary):
    """The gradient of a tensor. A recording around may refuse a new one, not the old one."""

    def __setitem__(self, name: str, value: Any) -> None:
        if value.__class__ is Traced:
            self.x.grad = value
        else:
            torch._C.TensorBase.grad.__set__(self.x, value)

    def items(self) -> list[tuple[str, Any]]:
        return [("grad", self.x.grad)]


class Kind(AsDictionary):
    """The class of an object, which a parametrization writes to."""

    def items(self) -> list[tuple[str, Any]]:
        return [("__class__", type(self.x))]

"""The Python state that a function reads: a key for it, and a quick check that it is as it was.

All that the code of ``f`` can name is followed from ``f`` and the objects among its arguments:
closure variables, globals, defaults, attributes of objects, modules and classes, elements of
containers. The functions met on the way are followed in turn. What is found is described by
structure, never by address: two modules of one architecture are the same state with other tensors.
Tensors are inputs: the check fetches them by the path on which they were found."""

from __future__ import annotations

import collections
import contextvars
import functools
import io
import logging
import operator
import os
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator, MappingView, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.library import CustomOpDef
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ...capture.custom_function import CustomRules
from ...trace.traced import Traced
from .containers import BYTES
from .description import NOTHING, may_have_gradient
from .functions import ROOT, Functions
from .reads import CLOSED, LargeLibrary, Names, library_of, library_of_module
from .telling import has_settings, tells

#: objects of libraries that change at every use, in no attribute that Python can compare; so do
#: those of numpy.random, a slow import
_MOVING = (Iterator, random.Random)

#: the parts that a call of an object, or a look into it, depends on; a check reads no others
PARTS: dict[type, tuple[str, ...]] = {
    property: ("fget",),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    functools.cached_property: ("func",),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.singledispatchmethod: ("dispatcher",),
    MappingView: ("mapping", "_mapping"),
    os._Environ: ("_data",),
    # their rules are recorded as a part of the function
    CustomOpDef: ("_backward_fn", "_setup_context_fn"),
    CustomRules: CustomRules.PARTS,
}


class State(Functions):
    """The state that ``f`` and ``objects``, called ``labels``, reach now by these ``names``."""

    def __init__(
        self, f: Callable, objects: Sequence[Any], labels: Sequence[str], names: Names
    ) -> None:
        super().__init__(names)
        self.labels = labels
        # of a large library most functions are not followed, and of an argument other ones may run
        # at each call; what else they read is known once they ran
        large = names.ran is not None
        self.wide = large and not names.ran
        self.meet(f, "f", ROOT)
        self.finish()
        for i, (x, label) in enumerate(zip(objects, labels, strict=True)):
            self.wide = large and not isinstance(x, nn.Module)
            self.meet(x, f"objects[{i}]", label)
            self.finish()
        self.wide = False
        self.methods_of_tensors()
        if self._modules:
            self.global_hooks(nn.modules.module)
        if self._optimizers:
            self.global_hooks(sys.modules[Optimizer.__module__])
        if self._parametrized:
            table = vars(parametrize)
            where = self.constant(table)
            kept = ("_cache",) if parametrize._cache_enabled else ()  # else it is empty
            for name in ("_cache_enabled", *kept):
                self.meet(table[name], f"{where}[{name!r}]", f"parametrize.{name}")
            self.finish()
        if len(self.distinct) > 1:
            ids = ", ".join(f"id({v})" for v in self.distinct)
            self.lines.append(f"if len({{{ids}}}) != {len(self.distinct)}: return")

    def global_hooks(self, module: types.ModuleType) -> None:
        """Describe the hooks of all modules, or of all optimizers."""
        table = vars(module)
        where = self.constant(table)
        names = [n for n in table if n.startswith("_global_") and n.endswith("_hooks")]
        self.hooks([(table[n], f"{where}[{n!r}]", n) for n in names])
        self.finish()

    def methods_of_tensors(self) -> None:
        """Describe the methods that the user has added to ``torch.Tensor``, or replaced."""
        table = vars(Tensor)
        where = self.constant(table)
        self.lines.append(f"if len({where}) != {len(table)}: return")
        for name in sorted(self.names.attributes & table.keys()):
            x = table[name]
            if isinstance(x, types.FunctionType) and self.names.follows(
                library_of(x.__code__.co_filename), x.__code__
            ):
                self.meet(x, f"{where}[{name!r}]", f"Tensor.{name}")
        self.finish()

    def finish(self) -> None:
        while self._todo:
            self.visit(*self._todo.pop())

    def visit(self, x: Any, v: str, label: str) -> None:
        cls = type(x)
        self.key.append(v)
        if tells(x):
            self.same(x, v, label)
            self.meet(x(), f"{v}()", f"{label}()")
        elif isinstance(x, Tensor):
            if x.__class__ is not Traced and x.__dict__:
                self.attributes(x, self.bind(f"{v}.__dict__"), label, self.wants)
            if self.names.gradients and may_have_gradient(x) and id(x) not in self._gradients:
                self.gradient(x, v, label)
        elif isinstance(x, types.FunctionType):
            self.function(x, v, label)
        elif isinstance(x, types.ModuleType):
            self.python_module(x, v, label)
        elif isinstance(x, type):
            self.same(x, v, label)
            self.class_of(x)
            self.class_of(cls)
        elif isinstance(x, types.MethodType):
            self.key.append(cls)
            self.meet(
                x.__self__, f"{v}.__self__", "self" if label == ROOT else f"{label}.__self__"
            )
            self.meet(x.__func__, f"{v}.__func__", label)
        elif type(x) in (types.BuiltinMethodType, types.MethodWrapperType) and not isinstance(
            x.__self__, types.ModuleType | type | None
        ):
            self.key.append(x.__name__)
            self.lines.append(f"if type({v}) is not {self.constant(type(x))}: return")
            self.lines.append(f"if {v}.__name__ != {x.__name__!r}: return")
            self.meet(x.__self__, f"{v}.__self__", f"{label}.__self__")
        elif isinstance(x, functools.partial):
            self.require(f"type({v})", cls)
            for name in ("func", "args", "keywords"):
                self.meet(
                    getattr(x, name), f"{v}.{name}", label if name == "func" else f"{label}.{name}"
                )
        elif isinstance(x, list | tuple | collections.deque):
            self.sequence(x, v, label)
        elif isinstance(x, dict | types.MappingProxyType):
            self.dictionary(x, v, label)
        elif isinstance(x, set | frozenset):
            self.unordered(x, v, label)
        elif isinstance(x, np.ndarray | slice | BYTES):
            self.content(x, v, label)
        elif isinstance(x, tuple(PARTS)):
            self.parts(x, v, label, next(PARTS[cls] for cls in PARTS if isinstance(x, cls)))
        elif isinstance(x, operator.attrgetter | operator.methodcaller):
            self.names.attributes.update(
                part for text in texts(x.__reduce__()) for part in text.split(".")
            )
            self.same(x, v, label)
        elif isinstance(x, Node) or (
            (isinstance(x, _MOVING) or cls.__module__.startswith("numpy.random."))
            and not isinstance(x, io.IOBase)
            and library_of_module(cls.__module__) in CLOSED
        ):
            self.moving(x, label)
        elif has_settings(x):
            self.describe_settings(x, v, label)
        elif isinstance(x, contextvars.ContextVar):
            self.same(x, v, label)
            if (now := x.get(NOTHING)) is NOTHING:
                self.lines.append(
                    f"if {v}.get({self.constant(NOTHING)}) is not {self.constant(NOTHING)}: return"
                )
            else:
                self.meet(now, f"{v}.get()", label)
        elif isinstance(x, logging.Logger):
            self.logger(x, v, label)
        elif isinstance(x, weakref.ref):
            self.key.append(cls)
            self.meet(x(), f"{v}()", label)
        elif isinstance(x, nn.Module) and "_parameters" in x.__dict__:
            self.module(x, v, label)
        elif cls.__module__ == "aotfunc.runtime.compiled" and cls.__name__ == "Compiled":
            self.key.append(cls)
            self.require(f"type({v})", cls)
            self.meet(x.f, f"{v}.f", label)
        else:
            self.object(x, v, label)


def texts(x: Any) -> list[str]:
    """Return the strings in nested tuples."""
    return (
        [t for e in x for t in texts(e)]
        if isinstance(x, tuple)
        else [x]
        if isinstance(x, str)
        else []
    )


def look(f: Callable, objects: Sequence[Any], labels: Sequence[str], names: Names) -> State:
    """Return the state, looked at again while functions are found that read other names."""
    while True:
        known = len(names)
        try:
            state = State(f, objects, labels, names)
        except LargeLibrary:
            names.__init__(ran=set())  # type: ignore[misc]
            continue
        if len(names) == known:
            return state

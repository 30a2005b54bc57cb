"""When a compiled entry may be used again: keys of the arguments, the surroundings, and what a function reaches.

A key is one flat tuple. Every description starts with its kind, so that no two different things flatten to equal keys;
numbers stand beside their type and floats by their bits, since ``1 == 1.0 == True`` and ``0.0 == -0.0`` in Python;
objects stand for themselves by ``id``, and whoever stores a key keeps them alive (``ident``).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _device
from torch.utils._pytree import tree_flatten

from .debug import _OURS, _TORCH

Ident = Callable[[Any], int]
_NOTHING = object()
_TENSORS = (Tensor, nn.Parameter)
_SEQUENCES = (tuple, list)
#: described by their value; equality within one of these classes is equality of meaning
_ATOMS = frozenset({int, bool, str, bytes, type(None), type(...), torch.dtype, torch.device})
_BY_IDENTITY = frozenset({types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type, types.MethodType})


# ----- arguments ------------------------------------------------------------------------------------------------------


def describe_argument(x: Any, key: list, tensors: list[Tensor]) -> None:
    """Append to ``key`` what identifies an argument tree, and to ``tensors`` its tensors in the order of its leaves."""
    cls = x.__class__
    if cls in _TENSORS:
        key += (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.storage_offset())
        tensors.append(x)
    elif cls in _ATOMS:
        key += (cls, x)
    elif cls is float:
        key += (cls, x.hex())
    elif cls is tuple or cls is list:
        key += (cls, len(x))
        for v in x:
            describe_argument(v, key, tensors)
    elif cls is dict:
        key += (dict, tuple(x), tuple(map(type, x)))
        for v in x.values():
            describe_argument(v, key, tensors)
    elif isinstance(x, Tensor):
        key.append(cls)
        sig = getattr(x, "sig", None)  # a value of a recording under way
        key += (x.requires_grad, sig) if sig is not None else (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
        tensors.append(x)
    elif number := number_key(x):
        key += number
    elif cls is slice:
        key.append(slice)
        for v in (x.start, x.stop, x.step):
            describe_argument(v, key, [])
    else:
        leaves, spec = tree_flatten(x)
        if len(leaves) == 1 and leaves[0] is x:
            key += (cls, x)
        else:
            key.append(spec)
            for v in leaves:
                describe_argument(v, key, tensors)


def number_key(x: Any) -> tuple | None:
    """A float or complex number by its bits."""
    if isinstance(x, float):
        return (x.__class__, float(x).hex())
    return (x.__class__, repr(x)) if isinstance(x, complex) else None


# ----- surroundings ---------------------------------------------------------------------------------------------------


def environment_key() -> tuple:
    """Grad mode, autocast, the defaults for new tensors, determinism."""
    autocast: Any = None
    if torch._C._is_any_autocast_enabled():
        kinds = ("cpu", "cuda")
        autocast = tuple([torch.is_autocast_enabled(k) and torch.get_autocast_dtype(k) for k in kinds])
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        _device.CURRENT_DEVICE,
        autocast,
        torch.are_deterministic_algorithms_enabled(),
    )


# ----- what a function reaches ----------------------------------------------------------------------------------------


class Reached:
    """What ``f`` reaches directly: closure cells, globals that its code names, defaults, and the modules among them.

    Deeper Python state is fixed at capture, as in JAX.
    """

    def __init__(self, f: Callable) -> None:
        self.cells: list[Any] = []
        self.globals: list[tuple[dict, tuple[str, ...]]] = []
        self.functions: list[types.FunctionType] = []
        self.objects: list[Any] = []
        self._seen: set[int] = set()
        self._reach(f)

    def _reach(self, f: Any) -> None:
        if id(f) in self._seen:
            return
        self._seen.add(id(f))
        if isinstance(f, functools.partial):
            self.objects += [*f.args, *f.keywords.values()]
            self._reach(f.func)
        elif isinstance(f, types.MethodType):
            self.objects.append(f.__self__)
            self._reach(f.__func__)
        elif isinstance(f, types.FunctionType):
            self.functions.append(f)
            self.cells += f.__closure__ or ()
            if not f.__code__.co_filename.startswith((_OURS, _TORCH)):
                self.globals.append((f.__globals__, tuple(names_in(f.__code__))))
        else:  # a module, or another object that can be called
            self.objects.append(f)
            call = next((c.__dict__["__call__"] for c in type(f).__mro__ if "__call__" in c.__dict__), None)
            if isinstance(call, types.FunctionType) and not call.__code__.co_filename.startswith((_OURS, _TORCH)):
                self._reach(call)
        wrapped = getattr(f, "__wrapped__", None)
        if wrapped is not None:
            self._reach(wrapped)

    def describe(self, key: list, ident: Ident = id) -> None:
        """Append what all this is now."""
        for cell in self.cells:
            try:
                x = cell.cell_contents
            except ValueError:  # not bound yet
                x = _NOTHING
            describe(x, key, ident)
        for scope, names in self.globals:
            for name in names:  # most are attributes, which no global is called after
                x = scope.get(name, _NOTHING)
                if x is _NOTHING:
                    key.append(None)
                else:
                    describe(x, key, ident)
        for f in self.functions:
            key.append(ident(f.__code__))
            if f.__defaults__ is not None:
                describe(f.__defaults__, key, ident)
            if f.__kwdefaults__ is not None:
                describe(f.__kwdefaults__, key, ident)
        for x in self.objects:
            describe(x, key, ident)


def names_in(code: types.CodeType) -> dict[str, None]:
    """The names that a code object and the functions defined in it look up."""
    names = dict.fromkeys(code.co_names)
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            names.update(names_in(c))
    return names


def describe(x: Any, key: list, ident: Ident, depth: int = 0) -> None:
    """Numbers and containers by value, tensors and objects by identity, modules by their state."""
    cls = x.__class__
    if cls in _BY_IDENTITY:
        key += (cls, ident(x))
    elif cls in _ATOMS:
        key += (cls, x)
    elif cls is float:
        key += (cls, x.hex())
    elif isinstance(x, Tensor):
        describe_tensor(x, key, ident)
    elif isinstance(x, nn.Module):
        describe_module(x, key, ident)
    elif isinstance(x, _SEQUENCES) and depth < 8:
        key += (cls, len(x))
        for v in x:
            describe(v, key, ident, depth + 1)
    elif isinstance(x, dict) and depth < 8:
        key += (cls, tuple(x), tuple(map(type, x)))
        for v in x.values():
            describe(v, key, ident, depth + 1)
    elif number := number_key(x):
        key += number
    elif cls is set or cls is frozenset:
        key += (cls, frozenset([(type(v), v) for v in x]))
    else:
        key += (cls, ident(x))


def describe_tensor(x: Tensor, key: list, ident: Ident) -> None:
    """By reference; ``.data = …`` and ``module.half()`` change what is behind it."""
    if x.__class__ in _TENSORS:
        key += (ident(x), x.requires_grad, x.shape, x.dtype, x.device)
    else:
        key += (ident(x), x.requires_grad)


def describe_module(m: nn.Module, key: list, ident: Ident) -> None:
    """Identity and mode of the modules, parameters and buffers."""
    stack, seen = [m], {id(m)}
    while stack:
        sub = stack.pop()
        state = sub.__dict__
        key += (ident(sub), sub.training)
        for table in (state["_parameters"], state["_buffers"]):
            key.append(len(table))
            for t in table.values():
                if t is None:
                    key.append(None)
                else:
                    describe_tensor(t, key, ident)
        for child in state["_modules"].values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)


# ----- naming what keeps changing -------------------------------------------------------------------------------------


def changing(names: Sequence[str], history: Sequence[Sequence[Any]]) -> list[tuple[str, Any]]:
    """Which of the described leaves took many values: ``(name, latest value)``."""
    found = []
    for i, name in enumerate(names):
        values = {repr(h[i]) for h in history if i < len(h)}
        if len(values) > len(history) // 2:
            found.append((name, history[-1][i]))
    return found

"""When a compiled entry may be used again: keys of arguments, of the surroundings, and of what a function reaches directly."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def leaf_key(x: Any) -> Any:
    """The guard of one argument leaf: a tensor's signature, a Python value with its type."""
    if isinstance(x, Tensor):
        sig = getattr(x, "sig", None)
        if sig is not None:
            return sig
        return (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.storage_offset())
    if x.__class__ is float:
        return (float, x.hex())
    return (x.__class__, x)


def environment_key() -> tuple:
    """Grad mode, autocast and defaults."""
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
    )


def closure_key(f: Callable) -> Callable[[], tuple]:
    """A function that describes what ``f`` reaches directly, as it is now: closure cells, globals that its code names, modules.

    Deeper Python state is fixed at capture, as in JAX.
    """
    readers: list[Callable[[], Any]] = []

    def reach(f: Any) -> None:
        if isinstance(f, functools.partial):
            reach(f.func)
            readers.extend(_constant(a) for a in (*f.args, *f.keywords.values()))
        elif isinstance(f, nn.Module):
            readers.append(lambda: value_key(f))
        elif isinstance(f, types.MethodType):
            readers.append(_constant(f.__self__))
            reach(f.__func__)
        elif isinstance(f, types.FunctionType):
            code = f.__code__
            for cell in f.__closure__ or ():
                readers.append(lambda cell=cell: cell_key(cell))
            for name in code.co_names:
                if name in f.__globals__ and not isinstance(f.__globals__[name], types.ModuleType):
                    readers.append(lambda name=name, g=f.__globals__: value_key(g.get(name)))
            wrapped = getattr(f, "__wrapped__", None)
            if wrapped is not None:
                reach(wrapped)

    reach(f)
    return lambda: tuple([read() for read in readers])


def _constant(x: Any) -> Callable[[], Any]:
    return lambda: value_key(x)


def cell_key(cell: Any) -> Any:
    try:
        return value_key(cell.cell_contents)
    except ValueError:
        return None


def value_key(x: Any) -> Any:
    """A key that changes when a reached value does: numbers by value, tensors and objects by identity, modules by their state."""
    if isinstance(x, nn.Module):
        return module_key(x)
    if isinstance(x, Tensor):
        return (Kept(x), x.requires_grad, x.shape)
    if x is None or isinstance(x, bool | int | str | bytes | torch.dtype | torch.device):
        return (x.__class__, x)
    if isinstance(x, float):
        return (float, x.hex())
    if isinstance(x, tuple | list):
        return (x.__class__, tuple([value_key(v) for v in x]))
    if isinstance(x, dict):
        return tuple([(k, value_key(v)) for k, v in x.items()])
    return Kept(x)


def module_key(m: nn.Module) -> tuple:
    """Identity of the parameters and buffers of a module and its submodules, and who is in training mode."""
    parts: list = [Kept(m)]
    for sub in m.modules():
        parts.append(sub.training)
        parts += [Kept(p) if p is not None else None for p in sub._parameters.values()]
        parts += [p.requires_grad for p in sub._parameters.values() if p is not None]
        parts += [Kept(b) if b is not None else None for b in sub._buffers.values()]
    return tuple(parts)


class Kept:
    """An object compared by identity and kept alive, so that its id stays its own."""

    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x

    def __hash__(self) -> int:
        return id(self.x)

    def __eq__(self, other: object) -> bool:
        return other.__class__ is Kept and self.x is other.x  # type: ignore[attr-defined]

"""Modes around a call act while a function is recorded, and not later on the recorded program.

Autocast has put its casts into the recording, a ``TorchFunctionMode``
(``torch.set_default_device`` is one) has changed the calls that it sees. Rules, shape inference
and programs run later, when the same modes or others may be on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils._device import DeviceContext

_autocast = torch._C._is_any_autocast_enabled
_function_modes = torch._C._len_torch_function_stack
_has_key = torch._C._dispatch_tls_is_dispatch_key_included
_include_key = torch._C._dispatch_tls_set_dispatch_key_included
_EXPORT = torch._C.DispatchKey.PreDispatch
_NONE = nullcontext()


def device_generators() -> list[torch.Generator]:
    """Return the default generators of all devices in use."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *cuda]


def without_modes(dtype: torch.dtype | None = None) -> AbstractContextManager:
    """Switch autocast and function modes off: the recorded program has been through them.
    ``dtype``: the default dtype of the recording, for a program that runs later."""
    changed = dtype is not None and torch.get_default_dtype() is not dtype
    if not (changed or any_modes()):
        return _NONE
    stack = off()
    if changed:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
    return stack


def any_modes() -> bool:
    """Return whether autocast or a function mode is on."""
    return _autocast() or torch._C._is_torch_function_mode_enabled()


def off() -> ExitStack:
    """Switch modes off as :func:`without_modes` does, whether there are any or not."""
    stack = ExitStack()
    stack.enter_context(torch._C._DisableAutocast())
    stack.enter_context(torch._C.DisableTorchFunction())
    return stack


def is_exporting() -> bool:
    """Return whether ``torch.export`` records the ops that are called, as they are called."""
    return _has_key(_EXPORT)


@contextmanager
def outside_export() -> Iterator[None]:
    """Hide ops from ``torch.export``, which knows no traced values."""
    _include_key(_EXPORT, False)
    try:
        yield
    finally:
        _include_key(_EXPORT, True)


def outside_inference_mode(f: Callable) -> Callable:
    """Return ``f`` outside of inference mode, in which autograd's own formulas record nothing and
    traced values could not be written to."""

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return f(*args, **kwargs)
        with torch.inference_mode(False):
            return f(*args, **kwargs)

    return wrapper


class Surroundings(NamedTuple):
    """The autocast state at one time, to run a part of the user's code under it later."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    cached: bool

    @classmethod
    def now(cls) -> Surroundings:
        devices = torch._C._autocast_supported_devices() if _autocast() else ()
        on = tuple(
            (d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)
        )
        return cls(on, torch.is_autocast_cache_enabled())

    def again(self) -> ExitStack:
        """Restore autocast inside the block; leave function modes as they are."""
        stack = ExitStack()
        stack.enter_context(torch._C._DisableAutocast())
        stack.enter_context(torch._C._EnableTorchFunction())
        for device, dtype in self.autocast:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=self.cached))
        return stack


def function_modes_key() -> torch.device | str | None:
    """Return the default device; OTHERS if a mode may act differently at each call."""
    device = None
    for i in range(_function_modes()):
        mode = torch._C._get_function_stack_at(i)
        if not isinstance(mode, DeviceContext):
            return OTHERS
        device = mode.device  # PyTorch asks the innermost of several first
    return device


OTHERS = "function modes"

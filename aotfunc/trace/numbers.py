"""Refuse reads of a tensor's memory that no op shows to a recording, in functions that are
compiled once.

``float(c)`` and ``range(c)`` are ops, but inside of ``torch.tensor([c, 2])`` dispatch is off;
printing, pickling and sharing memory never were ops. While a number would be frozen, the methods
that read one are exchanged: these refuse, those of :mod:`.places` need no number.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import debug
from ..debug import at
from ..errors import CaptureError
from .averages import averaging
from .decisions import DECISIONS, deciding
from .optimizers import optimizer_steps
from .patches import Exchange
from .places import METHODS
from .scalers import SCALER
from .traced import Traced, current, is_frozen, quiet, shows_gradient, under_way

#: methods that read values, and the words for what they read
READERS = {
    **dict.fromkeys(("__float__", "__int__", "__index__", "__complex__", "__bool__"), "a number"),
    "__repr__": "the text",
    **dict.fromkeys(("__reduce_ex__", "__dlpack__", "storage"), "the memory"),
}
WAY = (
    "Compute with the tensor, use torch.where instead of `if`, or pass the number "
    "as a Python argument."
)
_grad, _grad_fn = torch._C.TensorBase.grad, torch._C.TensorBase.grad_fn


def refusal(what: str, way: str = WAY) -> CaptureError:
    """Return the error for a question whose answer would be frozen. A function that catches it
    goes on without eager's number, so the captures under way fail all the same: see
    :func:`~aotfunc.trace.recording.record_into`."""
    error = CaptureError(
        f"{what} was asked for that depends on a tensor from outside, but the function is "
        f"compiled once for all values{at(debug.user_line())}. {way}"
    )
    for trace in under_way.traces:
        if not trace.may_ask_constants:
            trace.refused = trace.refused or error
    return error


def forgive(error: CaptureError) -> None:
    """Forget the refusal, as the number turned out not to be needed."""
    for trace in under_way.traces:
        if trace.refused is error:
            trace.refused = None


def refusing(read: Callable, what: str) -> Callable:
    """Return ``read`` with a refusal for values that a recording here would freeze."""

    @functools.wraps(read)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if frozen(self):
            raise refusal(what)
        return read(self, *args, **kwargs)

    return method


def frozen(t: Tensor) -> bool:
    """Return whether a program under way would keep the present value of ``t``."""
    return is_frozen() and t.__class__ is not Traced and not under_way.quiet


def read_grad(self: Tensor) -> Tensor | None:
    """Refuse ``.grad``, which is another tensor after each backward pass, unless each call looks
    at it."""
    if frozen(self) and not shows_gradient(self):
        raise refusal("the .grad", "Pass gradients as arguments.")
    return _grad.__get__(self)


def read_grad_fn(self: Tensor) -> Any:
    """Return the autograd node, and have the function run at every call: no recording sees what is
    done to the node, such as registering a hook."""
    node = _grad_fn.__get__(self)
    if node is not None and frozen(self):
        for trace in under_way.traces:
            trace.runs_always = True
    return node


def told_now(name: str) -> Any:
    """Return what to read of a tensor that no guard looks at, where the user's code reads it of
    one from outside: the function runs at every call."""
    attribute = getattr(Tensor, name)

    def note(t: Tensor) -> bool:
        asked = frozen(t) and debug.is_users(sys._getframe(2).f_code.co_filename)
        for trace in under_way.traces if asked else ():
            trace.runs_always = True
        return asked

    if not callable(attribute):

        def get(self: Tensor) -> Any:
            note(self)
            return attribute.__get__(self)

        return property(get, getattr(attribute, "__set__", None))

    @functools.wraps(attribute)
    def method(self: Tensor, *args: Any) -> Any:
        with quiet() if note(self) else nullcontext():
            return attribute(self, *args)

    return method


#: what no guard looks at
TOLD = (
    *("_version", "data_ptr", "storage_offset", "untyped_storage", "is_set_to", "_is_view"),
    *("is_leaf", "retains_grad", "is_shared", "_backward_hooks"),
)


def splitting(split: Callable) -> Callable:
    """Return ``tensor_split`` with its tensor of indices, or their number, read as Python's."""

    def listed(x: Any) -> Any:
        return x.tolist() if isinstance(x, Tensor) else x

    @functools.wraps(split)
    def function(*args: Any, **kwargs: Any) -> Any:
        if current() is None or under_way.quiet:
            return split(*args, **kwargs)
        if isinstance(at := kwargs.pop("tensor_indices_or_sections", None), Tensor):
            kwargs["indices" if at.dim() else "sections"] = at.tolist()
        elif at is not None:
            kwargs["tensor_indices_or_sections"] = at
        return split(*args[:1], *map(listed, args[1:]), **kwargs)

    return function


Traced.tensor_split = splitting(Tensor.tensor_split)  # type: ignore[method-assign]
SPLIT = {(torch, "tensor_split"): splitting(torch.tensor_split)}


def set_grad(t: Tensor, value: Any) -> None:
    (watch.before(Tensor, "grad") or _grad).__set__(t, value)


def delete_grad(t: Tensor) -> None:
    """Delete ``t.grad``, as ``t.grad = None`` does."""
    set_grad(t, None)


watch = Exchange(
    {(Tensor, name): method for name, method in METHODS.items()}
    | {(Tensor, name): refusing(getattr(Tensor, name), what) for name, what in READERS.items()}
    | {(Tensor, name): told_now(name) for name in TOLD}
    | optimizer_steps()
    | DECISIONS
    | SCALER
    | {
        (Tensor, "__bool__"): deciding(refusing(Tensor.__bool__, READERS["__bool__"])),
        (Tensor, "tensor_split"): splitting(Tensor.tensor_split),
        (Tensor, "grad"): property(read_grad, set_grad, delete_grad),
        (Tensor, "grad_fn"): property(read_grad_fn),
        (_BatchNorm, "forward"): averaging(_BatchNorm.forward),
    }
)

"""Tell which tensors a recording can stand for, and which have values to look at."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from .. import debug
from ..debug import at
from ..errors import CaptureError
from .tensor_classes import only_adds, subclasses
from .traced import CLASS, Traced, as_if_outside, attributes, quiet


def dtensor_class() -> Any:
    """Return the class of DTensors; an empty tuple if it is not imported."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def is_dtensor(x: Any) -> bool:
    return isinstance(x, dtensor_class())


def innermost(t: Tensor) -> Tensor:
    """Return the tensor that torch.func's transforms, if any, have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def check_kind(t: Tensor, dtensors: bool = False) -> None:
    """Refuse the tensors that a recording cannot stand for. ``dtensors`` may be given to a
    compiled function, and to nothing that is captured inside of it."""
    if t.is_nested:
        raise of_nested()
    if t.layout is not torch.strided or t.is_quantized:
        raise CaptureError(
            f"only dense tensors can be captured, not {t.layout} with dtype "
            f"{t.dtype}{at(debug.user_line())}"
        )
    if type(t) in KINDS:
        return
    if hasattr(getattr(t, "fake_mode", None), "of_parts"):
        raise CaptureError(
            "the part of a DTensor was taken from an attribute of it inside a captured "
            f"function{at(debug.user_line())}; x.to_local() gives it"
        )
    if dispatches(t) and not is_fake(t):
        if is_dtensor(t):
            if dtensors and not hasattr(t, "traced"):
                return
            raise CaptureError(
                "DTensors go to compiled functions (jit, aot_function, aot_module) and the ops in "
                f"them, not to anything else{at(debug.user_line())}: pass what this process "
                "holds, x.to_local()"
            )
        raise CaptureError(
            f"tensors of the subclass {type(t).__name__} cannot be captured{at(debug.user_line())}"
        )
    if (
        not is_fake(t)
        and plain_function(type(t)) is not _plain_function
        and type(t).__torch_function__ is not _disabled
    ):
        raise of_subclass(t, "an argument")


def check_argument(t: Tensor, dtensors: bool, named: Callable[[], Collection[str]]) -> None:
    """Refuse what a compiled function does not take, and instances of a subclass that changes what
    tensors do, or by which a function that has ``named`` these names may decide."""
    check_kind(t, dtensors)
    cls = type(t)
    if cls in KINDS or dispatches(t):
        return
    if not only_adds(cls):
        raise of_subclass(t, "an argument", "changes what tensors do and ")
    if asked := {*_ASKS_CLASS, *(c.__name__ for c in subclasses(cls))} & {*named()}:
        raise of_subclass(t, "an argument", f"the function looks at ({min(asked)}) and which ")


#: names by which code looks at the class of a tensor
_ASKS_CLASS = ("type", "__class__", "singledispatch")
#: the classes of ordinary tensors
KINDS = frozenset((Tensor, torch.nn.Parameter, Traced))


def dispatches(t: Tensor) -> bool:
    """Return whether a tensor is of a foreign subclass that answers ops itself."""
    cls = type(t)
    return cls not in KINDS and getattr(cls, "__torch_dispatch__", _plain) is not _plain


def is_fake(t: Tensor) -> bool:
    """Return whether a tensor is a FakeTensor, or AOTAutograd's around one: ops on it, so programs
    too, say what shapes and dtypes they give."""
    return type(t).__module__ in (
        "torch._subclasses.fake_tensor",
        "torch._subclasses.functional_tensor",
    )


def of_nested() -> CaptureError:
    return CaptureError(
        f"nested tensors are not captured{at(debug.user_line())}: pad them, and use a mask where "
        "it matters"
    )


def of_subclass(t: Tensor, what: str, why: str = "") -> CaptureError:
    return CaptureError(
        f"{what} is of the subclass {type(t).__name__}{at(debug.user_line())}, which {why}is not "
        "compiled; use x.as_subclass(torch.Tensor)"
    )


def plain_function(cls: Any) -> Any:
    return getattr(cls.__torch_function__, "__func__", None)


_plain = Tensor.__torch_dispatch__
_plain_function = plain_function(Tensor)
_disabled = Traced.__torch_function__


def ordinary_tensor(x: Any) -> Any:
    """Return an instance of a subclass without ``__torch_dispatch__`` as an ordinary tensor of its
    memory and history, for ops of programs. Anything else is itself."""
    cls = x.__class__
    if (
        cls in KINDS
        or not isinstance(x, Tensor)
        or cls.__torch_function__ is _disabled
        or dispatches(x)
    ):
        return x
    with as_if_outside(), quiet(), torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
        plain = x.as_subclass(Tensor)
    plain.__dict__.update(attributes(x))
    if only_adds(cls):
        plain.__dict__[CLASS] = cls
    return plain


def has_values(t: Tensor) -> bool:
    """Return whether a tensor has data: not fake, nor on meta, nor torch.func's batch."""
    return not (
        dispatches(t) or t.device.type == "meta" or torch._C._functorch.is_batchedtensor(t)
    )

"""Tell what a stand-in answers for the class of the tensor that it stands for."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .. import debug
from ..debug import at
from ..errors import CaptureError
from .traced import CLASS, Traced

#: the ``_is_param``, by which PyTorch knows parameters, of an argument that is one; that of a
#: parameter made inside is True
GIVEN = "given"


def class_facts(t: Tensor) -> dict[str, Any]:
    """Return the attributes by which a stand-in for ``t`` answers what ``t``'s class does."""
    found: dict[str, Any] = {}
    if isinstance(t, Parameter):
        found["_is_param"] = GIVEN
    cls = t.__dict__.get(CLASS, t.__class__)  # that of a value around, or of an ordinary tensor
    if is_extension(cls):
        found[CLASS] = cls
    return found


def class_attribute(t: Traced, name: str) -> Any:
    """Return what the class of the tensor that ``t`` stands for adds under this name.

    Raises CaptureError for a value that was computed from one of such a class, AttributeError for
    any other."""
    cls = t.__dict__.get(CLASS)
    if hasattr(cls, name):
        found = inspect.getattr_static(cls, name)
        return found.__get__(t, cls) if hasattr(found, "__get__") else found
    if any(hasattr(x.__dict__.get(CLASS), name) for x in t.tracer.arguments):
        raise CaptureError(
            f"the attribute {name!r} of a value computed from one of a subclass, which has "
            f"it{at(debug.user_line())}: values inside a captured function are plain tensors; "
            "call the method on the argument, or write it as a function"
        )
    raise AttributeError(
        f"tensors have no attribute {name!r}: those of a subclass are plain tensors inside a "
        "captured function"
    )


def subclasses(cls: type) -> list[type]:
    """Return a subclass of Tensor and its bases, without PyTorch's own."""
    return [c for c in cls.__mro__ if c not in (*Tensor.__mro__, Parameter, Traced)]


def only_adds(cls: type) -> bool:
    """Return whether a subclass of Tensor, or of Parameter, adds attributes or methods and
    overrides none."""
    names = {n for c in subclasses(cls) for n, x in vars(c).items() if x is not _SILENT}
    return not any(hasattr(Traced, n) for n in names - _HARMLESS)


def is_extension(cls: type) -> bool:
    """Return whether this is a subclass, and no more than that: see :func:`only_adds`."""
    return bool(subclasses(cls)) and only_adds(cls)


#: a ``__torch_function__`` that changes nothing
_SILENT = vars(Traced)["__torch_function__"]
_HARMLESS = frozenset(
    """
    __doc__ __module__ __dict__ __weakref__ __new__ __init__ __repr__ __str__ __slots__
    __annotations__ __annotate_func__ __static_attributes__ __firstlineno__
    """.split()
)

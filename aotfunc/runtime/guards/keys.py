"""Keys of arguments and surroundings, by which a compiled entry is found.

A key is one flat tuple. Every description starts with its kind, so that no two different things
flatten to equal keys; numbers stand beside their type and floats by their bits, since ``1 == 1.0
== True`` and ``0.0 == -0.0`` in Python. What is neither a tensor, a plain value nor a tree of them
is an object: :mod:`.state` describes it."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributions import Distribution
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import TreeSpec

from ...capture.instances import flatten_tree, without_class
from ...debug import at, user_line
from ...errors import CaptureError
from ...trace.following import with_values
from ...trace.kinds import check_kind, is_dtensor
from ...trace.modes import Surroundings, function_modes_key
from ...trace.traced import CLASS, attributes
from .reads import CLOSED, library_of_module

TENSORS = (Tensor, nn.Parameter)
#: described by their value; equality within one of these classes is equality of meaning
ATOMS = frozenset(
    {
        int,
        bool,
        str,
        bytes,
        type(None),
        type(...),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
    }
    | {range, torch.Size}
)
_VALUES = (
    *ATOMS - {bool, range, type(None), type(...)},
    float,
    complex,
    np.generic,
    np.dtype,
    Enum,
)


# ----- plain values ------------------------------------------------------------------------------


def is_value(x: Any) -> bool:
    """Return whether ``x`` is described by what it is equal to."""
    try:
        cls = x.__class__
    except Exception as e:
        raise without_class(x) from e
    return cls in ATOMS or cls is float or isinstance(x, _VALUES)


def bits(x: Any) -> Any:
    """Return a plain value so that only the same are equal: numbers by their bits."""
    cls = x.__class__
    if cls in ATOMS:
        return x
    if isinstance(x, Enum):
        return x.name
    if isinstance(x, np.generic):
        return x.tobytes() if x.dtype.kind != "O" else id(x)
    if isinstance(x, float):
        return float.hex(with_values(x))  # during a capture it may be one that is followed
    return complex.__repr__(x) if isinstance(x, complex) else x


class TensorFacts(NamedTuple):
    """The facts of a tensor that a program can tell apart."""

    cls: type
    requires_grad: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device
    stride: tuple[int, ...] | None
    keys: int  # of dispatch: whether it is conjugated, of inference mode, …
    placed: Any = None  # where the parts of a DTensor are

    def __str__(self) -> str:
        dense: list[int] = []
        size = 1
        for n in reversed(self.shape):
            dense.insert(0, size)
            size *= max(n, 1)
        more = [] if self.device.type == "cpu" else [str(self.device)]
        more += [f"strides {list(self.stride or ())}"] if list(self.stride or ()) != dense else []
        more += ["requires grad"] if self.requires_grad else []
        more += [f"placed {self.placed.placements}"] if self.placed is not None else []
        return ", ".join([f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}", *more])


def tensor_facts(t: Tensor) -> TensorFacts:
    """Return what a key says of a tensor. Raises CaptureError for one that cannot be captured."""
    sig = getattr(t, "sig", None)  # a value of a recording under way
    if sig is not None:
        return TensorFacts(
            t.__class__, t.requires_grad, sig.dtype, sig.shape, sig.device, sig.stride, 0
        )
    if isinstance(t, UninitializedTensorMixin):
        raise CaptureError(
            f"a lazy module has a parameter or buffer without a shape{at(user_line())}; call the "
            "module once before it is compiled"
        )
    if t.is_nested:  # it has no shape, and is refused where it is used
        return TensorFacts(t.__class__, t.requires_grad, t.dtype, (), t.device, None, 0)
    stride = t.stride() if t.layout is torch.strided else None
    keys = torch._C._dispatch_keys(t).raw_repr()  # type: ignore[attr-defined]
    placed = t._spec if is_dtensor(t) else None
    return TensorFacts(
        t.__class__, t.requires_grad, t.dtype, t.shape, t.device, stride, keys, placed
    )


class Named(NamedTuple):
    """An object known by its identity alone."""

    name: str
    number: int

    def __str__(self) -> str:
        return self.name


class AnyNumber(Enum):
    """A number that may be any, in keys and for people."""

    FLOAT = "float"
    INT = "int"

    def __repr__(self) -> str:
        return f"any {self.value}"


def noted(x: Any) -> Any:
    """Return a note of ``x`` that does not keep it alive."""
    if isinstance(x, Tensor):
        return tensor_facts(x)
    if is_value(x):
        return x
    named = isinstance(x, type | types.FunctionType | types.BuiltinFunctionType)
    return Named(x.__qualname__ if named else f"a {type(x).__qualname__}", id(x))


# ----- arguments ---------------------------------------------------------------------------------


def describe_argument(x: Any, key: list, tensors: list[Tensor], objects: list[Any]) -> None:
    """Append an argument tree's key to ``key``, its ``tensors`` and ``objects`` to these."""
    try:
        cls = x.__class__
    except Exception as e:
        raise without_class(x) from e
    if cls in TENSORS:
        try:
            key += (
                cls,
                x.shape,
                x.stride(),
                x.dtype,
                x.device,
                x.requires_grad and 1 + x.is_leaf,
                x.is_conj(),
                x.is_inference(),
            )
        except RuntimeError:  # a nested tensor has no shape
            check_kind(x)
            raise
        tensors.append(x)
        if x.__dict__:
            describe_attributes(x, key, objects)
    elif cls in ATOMS:
        key += (cls, x)
    elif cls is float:
        key += (cls, x.hex())
    elif cls is tuple or cls is list:
        key += (cls, len(x))
        for v in x:
            describe_argument(v, key, tensors, objects)
    elif cls is dict:
        key += (dict, tuple(x), tuple(map(type, x)))
        for v in x.values():
            describe_argument(v, key, tensors, objects)
    elif isinstance(x, Tensor):
        key.append(cls)
        sig = getattr(x, "sig", None)  # a value of a recording under way
        key += (x.requires_grad and 1 + x.is_leaf, x.is_conj(), x.is_inference())
        key += (sig.start,) if sig is not None else (x.shape, x.stride(), x.dtype, x.device)
        key.append(x._spec if is_dtensor(x) else None)
        known = {CLASS: cls, **x.__dict__} if sig is None else x.__dict__
        key += (isinstance(x, nn.Parameter), known.get(CLASS))
        if library_of_module(getattr(known.get(CLASS), "__module__", "torch")) not in CLOSED:
            objects.append(known[CLASS])  # its methods are found on the stand-in
        tensors.append(x)
        describe_attributes(x, key, objects)
    elif is_value(x):
        key += (cls, bits(x))
        if library_of_module(cls.__module__) not in CLOSED:
            objects += (cls, getattr(x, "__dict__", {}))
    elif cls is slice:
        key.append(slice)
        for v in (x.start, x.stop, x.step):
            describe_argument(v, key, [], objects)
    else:
        if cls is PackedSequence and x.batch_sizes.__class__ is Tensor:
            key.append(tuple(x.batch_sizes.tolist()))  # constants of the capture
        leaves, spec = flatten_tree(x)
        if len(leaves) == 1 and leaves[0] is x:
            key.append(object)
            objects.append(x)
        else:
            key.append(spec)
            objects += classes_in(spec)
            for v in leaves:
                describe_argument(v, key, tensors, objects)


def describe_attributes(t: Tensor, key: list, objects: list[Any]) -> None:
    if given := attributes(t):
        key.append(tuple(given))
        objects.append(given)


def first_alike(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Return the position of the first same tensor for each; None if no two are the same."""
    ids = [*map(id, tensors)]
    return None if len({*ids}) == len(ids) else tuple(map(ids.index, ids))


class Shared:
    """The arguments that are tensors of the state, as they were at the capture. Shapes belong to
    the key and to the check, so only tensors need comparing whose shape occurs on both sides."""

    def __init__(self, tensors: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        shapes = {t.shape for t in tensors} & {t.shape for t in found}
        self.given = [i for i, t in enumerate(tensors) if t.shape in shapes]
        self.found = [i for i, t in enumerate(found) if t.shape in shapes]
        self.places = self.of(tensors, found)

    def of(
        self, tensors: Sequence[Tensor], found: Sequence[Tensor]
    ) -> tuple[int | None, ...] | None:
        return reached_tensors([tensors[i] for i in self.given], [found[i] for i in self.found])

    def again(self, tensors: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
        """Return whether the same arguments are tensors of the state as at the capture."""
        return not self.given or self.of(tensors, found) == self.places


def reached_tensors(
    tensors: Sequence[Tensor], found: Sequence[Tensor]
) -> tuple[int | None, ...] | None:
    """Return which tensor ``found`` in the state each of these is; None if none is."""
    if not found or {*map(id, tensors)}.isdisjoint(map(id, found)):
        return None
    places = {id(t): i for i, t in enumerate(found)}
    return tuple([places.get(id(t)) for t in tensors])


def classes_in(spec: TreeSpec) -> list[type]:
    """Return the user's classes in a tree, whose methods the function may call."""
    named = (spec.type, *(spec.context if isinstance(spec.context, tuple) else (spec.context,)))
    found = [
        c for c in named if isinstance(c, type) and library_of_module(c.__module__) not in CLOSED
    ]
    return [*found, *[c for child in spec.children() for c in classes_in(child)]]


# ----- surroundings ------------------------------------------------------------------------------


#: the meaning of each part of :func:`environment_key`
ENVIRONMENT = (
    *("grad mode", "inference mode", "forward AD level", "default dtype", "default device"),
    "autocast",
    "deterministic algorithms",
    *("validation of distributions", "autocast's dtypes"),
)


# bound once: each call reads them all
_grad, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_default_dtype, _deterministic = torch.get_default_dtype, torch._C._get_deterministic_algorithms
_autocast, _flash = torch._C._is_any_autocast_enabled, torch._C._get_flash_sdp_enabled
_math, _mem_efficient = torch._C._get_math_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled
#: autocast's default dtypes, where it is off, too: the function may switch it on
_casts = [
    functools.partial(torch.get_autocast_dtype, device)
    for device in ("cpu", *(["cuda"] if torch.backends.cuda.is_built() else []))
]
USUAL_CASTS = tuple([read() for read in _casts])

#: what :func:`environment_key` reads: functions that return one object as long as nothing changes,
#: and attributes that are one
READS = (
    *(_grad, _inference, _default_dtype, _autocast, torch._C._len_torch_function_stack),
    *(_deterministic, _flash, _math, _mem_efficient, *_casts),
)
ATTRIBUTES = ((vars(forward_ad), "_current_level"), (vars(Distribution), "_validate_args"))


def rare() -> bool:
    """Return whether there is more to the surroundings than these: autocast, function modes."""
    return _autocast() or torch._C._len_torch_function_stack() > 0


def environment_key() -> tuple:
    """Return grad modes, autocast, defaults, determinism and attention's kernels."""
    return (
        _grad(),
        _inference(),
        forward_ad._current_level,
        _default_dtype(),
        function_modes_key(),
        Surroundings.now() if _autocast() else None,
        _deterministic(),
        Distribution._validate_args,
        tuple([read() for read in _casts]),
        _flash(),
        _math(),
        _mem_efficient(),
    )

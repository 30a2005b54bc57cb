"""The traced value: a tensor that stands for a value of a recording and answers what a tensor is asked.

It knows its signature and its number in the recording and has no data. Traced values never take part in C++ autograd.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import debug
from ..debug import at
from ..errors import CaptureError
from .shapes import Sig

if TYPE_CHECKING:
    from .tracer import Trace

#: what the layer above knows how to record: ``register_hook(tensor, hook)``
HOOKS: dict[str, Callable] = {}


class _Stack(threading.local):
    def __init__(self) -> None:
        self.traces: list[Trace] = []


under_way = _Stack()


def current() -> Trace | None:
    """The innermost recording under way in this thread."""
    traces = under_way.traces
    return traces[-1] if traces else None


class Traced(Tensor):
    """A tensor that stands for a value of a recording: shape, dtype and device are real, there is no data."""

    tracer: Trace
    ref: int
    sig: Sig

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """An op outside of every recording: a value leaked. It has data if its recording can be run."""
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(Traced, lambda x: x.tracer.value(x), (args, kwargs or {}))
        return func(*args, **kwargs)

    # ----- what autograd would answer -------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self.tracer.requires_grad(self)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if requires_grad and not self.sig.differentiable:
            raise RuntimeError("only Tensors of floating point and complex dtype can require gradients")
        self.tracer.mark_leaf(self, requires_grad)
        return self

    def detach_(self) -> Tensor:  # autograd answers this one itself: it would never be recorded
        self.ref = self.detach().ref
        return self

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return self.tracer.is_leaf(self)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        return self.tracer if self.requires_grad and not self.is_leaf else None

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return self.__dict__.get("_grad")

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.__dict__["_grad"] = value

    def retain_grad(self) -> None:
        self.tracer.retained.append(self)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            if value.shape == self.shape and value.dtype == self.dtype:
                self.copy_(value)
            else:
                raise CaptureError(f"`.data = ` with another shape or dtype is not captured{at(debug.user_line())}")

    def resolve_conj(self) -> Tensor:
        """A copy where eager has a conjugate view, whose bit it would resolve."""
        return self.clone() if self.tracer.conjugated(self.ref) else self

    def __getitem__(self, index: Any) -> Tensor:
        if places := traced_places(index):
            return _read_at(self, index, places)
        return Tensor.__getitem__(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if places := traced_places(index):
            _write_at(self, index, places, value)
        elif index.__class__ is Traced and not index.sig.shape and index.sig.dtype is torch.bool:
            self.copy_(torch.where(index, _assigned(self, value, self.dim()), self))
        else:
            Tensor.__setitem__(self, index, value)

    def narrow(self, dim: int, start: Any, length: int) -> Tensor:
        if isinstance(start, Tensor) and traced_places(start):
            places = torch.arange(length, device=self.device) + torch.where(start < 0, start + self.shape[dim], start)
            return self.index_select(dim, places)
        return Tensor.narrow(self, dim, start, length)

    def backward(self, gradient=None, retain_graph=None, create_graph=False, inputs=None):  # type: ignore
        torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    def register_hook(self, hook: Callable) -> Any:
        return HOOKS["register_hook"](self, hook)

    # ----- what has no answer ----------------------------------------------------------------------------------------

    def numpy(self, *, force: bool = False) -> Any:
        value = _live(self)
        with quiet():
            array = torch._C.TensorBase.numpy(value, force=True)
        array.flags.writeable = False  # what is written there would not be in the recording
        return array

    def tolist(self) -> Any:
        value = _live(self)
        with quiet():
            return value.tolist()

    def data_ptr(self) -> int:
        raise CaptureError(f"a traced value has no memory: .data_ptr() was asked for{at(debug.user_line())}")

    def __array__(self, dtype: Any = None) -> Any:
        value = _live(self)
        with quiet():
            return value.__array__(dtype) if dtype is not None else value.__array__()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"traced({self.sig}, %{self.ref})" if hasattr(self, "sig") else "traced()"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        value = self.tracer._known(self)
        if value is None:
            return repr(self)
        with quiet():
            return format(value, spec)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CaptureError(f"a traced value cannot be pickled{at(debug.user_line())}")


def traced_places(index: Any) -> list[int]:
    """Where an index of numbers and slices has traced 0-dim integers, which PyTorch would ask for their values."""
    parts = index if isinstance(index, tuple) else (index,)
    found = [i for i, p in enumerate(parts) if p.__class__ is Traced and not p.sig.shape and is_integer(p.sig.dtype)]
    plain = found and all(p is None or p is ... or type(p) in (int, slice) for p in parts if p.__class__ is not Traced)
    return found if plain and len(found) == sum(p.__class__ is Traced for p in parts) else []


def is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _rest(x: Tensor, index: Any, places: list[int]) -> tuple[Tensor, list[Tensor | None]]:
    """What the other parts of an index show of ``x``, and an index into that for the traced parts."""
    parts = list(index) if isinstance(index, tuple) else [index]
    numbers = [parts[p] for p in places]
    for p in places:
        parts[p] = slice(None)
    rest = Tensor.__getitem__(x, tuple(parts))
    indices: list[Tensor | None] = [None] * rest.dim()
    for p, i in zip(places, numbers, strict=True):
        kept = [q is None or isinstance(q, slice) for q in parts]  # the dimensions of what they show
        indices[-sum(kept[p:]) if ... in parts[:p] else sum(kept[:p])] = i
    return rest, indices


def _read_at(x: Tensor, index: Any, places: list[int]) -> Tensor:
    """``x[..., i, ...]`` with traced numbers ``i``."""
    rest, indices = _rest(x, index, places)
    if len(places) > 1:
        return torch.ops.aten.index.Tensor(rest, indices)
    dim, i = next((d, i) for d, i in enumerate(indices) if i is not None)
    i = torch.where(i < 0, i + rest.shape[dim], i)
    return rest.index_select(dim, i.reshape(1)).squeeze(dim)


def _write_at(x: Tensor, index: Any, places: list[int], value: Any) -> None:
    """``x[..., i, ...] = value`` with traced numbers ``i``."""
    rest, indices = _rest(x, index, places)
    torch.ops.aten.index_put_.default(rest, indices, _assigned(rest, value, rest.dim() - len(places)))


def _assigned(x: Tensor, value: Any, rank: int) -> Tensor:
    """A value as it is assigned to a part of ``x`` that has this rank."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=x.dtype, device=x.device)
    while value.dim() > rank and value.shape[0] == 1:
        value = value.squeeze(0)
    return value.to(x.dtype)


def _live(x: Traced) -> Tensor:
    return (current() or x.tracer).value(x)


def check_leak(t: Traced) -> None:
    """A value of a finished transform is a constant, unless that transform ran inside one that still runs."""
    if any(x.__class__ is Traced and not x.tracer.finished for x in (*t.tracer.origins, *t.tracer.lifted)):
        raise CaptureError(
            f"a value leaked from an inner transform and is used outside of it{at(debug.user_line())}: "
            "return it from the inner function (has_aux=True)"
        )


def check_kind(t: Tensor) -> None:
    """Refuse the tensors that a recording cannot stand for."""
    if t.layout is not torch.strided or t.is_quantized:
        raise CaptureError(
            f"only dense tensors can be captured, not {t.layout} with dtype {t.dtype}{at(debug.user_line())}"
        )
    if dispatches(t):
        raise CaptureError(f"tensors of the subclass {type(t).__name__} cannot be captured{at(debug.user_line())}")


_KINDS = {Tensor, torch.nn.Parameter, Traced}


def dispatches(t: Tensor) -> bool:
    """Whether a tensor is of a foreign subclass that answers ops itself."""
    cls = type(t)
    return cls not in _KINDS and getattr(cls, "__torch_dispatch__", _plain) is not _plain


_plain = Tensor.__torch_dispatch__


def has_values(t: Tensor) -> bool:
    """Whether a tensor has data to look at: not a FakeTensor, nor on meta, nor a batch of torch.func's."""
    return not (dispatches(t) or t.device.type == "meta" or torch._C._functorch.is_batchedtensor(t))


@contextmanager
def quiet() -> Iterator[None]:
    """No recording meanwhile."""
    with torch._C._DisableTorchDispatch():
        yield

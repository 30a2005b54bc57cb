"""The traced value: a tensor that stands for a value of a recording and answers questions about
it.

It knows its signature and its number in the recording and has no data. If a parameter meets a
traced value, C++ autograd records too; that history is dropped unused.
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
from ..errors import CaptureError, OpError
from .above import above
from .modes import without_modes
from .shapes.sig import Sig

if TYPE_CHECKING:
    from .tracer import Trace


class _Stack(threading.local):
    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self.quiet = 0
        self.branch: Any = None  # the branch of an optimizer's decision


under_way = _Stack()


def current() -> Trace | None:
    """Return the innermost recording under way in this thread."""
    traces = under_way.traces
    return traces[-1] if traces else None


def around(trace: Trace) -> list[Trace]:
    """Return the recordings around this one, outermost first; if it is over, all of them."""
    traces = under_way.traces
    return traces[: traces.index(trace)] if trace in traces else list(traces)


def is_frozen() -> bool:
    """Return whether a program under way would keep the number in a tensor."""
    trace = current()
    return trace is not None and not trace.may_ask_constants


def shows_gradient(t: Tensor) -> bool:
    """Return whether each call of the compiled functions being recorded looks at the ``.grad`` of
    an outside tensor, which may then be read, and bound."""
    compiled = [(trace, trace.graded) for trace in under_way.traces if trace.graded is not None]
    missing = [trace for trace, graded in compiled if id(t) not in graded]
    for trace in missing:
        trace.misses_gradients = True
    return bool(compiled) and not missing


@contextmanager
def no_recording() -> Iterator[None]:
    """Hide the recordings under way in this thread inside the block."""
    traces, under_way.traces = under_way.traces, []
    try:
        yield
    finally:
        under_way.traces = traces


class Traced(Tensor):
    """A tensor that stands for a recorded value: shape, dtype and device, but no data."""

    __slots__ = ("ref", "sig", "tracer")
    tracer: Trace
    ref: int
    sig: Sig

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run an op on a leaked value, which has data if its recording can run."""
        return above("run_outside", func, args, kwargs or {})

    # ----- what autograd would answer ------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        trace = current()
        if trace is None or trace is self.tracer or (ref := trace.seen_as(self)) is None:
            return self.tracer.autograd.requires_grad(self)
        return trace.autograd.requires_grad(self, ref)  # this recording may have written to it

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if requires_grad and not self.sig.differentiable:
            raise RuntimeError(
                "only Tensors of floating point and complex dtype can require gradients"
            )
        self.tracer.autograd.mark_leaf(self, requires_grad)
        return self

    def detach_(self) -> Tensor:  # autograd's own answer is not recorded
        self.ref = self.detach().ref
        return self

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return self.tracer.autograd.is_leaf(self)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        return GradFn() if self.requires_grad and not self.is_leaf else None

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        above("check_grad", self)
        return self.__dict__.get("_grad")

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        above("check_grad", self)
        self.__dict__["_grad"] = value

    def is_inference(self) -> bool:
        return self.tracer.of_inference_mode(self.ref)

    @property
    def _version(self) -> int:  # type: ignore[override]
        trace, ref = self.tracer, self.ref
        found = trace.roots().written[trace.root(ref)]
        for s in reversed(trace.stand_ins):  # `.data = ` starts with the count from before
            if s.new == trace.root(ref) and s.old != s.new:
                ref = s.old
                found += trace.roots().written[trace.root(ref)]
        return found

    def retain_grad(self) -> None:
        if not self.requires_grad:
            raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
        self.tracer.autograd.retained += (self,)

    @property
    def retains_grad(self) -> bool:  # type: ignore[override]
        return not self.is_leaf and any(self is t for t in self.tracer.autograd.retained)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        above("give_memory", self, value)

    def is_conj(self) -> bool:
        """Return eager's answer, though a traced conjugate is computed at once."""
        return self.is_complex() and self.tracer.conjugated(self.ref)

    def resolve_conj(self) -> Tensor:
        """Return a copy if eager has a conjugate view, whose bit it would resolve."""
        return self.clone() if self.tracer.conjugated(self.ref) else self

    def as_subclass(self, cls: type) -> Tensor:  # type: ignore[override]
        """Return a plain tensor, for which a subclass that changes nothing stands."""
        from .tensor_classes import only_adds

        if only_adds(cls) and not issubclass(cls, torch.nn.Parameter):
            return self
        raise CaptureError(
            f"a result here would be of the subclass {cls.__name__}, which changes what tensors "
            f"do{at(debug.user_line())}; inside a captured function compute with "
            "x.as_subclass(torch.Tensor)"
        )

    def __getattr__(self, name: str) -> Any:
        from .tensor_classes import class_attribute

        return class_attribute(self, name)

    def __len__(self) -> int:
        if not self.sig.shape:
            raise OpError.like(
                TypeError(),
                f"len() of a 0-d tensor{at(debug.user_line())}; torch.DoubleTensor and its like "
                "take no traced numbers: use torch.tensor([...], dtype=torch.float64)",
            )
        return self.sig.shape[0]

    def __index__(self) -> int:  # in a frame of its own, see places.subscript
        return Tensor.__index__(self)

    def backward(  # type: ignore[no-untyped-def, override]
        self, gradient=None, retain_graph=None, create_graph=False, inputs=None
    ):
        torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    def register_hook(self, hook: Callable) -> Any:
        return above("register_hook", self, hook)

    def register_post_accumulate_grad_hook(self, hook: Callable) -> Any:
        raise CaptureError(
            "register_post_accumulate_grad_hook inside a captured function is not "
            f"supported{at(debug.user_line())}; register it outside, on the leaf"
        )

    # ----- what has no answer --------------------------------------------------------------------

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            self.check_numpy()
        value = _live(self)
        with quiet():
            return above("shown_array", self, torch._C.TensorBase.numpy(value, force=True))

    def check_numpy(self) -> None:
        """Refuse ``.numpy()`` if it would cut a derivative silently."""
        if self.requires_grad:
            raise OpError(
                "a value that is being differentiated was turned into a numpy "
                f"array{at(debug.user_line())}, which has no derivative: use torch's functions, "
                "an autograd.Function with a backward, or .detach() it first"
            )

    def tolist(self) -> Any:
        value = _live(self)
        with quiet():
            return value.tolist()

    def storage_offset(self) -> int:
        for trace in (self.tracer, *under_way.traces):
            trace.strided = True
        return Tensor.storage_offset(self)

    def data_ptr(self) -> int:
        raise CaptureError(
            f"a traced value has no memory: .data_ptr() was asked for{at(debug.user_line())}"
        )

    def untyped_storage(self) -> Any:
        from .storage import TracedStorage

        return TracedStorage(self)

    def _typed_storage(self) -> Any:
        from .storage import TracedStorage

        return TracedStorage(self, typed=True)

    def __array__(self, dtype: Any = None) -> Any:
        self.check_numpy()
        value = _live(self)
        with quiet():
            array = value.__array__() if dtype is None else value.__array__(dtype)
            return above("shown_array", self, array) if dtype is None else array

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"traced({self.sig}, %{self.ref})" if hasattr(self, "sig") else "traced()"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        value = self.tracer.known_value(self)
        if value is None:
            return repr(self)
        with quiet():
            return format(value, spec)

    def __deepcopy__(self, memo: dict) -> Tensor:
        """Return a leaf of its own, without a derivative, as in eager."""
        if not self.is_leaf:
            raise OpError(
                "deepcopy of a value that is computed from what requires "
                f"grad{at(debug.user_line())}: only leaves can be copied, in eager too; clone() "
                "keeps the derivative, detach().clone() does not"
            )
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __copy__(self) -> Tensor:
        """Return another tensor object for the same memory, a leaf as in eager."""
        if self.requires_grad:
            raise CaptureError(
                f"copy.copy of a value that requires grad{at(debug.user_line())}; clone() it, or "
                "detach() it"
            )
        return self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the value if no differentiated or batched input leads to it."""
        value = (
            self.tracer.known_value(self)
            if self.tracer.may_ask_constants and not self.requires_grad
            else None
        )
        if value is None:
            raise CaptureError(
                f"a traced value cannot be pickled{at(debug.user_line())}; do so outside"
            )
        with quiet():
            return value.__reduce_ex__(protocol)


#: the attribute that holds the subclass, which adds attributes and methods, of the tensor that a
#: plain one stands for
CLASS = "_class_outside"
#: attributes that a traced value itself answers, and what PyTorch knows a parameter by
_OWN = frozenset({"tracer", "ref", "sig", "_grad"})
_ANSWERED = frozenset({"_grad", "_is_param", CLASS})


def attributes(t: Tensor) -> dict[str, Any]:
    """Return the attributes that Python code has set on a tensor."""
    given = t.__dict__
    if t.__class__ is Traced:
        return {k: v for k, v in given.items() if k not in _ANSWERED}
    if given and not _OWN.isdisjoint(given):
        names = ", ".join(sorted(_OWN.intersection(given)))
        raise CaptureError(
            f"an argument of shape {list(t.shape)} has the attribute {names}; give it another name"
        )
    return given


class GradFn:
    """The ``grad_fn`` of a traced value, which says only that there is one: its graph does not
    exist yet, so it cannot be walked or hooked."""

    def name(self) -> str:
        return "traced"

    def refuse(self, *_: Any) -> Any:
        raise CaptureError(
            "the nodes of autograd's graph are not there inside a captured "
            f"function{at(debug.user_line())}; hooks may be registered on tensors (register_hook) "
            "and modules (register_full_backward_hook)"
        )

    register_hook = register_prehook = refuse
    next_functions = metadata = property(refuse)


def _live(x: Traced) -> Tensor:
    return (current() or x.tracer).value(x)


def check_leak(t: Traced) -> None:
    """Refuse a value of a finished transform inside one still running; else a constant."""
    if any(
        x.__class__ is Traced and not x.tracer.finished
        for x in (*t.tracer.origins, *t.tracer.lifted)
    ):
        raise CaptureError(
            "a value leaked from an inner transform and is used outside of "
            f"it{at(debug.user_line())}: return it from the inner function (has_aux=True)"
        )


def as_if_outside() -> Any:
    """Restore dispatch as outside of ops: rules rely on autograd and batching."""
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _EXCLUDED)


_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()


class quiet:
    """Set the recording and all modes, which programs have been through, aside."""

    __slots__ = ("modes", "recording")

    def __enter__(self) -> None:
        self.modes, self.recording = without_modes(), torch._C._DisableTorchDispatch()
        self.recording.__enter__()
        under_way.quiet += 1

    def __exit__(self, *error: Any) -> None:
        under_way.quiet -= 1
        self.recording.__exit__(*error)
        self.modes.__exit__(*error)

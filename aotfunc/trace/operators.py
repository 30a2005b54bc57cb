"""Record operators and functions that make one new tensor and do nothing else without PyTorch's
dispatcher, which takes a third of the time of recording them.

The dispatcher gets the op after all if something may intercept it (a mode, autocast, torch.func,
forward AD, autograd in C++), or if it is new to the recordings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _is_any_autocast_enabled,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch._ops import OpOverload
from torch.autograd import forward_ad

from .scalars import FIRST, NUMBER, TAKES_NUMBER, generic
from .traced import Traced, under_way
from .tracer import Trace

aten = torch.ops.aten
_recorded_by_autograd = torch._C.TensorBase.requires_grad.__get__  # type: ignore[attr-defined]
_level_of_functorch = torch._C._functorch.maybe_current_level

BINARY = {
    **{f"__{name}__": getattr(aten, name).Tensor for name in ("add", "sub", "mul")},
    **{f"__r{name}__": getattr(aten, name).Tensor for name in ("add", "mul")},
    "__truediv__": aten.div.Tensor,
}
UNARY = {
    **{name: getattr(aten, name).default for name in ("sin", "cos", "tanh", "exp", "log", "sqrt")},
    **{name: getattr(aten, name).default for name in ("relu", "sigmoid", "abs", "neg")},
    "__neg__": aten.neg.default,
}


def is_open(trace: Trace) -> bool:
    """Return whether nothing between PyTorch and this recording may intercept an op."""
    traces = under_way.traces
    return (
        bool(traces)
        and traces[-1] is trace
        and _len_torch_dispatch_stack() == trace.depth
        and not _is_torch_function_mode_enabled()
        and not _is_any_autocast_enabled()
        and forward_ad._current_level < 0
        and _level_of_functorch() is None
        and not under_way.quiet
        and trace.following is None
    )


def unary(name: str, op: OpOverload) -> Callable:
    call, of_torch = op._op, getattr(Tensor, name)

    def method(self: Traced) -> Any:
        trace, ask = self.tracer, getattr(Tensor, name)  # the user may have exchanged it
        if ask is of_torch and is_open(trace) and not _recorded_by_autograd(self):
            found = trace.direct((call, self.sig), (self.ref,))
            if found is not None:
                return found
        return ask(self)

    return method


def binary(name: str, op: OpOverload) -> Callable:
    call, of_torch = op._op, getattr(Tensor, name)
    takes_number, reflected = call in TAKES_NUMBER, name.startswith("__r")

    def method(self: Traced, other: Any) -> Any:
        trace, ask, kind, found = self.tracer, getattr(Tensor, name), type(other), None
        if reflected and isinstance(other, Tensor):
            return NotImplemented  # let the left operand go first
        if ask is not of_torch or not is_open(trace) or _recorded_by_autograd(self):
            return ask(self, other)
        if kind is Traced:
            if other.tracer is trace and not _recorded_by_autograd(other):
                key: tuple = (call, self.sig, other.sig)
                found = trace.direct(key, (self.ref, other.ref))
        elif kind is float or kind is int:
            if trace.lifts_numbers and takes_number and generic(other):
                key = (call, self.sig, kind, NUMBER)
                found = trace.direct(key, (self.ref, FIRST - len(trace.numbers)), other)
            elif kind is float:
                found = trace.direct((call, self.sig, other.hex()), (self.ref,))
            else:
                found = trace.direct((call, self.sig, kind, other), (self.ref,))
        return ask(self, other) if found is None else found

    return method


for name, op in BINARY.items():
    setattr(Traced, name, binary(name, op))
for name, op in UNARY.items():
    setattr(Traced, name, unary(name, op))

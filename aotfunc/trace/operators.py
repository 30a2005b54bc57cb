"""Record operators and functions that make one new tensor and do nothing else without PyTorch's
dispatcher, which takes a third of the time of recording them.

The dispatcher gets the op after all if something may intercept it (a mode, autocast, torch.func,
forward AD, autograd in C++), or if it is new to the recordings.
"""

from __future__ import annotations

from collections.abc import Callable
from sys import _getframe
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

from .. import debug
from ..debug import Line, _is_user
from .scalars import FIRST, NUMBER, TAKES_NUMBER, generic
from .shapes.infer import _deterministic
from .shapes.instr import interned
from .traced import Traced, under_way
from .tracer import Trace

aten = torch.ops.aten
_recorded_by_autograd = torch._C.TensorBase.requires_grad.__get__  # type: ignore[attr-defined]
_default_dtype, _grad_enabled = torch.get_default_dtype, torch.is_grad_enabled
_tangents_enabled = torch._C._is_fwd_grad_enabled
_inference_mode, _wrapper = torch.is_inference_mode_enabled, Tensor._make_wrapper_subclass
_line = tuple.__new__  # Line(...) adds a Python frame
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
#: of all elements
REDUCTIONS = {"sum": aten.sum.default, "mean": aten.mean.default}


def direct(
    trace: Trace,
    key: tuple,
    refs: tuple[int, ...],
    x: Traced,
    y: Traced | None = None,
    number: float | None = None,
) -> Tensor | None:
    """Record an op that makes one new tensor and is known by its key, as the dispatcher would let
    the recording do, with a number as its last argument. The key ends with the global settings.
    Return None for any other op, and if anything between PyTorch and the recording may intercept
    it."""
    traces = under_way.traces
    if (
        not traces
        or traces[-1] is not trace
        or _len_torch_dispatch_stack() != trace.depth
        or _is_torch_function_mode_enabled()
        or _is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or _level_of_functorch() is not None
        or under_way.quiet
        or trace.following is not None
        or _recorded_by_autograd(x)  # (would ask a function mode)
        or (y is not None and _recorded_by_autograd(y))
    ):
        return None
    instr = interned(key)
    if instr is None or not instr.simple or key[-1][0] is not trace.dtype:
        return None
    if number is not None:
        if instr.number is None:
            return None
        trace.numbers.append(number)
    if trace.autograd.made:
        trace.autograd.adopt_leaves()
    # the line is mostly that of the operator, and the value not of inference mode
    frame = _getframe(2)
    code = frame.f_code
    line = (
        _line(Line, (code, frame.f_lasti))
        if _is_user.get(code.co_filename) and debug.watched is None
        else debug.user_line(3)
    )
    trace.records.append((instr, refs, _grad_enabled(), trace.region, line))
    outs = instr.outs
    if _inference_mode():
        t = trace.new(outs)
    else:
        t = _wrapper(Traced, *outs.form)
        t.tracer, t.sig, t.ref = trace, outs, trace.count
        trace.count += 1
    return t if _tangents_enabled() else trace.without_tangents(t)


def unary(name: str, op: OpOverload) -> Callable:
    call, of_torch = op._op, getattr(Tensor, name)

    def method(self: Traced) -> Any:
        trace, ask = self.tracer, getattr(Tensor, name)  # the user may have exchanged it
        if ask is of_torch:
            found = direct(
                trace, (call, self.sig, (_default_dtype(), _deterministic())), (self.ref,), self
            )
            if found is not None:
                return found
        return ask(self)

    return method


def reduction(name: str, op: OpOverload) -> Callable:
    of_all = unary(name, op)

    def method(self: Traced, *args: Any, **kwargs: Any) -> Any:
        return getattr(Tensor, name)(self, *args, **kwargs) if args or kwargs else of_all(self)

    return method


def binary(name: str, op: OpOverload) -> Callable:
    call, of_torch = op._op, getattr(Tensor, name)
    takes_number, reflected = call in TAKES_NUMBER, name.startswith("__r")

    def method(self: Traced, other: Any) -> Any:
        trace, ask, kind, found = self.tracer, getattr(Tensor, name), type(other), None
        if reflected and isinstance(other, Tensor):
            return NotImplemented  # let the left operand go first
        if ask is not of_torch:
            return ask(self, other)
        env = _default_dtype(), _deterministic()
        if kind is Traced:
            if other.tracer is trace:
                key: tuple = (call, self.sig, other.sig, env)
                found = direct(trace, key, (self.ref, other.ref), self, other)
        elif kind is float or kind is int:
            if trace.lifts_numbers and takes_number and generic(other):
                key = (call, self.sig, kind, NUMBER, env)
                refs = self.ref, FIRST - len(trace.numbers)
                found = direct(trace, key, refs, self, None, other)
            elif kind is float:
                found = direct(trace, (call, self.sig, other.hex(), env), (self.ref,), self)
            else:
                found = direct(trace, (call, self.sig, kind, other, env), (self.ref,), self)
        return ask(self, other) if found is None else found

    return method


for name, op in BINARY.items():
    setattr(Traced, name, binary(name, op))
for name, op in UNARY.items():
    setattr(Traced, name, unary(name, op))
for name, op in REDUCTIONS.items():
    setattr(Traced, name, reduction(name, op))

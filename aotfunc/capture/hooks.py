"""Hooks of tensors inside a recording: values whose cotangents pass through functions of the
user's."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import module_tracker
from torch.utils.hooks import RemovableHandle

from .. import debug
from ..debug import at
from ..errors import CaptureError, OpError
from ..trace import outside
from ..trace.holding import holds_traced
from ..trace.records import instr_op, written_slots
from ..trace.traced import Traced
from .autograd_function import call_function
from .deferred import calls_late
from .function_rules import Context


def register_multi_grad_hook(*_: Any, **__: Any) -> RemovableHandle:
    """Refuse hooks of several tensors; those of FlopCounterMode, which follow modules backward, do
    nothing."""
    if sys._getframe(2).f_code.co_filename == module_tracker.__file__:
        return RemovableHandle(OrderedDict())
    raise CaptureError(
        "hooks of several tensors inside a captured function are not "
        f"supported{at(debug.user_line())}"
    )


def reads(instr: Any, refs: Sequence[int], ref: int) -> bool:
    """Return whether a step has a derivative with respect to ``ref`` as it was before: not the
    value that it writes there."""
    return instr_op(instr) is not torch.ops.aten.detach.default and all(
        refs[s] != ref for s in written_slots(instr)
    )


def register_hook(t: Traced, hook: Callable) -> Any:
    """Register a tensor hook: from here on ``t`` is a value whose cotangent passes through the
    hook. Refused where autograd's hook would see more: earlier uses of ``t``, or an input's
    gradient after a write."""
    trace = t.tracer
    if not t.requires_grad:
        raise OpError(
            "cannot register a hook on a tensor that doesn't require "
            f"gradient{at(debug.user_line())}"
        )
    own = trace.root(t.ref)
    compiled = not trace.may_ask_constants
    if compiled and own == t.ref < len(trace.inputs) and own not in trace.roots().written:
        return register_outside(t, hook)
    if any(
        t.ref in refs and grad and reads(instr, refs, t.ref)
        for instr, refs, grad, *_ in trace.records
    ):
        raise CaptureError(
            f"a hook of a tensor that was used before{at(debug.user_line())}: register it at once"
        )
    if own < len(trace.inputs) and own in trace.roots().written:
        raise CaptureError(
            f"a hook of an argument that was written to{at(debug.user_line())}: register it "
            "first, outside"
        )

    calls_late(hook)
    why = f"a tensor with a hook{at(debug.user_line())} shares memory, and one is written "
    why += "or both are returned; "
    why += "register the hook on a clone()"

    before = next((s for s in trace.stand_ins if s.hooks and s.new == t.ref), None)
    hooks = (hook,) if before is None else (*before.hooks, hook)
    source = trace.alias(t)
    value = old = source.ref = t.ref if before is None else before.old

    def backward(ctx: Any, g: Tensor) -> Tensor:
        for each in hooks:  # in this order
            changed = each(g)
            g = g if changed is None else changed
        return g

    # a view made under no_grad, which no gradient reaches
    if t.is_leaf and t.ref not in trace.autograd.leaves:
        return _Handle()
    context = Context()
    context.materialize_grads = False
    with torch.enable_grad():
        t.ref = call_function(
            "hook", [source], lambda ctx: source.view_as(source), context, backward
        ).ref
    trace.stand_ins.append(outside.StandIn(len(trace.records), value, old, t.ref, why, hooks))
    if own < len(trace.inputs):
        trace.hooked.add(t.ref)
    return _Handle()


def register_outside(t: Traced, hook: Callable) -> _Handle:
    """Let every call register the hook on its argument, whose gradient is that of other uses,
    too."""
    if holds_traced(hook, set()):
        raise CaptureError(
            f"a hook of an argument reads what is computed inside{at(debug.user_line())}: "
            "register it on x.view_as(x)"
        )
    t.tracer.given_hooks.append((t.ref, hook))
    return _Handle()


def before_hooks(t: Traced) -> Traced:
    """Return the value that a tensor was before hooks were registered on it: its gradient has
    passed them."""
    hooked = {s.new: s.old for s in t.tracer.stand_ins if s.hooks}
    twin = t.tracer.alias(t)
    while twin.ref in hooked:
        twin.ref = hooked[twin.ref]
    return t if twin.ref == t.ref else twin


class _Handle:
    def remove(self) -> None:
        raise CaptureError(
            f"a tensor hook cannot be removed inside a captured function{at(debug.user_line())}"
        )

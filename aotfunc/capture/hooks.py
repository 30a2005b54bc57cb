"""Record hooks of tensors as values whose cotangents pass through functions of the user's."""

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
from ..trace.records import Region, instr_op, n_new_values, written_slots
from ..trace.traced import Traced
from ..trace.tracer import Trace
from .autograd_function import End, call_function
from .deferred import Deferred, calls_late
from .function_rules import Context
from .live_hooks import Handle, Identity, IgnoresTangents, SharedIdentity, TensorHooks


def register_multi_grad_hook(*_: Any, **__: Any) -> RemovableHandle:
    """Refuse hooks of several tensors; ignore FlopCounterMode's, which follow modules."""
    if sys._getframe(2).f_code.co_filename == module_tracker.__file__:
        return RemovableHandle(OrderedDict())
    raise CaptureError(
        "hooks of several tensors inside a captured function are not "
        f"supported{at(debug.user_line())}"
    )


class Hooked(IgnoresTangents):
    """A node whose hooks are recorded as programs."""

    hooked = True


def reads(instr: Any, refs: Sequence[int], ref: int) -> bool:
    """Return whether a step has a derivative with respect to the value of ``ref`` before it."""
    return instr_op(instr) is not torch.ops.aten.detach.default and all(
        refs[s] != ref for s in written_slots(instr)
    )


def register_hook(t: Traced, hook: Callable) -> Any:
    """Register a tensor hook: from here on ``t`` is a value whose cotangent passes through the
    hook. Refuse it if autograd's hook would see more: earlier uses of ``t``, or an input's
    gradient after a write."""
    trace = t.tracer
    if not t.requires_grad:
        raise OpError(
            "cannot register a hook on a tensor that doesn't require "
            f"gradient{at(debug.user_line())}"
        )
    if trace.live_hooks is not None and made_before(trace, t.ref):
        raise CaptureError(
            f"a checkpoint registers a hook on a tensor that it is given{at(debug.user_line())}, "
            "and would do so again in the backward; register it outside of the checkpoint, or on "
            "x.view_as(x)"
        )
    own = trace.root(t.ref)
    if (
        trace.live_hooks is not None
        and own == t.ref < len(trace.inputs)
        and own not in trace.roots().written
    ):
        return register_outside(t, hook)
    too_late = ""  # to be recorded
    if any(
        t.ref in refs and grad and reads(instr, refs, t.ref)
        for instr, refs, grad, *_ in trace.records
    ):
        too_late = f"a tensor that was used before{at(debug.user_line())}: register it at once"
    if own < len(trace.inputs) and own in trace.roots().written:
        too_late = f"an argument that was written to{at(debug.user_line())}: register it first"
    if too_late and trace.live_hooks is None:
        raise CaptureError(f"a hook of {too_late}")

    why = f"a tensor with a hook{at(debug.user_line())} shares memory, and one is written "
    why += "or both are returned; "
    why += "register the hook on a clone()"

    before = next((s for s in trace.stand_ins if s.hooks and s.new == t.ref), None)
    if before is not None and written_since(trace, t.ref, before.start):
        before = None  # the hooks are those of the value before
    handle = Handle(hook, at(debug.user_line()))
    handles = (handle,) if before is None else (*before.hooks, handle)
    mine = TensorHooks(handles)
    source = trace.alias(t)
    value = old = source.ref = t.ref if before is None else before.old

    def backward(ctx: Any, g: Tensor) -> Tensor:
        for each in mine.held:  # keep this order
            changed = each(g)
            g = g if changed is None else changed
        return g

    # a view made under no_grad, which no gradient reaches
    if t.is_leaf and t.ref not in trace.autograd.leaves:
        return handle
    context = Context()
    context.materialize_grads = False
    with torch.enable_grad():
        t.ref = call_function(
            "hook", [source], lambda ctx: source.view_as(source), context, backward, kind=Hooked
        ).ref
    waiting, link = trace.deferred[-1], SharedIdentity()
    recorded, waiting.hooks, mine.ref = waiting.make, mine, t.ref

    def make(d: Deferred) -> tuple[End, list[int]]:
        for each in handles:
            each.settled = True
        if d.live:
            link.live = mine
            return End(Identity("a hook", (t.sig,), (), link)), []
        if too_late and mine.held:
            raise CaptureError(f"a hook of {too_late}")
        calls_late(*mine.held)
        return recorded(d)

    waiting.make = make
    trace.stand_ins += (outside.StandIn(len(trace.records), value, old, t.ref, why, handles),)
    if own < len(trace.inputs):
        trace.hooked |= {t.ref}
    return handle


def written_since(trace: Trace, ref: int, start: int) -> bool:
    """Return whether a record from ``start`` on writes to a value's memory in autograd's view."""
    return any(
        grad and trace.root(refs[s]) == trace.root(ref) and refs[s] in trace.autograd.active()
        for instr, refs, grad, *_ in trace.records[start:]
        for s in written_slots(instr)
    )


def made_before(trace: Trace, ref: int) -> bool:
    """Return whether a value is older than the checkpoint being recorded."""
    if trace.region is None:
        return False
    number, end = lambda r: r.number if isinstance(r, Region) else r or 0, len(trace.inputs)
    for instr, _, _, region, _ in trace.records:
        end += n_new_values(instr)
        if ref < end:
            return ref < len(trace.inputs) or number(region) < number(trace.region)
    return True


def register_outside(t: Traced, hook: Callable) -> Handle:
    """Register the hook on the argument at every call: its gradient includes other uses."""
    handle = Handle(hook, at(debug.user_line()))
    t.tracer.given_hooks += ((t.ref, handle),)
    return handle


def before_hooks(t: Traced) -> Traced:
    """Return a tensor's value before it had hooks: its gradient has passed them."""
    hooked = {s.new: s.old for s in t.tracer.stand_ins if s.hooks}
    twin = t.tracer.alias(t)
    while twin.ref in hooked:
        twin.ref = hooked[twin.ref]
    return t if twin.ref == t.ref else twin

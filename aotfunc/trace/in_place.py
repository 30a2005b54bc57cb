"""Apply the effects of an op that writes to traced tensors: return its results, give them new
metadata, and refuse what cannot be recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..debug import at, user_line
from ..errors import CaptureError, OpError
from . import histories
from .nested import leaves
from .shapes.sig import Facts, Sig
from .traced import Traced, quiet
from .writes import twin_of

if TYPE_CHECKING:
    from .tracer import Trace

aten = torch.ops.aten
_wrapper = torch.Tensor._make_wrapper_subclass
_grad_enabled = torch.is_grad_enabled
_tangents_enabled = torch._C._is_fwd_grad_enabled

SHAPE_OF_GRADIENT = (
    " changes the shape of a tensor whose gradient would keep the old one; make a view of it"
)

#: ops that replace a tensor's value, and its derivative
OVERWRITES = frozenset(
    getattr(packet, name)
    for packet in (aten.copy_, aten.zero_, aten.fill_)
    + (aten.eq_, aten.ne_, aten.lt_, aten.le_, aten.gt_, aten.ge_)
    for name in packet.overloads()
)


def write_results(
    trace: Trace, op: OpOverload, outs: Any, args: tuple, kwargs: dict | None
) -> Any:
    """Return a writing op's results: the written arguments, refreshed."""
    facts = Facts(op)
    if kwargs and (made := resize_out(trace, op, outs, args, kwargs)) is not None:
        return made
    if not (_tangents_enabled() or torch.is_inference_mode_enabled()):
        raise CaptureError(
            "a write where forward-mode derivatives are switched "
            f"off{at(user_line(3))}: assign a new tensor"
        )

    def argument(i: int) -> Any:
        return args[i] if i < len(args) else (kwargs or {}).get(facts.names[i])

    if trace.hooked:
        keep_hooked(trace, [argument(i) for i in facts.writes])
    if _grad_enabled():
        given = leaves([*args, *kwargs.values()] if kwargs else args)
        to = leaves([argument(i) for i in facts.writes])
        histories.keep_off(trace, facts, [t for t in given if isinstance(t, Tensor)], to)
    single = not isinstance(outs, tuple)
    results = []
    for sig, same in zip((outs,) if single else outs, facts.same, strict=False):
        if same is None:
            results.append(trace.wrap(sig))
            continue
        t = argument(same)
        if (
            t.__class__ is Traced
            and t.tracer is trace
            and _grad_enabled()
            and trace.autograd.leaves
            and trace.autograd.refuses_writes(t)
        ):
            raise OpError(
                "a leaf Variable that requires grad is being used in an in-place "
                f"operation{at(user_line(3))}: write under torch.no_grad(), or to a clone() of it"
            )
        if sig.__class__ is Sig and sig.shape != tuple(t.shape) and not facts.reshapes:
            raise CaptureError(
                f"out= has the shape {list(t.shape)}, the result has "
                f"{list(sig.shape)}{at(user_line(3))}; resizing is not captured: pass a "
                "tensor of the result's shape"
            )
        if (
            t.__class__ is Traced
            and t.tracer is trace
            and sig is not t.sig
            and sig.__class__ is Sig
        ):
            refresh(t, sig)
        if t.__class__ is Traced:
            uncount(t)
        results.append(t)
    return results[0] if single and results else tuple(results) if results else None


def resize_out(trace: Trace, op: OpOverload, outs: Any, args: tuple, kwargs: dict) -> Any:
    """Return the results of an op that would resize its ``out=`` argument, if the function has
    made that tensor and nothing else shows it: it becomes the op's result. None otherwise."""
    names, twin = [Facts(op).names[i] for i in Facts(op).writes], twin_of(op)
    if twin is None or not all(n in kwargs for n in names):
        return None
    to, sigs = [kwargs[n] for n in names], outs if isinstance(outs, tuple) else (outs,)
    if all(t.shape == sig.shape for t, sig in zip(to, sigs, strict=True)):
        return None
    record, read = trace.records.pop(), {*map(id, leaves(args))}
    if not all(id(t) not in read and is_alone(trace, t) for t in to):
        trace.records.append(record)
        return None
    with trace:
        made = twin(*args, **{k: x for k, x in kwargs.items() if k not in names})
        for t, sig, new in zip(
            to, sigs, made if isinstance(made, tuple | list) else (made,), strict=True
        ):
            laid = new.new_empty_strided(sig.shape, sig.stride, dtype=sig.dtype)
            laid.copy_(new)
            t.ref = laid.ref
            refresh(t, laid.sig)
    return tuple(to) if isinstance(outs, tuple) else to[0]


def is_alone(trace: Trace, t: Tensor) -> bool:
    """Return whether this recording made a tensor without a gradient, in memory of its own."""
    if t.__class__ is not Traced or t.tracer is not trace or t.requires_grad:
        return False
    return (
        t.ref >= len(trace.inputs)
        and trace.root(t.ref) == t.ref
        and t.ref not in trace.roots().of.values()
    )


def check_reshaped(trace: Trace, op: OpOverload, t: Tensor, new: Sig) -> None:
    """Refuse in-place changes of shape that an outside tensor would not follow."""
    name, line = op._schema.name.removeprefix("aten::"), at(user_line(3))
    if t.__class__ is not Traced or t.tracer is not trace:
        raise CaptureError(
            f"{name} changes the shape of a tensor from outside, of shape "
            f"{list(t.shape)}{line}; pass it as an argument, or make a view of it"
        )
    if not _grad_enabled() and t.ref >= len(trace.inputs) and not t.is_leaf:
        raise CaptureError(f"{name} under no_grad{SHAPE_OF_GRADIENT}{line}")
    if name in ("set_", "resize_as_"):
        raise CaptureError(
            f"{name} gives a tensor the shape or memory of another{line}; assign a new tensor"
        )
    if name == "resize_" and trace.autograd.requires_grad(t):
        raise RuntimeError(f"cannot resize variables that require grad{line}")
    if name == "resize_" and new.extent > t.sig.extent:
        raise CaptureError(
            f"{name} makes a tensor larger, by elements without a value{line}; make a new tensor"
        )


def refresh(t: Traced, sig: Sig) -> None:
    """Give ``t`` other metadata from here on (``unsqueeze_``, a resized ``out=``)."""
    fresh = _wrapper(Traced, *sig.form)
    with quiet():
        torch._C.TensorBase.data.__set__(t, fresh)
    t.sig = sig


def uncount(t: Traced) -> None:
    """Take back the count of a write, which PyTorch makes next. C++ autograd, whose record of
    traced values is dropped, would make older views again of what ``t_()`` has reshaped."""
    if t.tracer.keeps_intent and not t.tracer.of_a_rule:
        count = (torch._C.TensorBase._version.__get__(t) - 1) % 2**32
        torch._C._autograd._unsafe_set_version_counter((t,), (count,))


def keep_hooked(trace: Trace, written: list) -> None:
    if any(t.__class__ is Traced and trace.root(t.ref) in trace.hooked for t in leaves(written)):
        line = at(user_line(3))
        raise CaptureError(
            f"a write to an argument with a hook{line}: register the hook after it, on a new "
            "tensor"
        )

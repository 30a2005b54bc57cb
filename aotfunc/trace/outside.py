"""Refuse or record changes that ``f`` makes without an op, to the memory, the gradient or the
flags of a tensor: a recording would not see them, and a traced value left in an outside tensor has
no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..debug import at, user_line
from ..errors import CaptureError
from .in_place import refresh
from .kinds import is_dtensor
from .marks import hidden_write
from .patches import ORIGINALS, Attribute, Code
from .records import written_slots
from .shapes.sig import Sig
from .traced import Traced, around, current, quiet, shows_gradient

if TYPE_CHECKING:
    from .tracer import Trace

ONCE = "that would happen during the capture only: do so outside"
_base = torch._C.TensorBase
_data, _grad = _base.data, _base.grad


def data(self: Tensor) -> Tensor:
    return _data.__get__(self) if current() is None else self.detach()


def set_data(self: Tensor, value: Any) -> None:
    if current() is not None:
        give_memory(self, value)
    else:
        _data.__set__(self, with_data(value))


def refuse_grad(self: Tensor, value: Any) -> None:
    trace = current()
    if trace is None:
        value = with_data(value)
    elif (
        value.__class__ is Traced or not (trace.may_ask_constants or value is _grad.__get__(self))
    ) and (trace.graded is None or not shows_gradient(self)):
        raise CaptureError(
            f"`.grad = ` of a tensor from outside, of shape {list(self.shape)}, is not "
            f"captured{at(user_line())}; return the gradient and assign it outside"
        )
    _grad.__set__(self, value)


def with_data(value: Any) -> Any:
    """Return a value that leaked from a finished recording as a tensor that has data."""
    return value.tracer.value(value) if value.__class__ is Traced else value


def requires_grad_(self: Tensor, requires_grad: bool = True) -> Tensor:
    if bool(requires_grad) != self.requires_grad:
        check_flag(self, "requires_grad_()")
    return _base.requires_grad_(self, requires_grad)


def detach_(self: Tensor) -> Tensor:
    if self.requires_grad:
        check_flag(self, "detach_()")
    return _base.detach_(self)


def checked_register_hook(self: Tensor, hook: Callable) -> Any:
    check_flag(self, "register_hook()")
    return ORIGINALS["tensor_hook"](self, hook)


def register_post_accumulate_grad_hook(self: Tensor, hook: Callable) -> Any:
    check_flag(self, "register_post_accumulate_grad_hook()")
    return ORIGINALS["post_accumulate_hook"](self, hook)


def check_flag(t: Tensor, what: str) -> None:
    """Refuse to set a flag, which a function compiled once would set once."""
    trace = current()
    made_now = torch._C._functorch.is_functorch_wrapped_tensor(t)  # by torch.func
    if trace is not None and not trace.may_ask_constants and not made_now:
        raise CaptureError(
            f"{what} of a tensor from outside, of shape {list(t.shape)}, would happen during the "
            f"capture only{at(user_line())}; do it outside, or pass the tensor as an argument"
        )


def resize_storage(self: torch.UntypedStorage, size: int) -> Any:
    trace = current()
    if trace is not None and not trace.may_ask_constants:
        raise CaptureError(f"a storage is resized{at(user_line())}; {ONCE}")
    return torch._C.StorageBase.resize_(self, size)


def reached(trace: Trace) -> Iterator[Tensor]:
    """Yield the tensors outside of all recordings that a recording has met."""
    for t in (*trace.origins, *trace.lifted):
        inside = t.__class__ is Traced
        yield from reached(t.tracer) if inside else (t,)  # type: ignore[attr-defined]


def unpack_dual(tensor: Tensor, *, level: int | None = None) -> Any:
    """Unpack what the function has made dual itself; a traced value does not know the tangents of
    an argument, or of what was computed from one."""
    read, trace = ORIGINALS["unpack_dual"], current()
    found = read(tensor, level=level)
    if trace is not None and tensor.__class__ is Traced and found.tangent is None:
        with quiet():
            known = [read(t)[1] for t in reached(trace)]
        if any(t is not None for t in known):
            raise CaptureError(
                "unpack_dual() asks for a tangent that comes from outside of the captured "
                f"function{at(user_line())}; call it outside, or use aotfunc.jvp"
            )
    return found


def swap_tensors(t1: Tensor, t2: Tensor) -> None:
    if t1.__class__ is not t2.__class__ or t1.__class__ is not Traced:
        raise CaptureError(
            f"swap_tensors exchanges the memory of tensors from outside{at(user_line())}; write "
            "to the memory that they have: `with torch.no_grad(): x.copy_(value)`"
        )
    ORIGINALS["swap"](t1, t2)


def _swap_template(t1, t2):  # type: ignore[no-untyped-def]
    f = _torch_swap if _aotfunc_recording() is None else _aotfunc_swap  # type: ignore # noqa: F821
    return f(t1, t2)


#: ways of changing a tensor; reading ``.grad`` stays as fast as it was
PATCHES = (
    Attribute("data", Tensor, "data", property(data, set_data, doc=_data.__doc__)),
    Attribute(
        "tensor_grad",
        Tensor,
        "grad",
        property(_grad.__get__, refuse_grad, _grad.__delete__, _grad.__doc__),
    ),
    Attribute("requires_grad_", Tensor, "requires_grad_", requires_grad_),
    Attribute("detach_", Tensor, "detach_", detach_),
    Attribute("tensor_hook", Tensor, "register_hook", checked_register_hook),
    Attribute(
        "post_accumulate_hook",
        Tensor,
        "register_post_accumulate_grad_hook",
        register_post_accumulate_grad_hook,
    ),
    Attribute("resize_storage", torch.UntypedStorage, "resize_", resize_storage),
    Attribute("unpack_dual", forward_ad, "unpack_dual", unpack_dual),
    Code("swap", torch.utils.swap_tensors, swap_tensors, _swap_template),
)


def check_outside_hooks(trace: Trace | None, t: Tensor, line: str) -> None:
    """Refuse a gradient, taken at ``line`` of a recording, by a tensor from outside with hooks, as
    autograd would call these. Hooks of inputs are checked at each call."""
    if trace is None:
        hooks: Any = t._backward_hooks or t.retains_grad
    else:
        ref = trace.ref_of(t)[0]
        if ref < len(trace.inputs):
            trace.differentiated = {**trace.differentiated, ref: line}
        if ref < 0:  # it is outside of the enclosing recording, too, or a value of that
            return check_outside_hooks(next(reversed(around(trace)), None), t, line)
        hooks = any(s.hooks and s.new == ref for s in trace.stand_ins)
    if hooks:
        raise CaptureError(
            f"a tensor from outside, of shape {list(t.shape)}, has hooks or retains its gradient, "
            f"and is differentiated inside a captured function{line}: differentiate x.view_as(x), "
            "and apply what the hooks do"
        )


# ----- traced values -----------------------------------------------------------------------------


def check_grad(t: Traced) -> None:
    """Refuse an argument's ``.grad``: it is another tensor at each call."""
    trace = t.tracer
    if not trace.may_ask_constants and any(t is a for a in trace.arguments):
        raise CaptureError(
            f"the .grad of an argument is not captured{at(user_line())}; pass gradients as "
            "arguments, and return them: torch.autograd.grad(...), or grad(f)"
        )


def give_memory(t: Tensor, value: Tensor) -> None:
    """Record ``t.data = value``: ``t`` becomes a copy of ``value`` with its old derivative; older
    views stay. Each call of a compiled function gives arguments, and tensors from outside, their
    new memory when the program is over."""
    trace, line = current(), user_line()
    assert trace is not None
    inside = t.__class__ is Traced and t.tracer is trace  # type: ignore[attr-defined]
    outside = not inside or any(t is a for a in trace.arguments)
    captured = trace.rebound is not None and trace.region is None and not is_dtensor(t)
    if outside and not captured:
        raise CaptureError(
            "`.data = ` gives an argument, or a tensor from outside, other memory, which compiled "
            f"functions take outside of checkpoints and for plain tensors{at(line)}; write to "
            "the memory that it has: `with torch.no_grad(): x.copy_(value)`"
        )
    (ref, sig), (source, new_sig) = trace.ref_of(t), trace.ref_of(value)
    if trace.root(source) == trace.root(ref) and new_sig == sig:
        return  # `p.data /= 2`: the memory that it has
    if (sig.shape, sig.dtype) != (new_sig.shape, new_sig.dtype):
        raise CaptureError(
            f"`.data = ` with another shape or dtype is not captured{at(line)}; make a new tensor"
        )
    with torch.enable_grad():
        new = hidden_write(t if inside else trace.outside_value(t), value.detach())
    if outside and not sig.stride == new_sig.stride == new.sig.stride:
        raise CaptureError(
            f"`.data = ` with other strides is not captured{at(line)}; assign a value laid out as "
            "the tensor is"
        )
    why = (
        f"`.data = ` lets tensors share memory, and one is written or both are returned{at(line)}"
    )
    why += "; assign a clone()"
    if outside and rebind(trace, t, ref, new, source, new_sig):
        raise CaptureError(why)
    trace.stand_ins += (StandIn(len(trace.records), source, ref, new.ref, why),)
    if inside:
        t.ref = new.ref  # type: ignore[attr-defined]
        refresh(t, new.sig)


def rebind(trace: Trace, t: Tensor, ref: int, new: Traced, value: int, sig: Sig) -> bool:
    """Let ``t``, an argument or a tensor from outside, which is ``ref`` by now, be ``new``, in the
    memory of ``value``. Return whether another such tensor has it, too."""
    assert trace.rebound is not None
    first = next((old for old, (now, *_) in trace.rebound.items() if now == ref), ref)
    if first >= len(trace.inputs):
        raise CaptureError(
            f"`.data = ` of an argument that was detached or hooked before{at(user_line())}; "
            "assign first"
        )
    root = trace.root(value)
    trace.rebound[first] = new.ref, root, sig
    if trace.seen_as(t) is not None:
        trace.stand_for(new, t)
    return any(
        other == root and there.offset < sig.extent and sig.offset < there.extent
        for old, (_, other, there) in trace.rebound.items()
        if old != first
    )


class StandIn(NamedTuple):
    """A value that stands, from ``start`` on, for ``old``, and in eager shares memory with
    ``value``: by ``t.data = value``, or a hook. ``why``: the error if that could be seen."""

    start: int
    value: int
    old: int
    new: int
    why: str
    hooks: tuple[Any, ...] = ()


def check_rebound(trace: Trace) -> None:
    """Refuse what is done to a tensor with other memory and would be done to its stand-in alone:
    changes of its history, flags and hooks."""
    autograd, rebound = trace.autograd, trace.rebound or {}
    active = autograd.active()
    told = {*autograd.leaves, *(t.ref for t in autograd.retained)}
    for instr, refs, grad, *_ in trace.records:
        if grad and not active.isdisjoint(refs):
            told.update(trace.root(refs[s]) for s in written_slots(instr))
    told &= {*active, *autograd.leaves}
    for old, (new, *_) in rebound.items():
        if new in told or (old >= 0 and trace.arguments[old].ref not in (old, new)):
            raise CaptureError(
                f"`.data = ` of {'an argument' if old >= 0 else 'a tensor from outside'} that is "
                "then detached, hooked, made to require grad, or written where autograd sees it, "
                "in place: do that before"
            )


def check_stand_ins(trace: Trace, returned: Sequence[int]) -> None:
    """Refuse ops that would tell that a stand-in has memory of its own."""
    root = trace.root
    if trace.rebound:
        check_rebound(trace)
    for start, value, old, new, why, hooks in trace.stand_ins:
        shared, results = {root(value), root(old)}, {root(r) for r in returned}
        later = trace.records[start:]
        used = results | {root(r) for _, refs, *_ in later for r in refs}
        written = {root(refs[s]) for instr, refs, *_ in later for s in written_slots(instr)}
        outside = root(value) < len(trace.inputs)
        told = new in results and (outside or root(value) in results)
        # a view whose memory was written to has another history, without hooks
        renewed = hooks and root(old) != old
        if told or written & shared or (new in written and (renewed or outside or used & shared)):
            raise CaptureError(why)

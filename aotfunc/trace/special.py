"""Ops that a recording answers itself, or records as other ops: questions of values, and ops that
do more than their schemas say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

from ..debug import _OURS, at, user_line
from ..errors import CaptureError
from .arrays import lift_array
from .autograd import needs_grad
from .casts import record_cast
from .caught import RAISING_OPS, catches, raising_first
from .collectives import DIFFERENTIATED, within_function
from .folding import fold_batches, note_expand
from .in_place import refresh, uncount
from .kernels import READ_AS_LAID, misread
from .numbers import forgive
from .outside import StandIn
from .overlaps import crossing_writes
from .places import is_integer, select_traced, subscript
from .records import flat_tensors
from .scalers import OPENED
from .shapes.infer import TOLD, infer
from .shapes.instr import env_key, intern, interned
from .shapes.sig import Slot
from .traced import Traced

if TYPE_CHECKING:
    from .tracer import Trace

aten = torch.ops.aten
NEGATIVE = "var of gaussian_nll_loss is negative"
_DISTRIBUTIONS = os.path.join(os.path.dirname(torch.__file__), "distributions", "")


def _conj(trace: Trace, x: Tensor) -> Tensor:
    """Record ``conj`` as a view, so that writes pass through, and compute its value at once:
    traced values have no lazy conjugate bit."""
    if not x.is_complex():
        return x
    ref, sig = trace.ref_of(x)
    key = (aten._conj.default, sig, env_key())
    instr = interned(key) or intern(key, aten._conj.default, (Slot(0),), {}, (sig,))
    return trace.note(instr, (ref,))


TOLD[aten._conj.default] = lambda x: infer(aten._conj_physical.default, (Slot(0),), {}, (x,))


def _view_as_real(trace: Trace, x: Tensor) -> Any:
    """View an input as real numbers. Copy a lazy conjugate, whose memory is not, first."""
    ref = trace.ref_of(x)[0]
    root = trace.root(ref)
    if not (0 <= root < len(trace.origins) and trace.origins[root].is_conj()):
        return NotImplemented
    with trace:
        copy = x.clone()
        why = f"the real or imaginary part of a conjugated argument{at(user_line())} shares its "
        why += "memory, and is written or returned; pass z.resolve_conj()"
        trace.stand_ins += (StandIn(len(trace.records), ref, ref, copy.ref, why),)
        return torch.view_as_real(copy)


def _lift_fresh(trace: Trace, x: Tensor) -> Any:
    """Record a constant that ``f`` makes on each run, or a tensor of an array's memory."""
    if not x.untyped_storage().resizable():
        return lift_array(trace, x)
    trace.made_inside |= {trace.lift(x)}
    return NotImplemented


def _scalar(trace: Trace, x: Tensor) -> Any:
    try:
        return trace.answer(Tensor.item, [x], "a number")
    except CaptureError as error:
        frame = sys._getframe(2)
        if x.dtype is torch.bool and asks_to_leave_out(frame):
            forgive(error)
            return False
        if x.dtype is torch.bool and (what := validation_check(frame)):
            forgive(error)
            good = what != NEGATIVE  # answer so that no error is raised here
            with trace:
                aten._assert_async.msg(x if good else x.logical_not(), f"invalid values: {what}")
            return good
        spot = subscript(frame) if is_integer(x) else None
        if spot is None:
            raise
        trace.place, trace.refused = (x, spot, error), trace.refused or error
        return 0  # any number serves: `outside[x]` goes on with a select


def asker(asking: FrameType) -> FrameType | None:
    """Return the frame that calls what asks, which is none of ours."""
    frame: FrameType | None = asking
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame


def asks_to_leave_out(asking: FrameType) -> bool:
    """Return whether transformers is asking if a mask, or a warning, can be left out: no is right
    for all values."""
    frame = asker(asking)
    if frame is not None and frame.f_code is Tensor.__contains__.__code__:
        warns = frame.f_back
        return warns is not None and warns.f_code.co_name == PADDING_WARNING
    return frame is not None and frame.f_globals.get("__name__") == "transformers.masking_utils"


PADDING_WARNING = "warn_if_padding_and_no_attention_mask"


def validation_check(asking: FrameType) -> str | None:
    """Return the name of the check if ``torch.distributions`` or a loss is asking; the program
    then checks at each call."""
    frame = asker(asking)
    if frame is not None and frame.f_code is F.gaussian_nll_loss.__code__:
        return NEGATIVE
    if frame is None or not frame.f_code.co_filename.startswith(_DISTRIBUTIONS):
        return None
    names = frame.f_locals
    kind = type(names.get("self")).__name__
    if frame.f_code.co_name not in ("__init__", "_validate_sample", "check"):
        return None
    return f"{names['param']} of {kind}" if "param" in names else kind


def _select(trace: Trace, x: Tensor, dim: int, index: int) -> Any:
    assert trace.place is not None
    place, spot, error = trace.place
    trace.place = None
    if spot != subscript(sys._getframe(2)):
        raise error
    forgive(error)
    with trace:
        return select_traced(x, dim, place)


def _slice(trace: Trace, *_: Any, **__: Any) -> Any:
    assert trace.place is not None
    raise trace.place[2]


def _equal(trace: Trace, a: Tensor, b: Tensor) -> bool:
    try:
        return trace.answer(torch.equal, [a, b], "a truth value")
    except CaptureError as error:
        asking = asker(sys._getframe(2))
        names = () if asking is None else asking.f_code.co_names
        last = [getattr(instr, "op", None) for instr, *_ in trace.records[-2:]]
        if b.dim() or last[-1:] != [aten.new_ones.default] or ASKING.isdisjoint(names):
            raise
        good, what = ASKED_IN_CPP.get(last[0], (None, ""))
        if good is None:
            raise
        forgive(error)
        with trace:
            aten._assert_async.msg(a if good else a.logical_not(), what)
        return good


#: functions that ask in C++ whether a scalar is true, to raise an error
ASKING = {"istft", "cov", "corrcoef"}
#: the comparison asked for -> the answer that is no error, and the error that the program raises
ASKED_IN_CPP = {
    aten.lt.Scalar: (False, "istft: the window is zero where it overlaps with itself"),
    aten.ge.Scalar: (True, "cov(): weights cannot be negative"),
    aten.ne.Scalar: (True, "cov(): weights sum to zero"),
    aten.le.Scalar: (False, "cov(): the degrees of freedom are not positive"),
}


def _check_errors(trace: Trace, info: Tensor, api: str, *, is_matrix: bool) -> Any:
    """Raise the error of a matrix without a factorisation here, where the function would catch it
    and runs once. Any other comes from the program."""
    if trace.may_ask_constants and catches():
        failed = trace.answer(
            lambda info: bool(info.any()), [info], "whether a matrix is singular"
        )
        if failed:
            check = partial(aten._linalg_check_errors, api_name=api, is_matrix=is_matrix)
            trace.answer(check, [info], "which matrix is singular")
    return NotImplemented


def _batch_norm(trace: Trace, x, *args):  # type: ignore[no-untyped-def]
    """Record the functional op: ``native_batch_norm`` hides that it writes statistics."""
    weight, bias, mean, var, train, momentum, eps, *_ = args
    if train and mean is not None:
        out, m, s, new_mean, new_var = aten._native_batch_norm_legit_functional(
            x, weight, bias, mean, var, True, momentum, eps
        )
        with torch.no_grad():
            mean.copy_(new_mean)
            var.copy_(new_var)
        return out, m, s
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, train, momentum, eps)
    return aten._native_batch_norm_legit_no_training(x, weight, bias, mean, var, momentum, eps)


def _with_trace(special: Callable) -> Callable:
    def call(trace: Trace, *args: Any, **kwargs: Any) -> Any:
        with trace:
            return special(trace, *args, **kwargs)

    return call


def _cudnn_batch_norm(trace: Trace, x: Any, *args: Any) -> tuple:
    out, m, s = _batch_norm(trace, x, *args)
    return out, m, s, x.new_empty(0, dtype=torch.uint8)


def _lstsq(trace: Trace, a, b, rcond=None, *, driver=None):  # type: ignore[no-untyped-def]
    """Record lstsq without the residuals that two drivers return only if every matrix has full
    rank, which depends on values. Full rank is assumed if the values are unknown."""
    tall = a.dim() > 1 and a.shape[-2] > a.shape[-1]
    if driver not in ("gelsd", "gelss") or not tall or trace.in_lstsq:
        return NotImplemented
    trace.in_lstsq = True
    try:
        x, none, rank, singular = aten.linalg_lstsq.default(a, b, rcond, driver=driver)
    finally:
        trace.in_lstsq = False
    try:
        full = trace.answer(
            lambda rank: bool((rank == a.shape[-1]).all()), [rank], "the rank of a matrix"
        )
    except CaptureError:
        if trace.samples is not None:
            raise
        full = True
    if not full:
        return x, none, rank, singular
    vector = b.dim() == 1 or (a.dim() - 1 == b.dim() and a.shape[:-1] == b.shape)
    over = (a @ x.unsqueeze(-1)) - b.unsqueeze(-1) if vector else a @ x - b
    return x, over.abs().square().sum(-2), rank, singular


def _batch_norm_with_update(trace: Trace, x: Any, *args: Any) -> tuple:
    *params, momentum, eps = args
    out = _batch_norm(trace, x, *params, True, momentum, eps)
    return *out, x.new_empty(0, dtype=torch.uint8)


def _batch_norm_no_update(trace: Trace, x: Any, *args: Any) -> tuple:
    *params, momentum, eps = args
    out = _batch_norm(trace, x, *params, False, momentum, eps)
    return *out, x.new_empty(0, dtype=torch.uint8)


def _pack_padded(
    trace: Trace, x: Tensor, lengths: Tensor, batch_first: bool
) -> tuple[Tensor, Tensor]:
    """Ask for lengths, which shape the result, and the sizes of recurrent steps."""

    def packed(lengths: Tensor) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(x.shape[0] * x.shape[1]).view(*x.shape[:2], 1)
        return aten._pack_padded_sequence.default(numbers, lengths, batch_first)

    try:
        where, sizes = trace.answer(packed, [lengths], "a number of a packed sequence's lengths")
    except CaptureError as error:
        raise CaptureError(f"{error} Lengths may be a list: lengths.tolist()") from None
    trace.made_inside |= {trace.lift(sizes)}
    with trace:
        return x.flatten(0, 1).index_select(0, where.flatten().to(x.device)), sizes


def _laid(op: OpOverload, trace: Trace, *args: Any, **kwargs: Any) -> Any:
    """Give the arguments of an op the one layout that its kernel reads."""
    copies = misread(op, [trace.ref_of(a)[1] if isinstance(a, Tensor) else None for a in args])
    if not copies:
        return NotImplemented
    with trace:
        return op(
            *[
                a.contiguous(memory_format=copies[i]) if i in copies else a
                for i, a in enumerate(args)
            ],
            **kwargs,
        )


def _on_lists(op: OpOverload, trace: Trace, *args: Any, **kwargs: Any) -> Any:
    """Record a write to the tensors of a list as one write each if only some require grad, as
    autograd sees them one by one, or if one is written to and belongs to another element, too."""
    elements = [flat_tensors(one) for one in zip(*filter(is_list, args), strict=False)]
    shared = flat_tensors([a for a in args if not is_list(a)])
    mixed = {any(map(needs_grad, (*one, *shared))) for one in elements}
    if len(elements) < 2 or (len(mixed) < 2 and not crossing_writes(elements, shared)):
        return NotImplemented
    names = [a.name for a in op._schema.arguments]
    with trace:
        for k in range(len(elements)):
            one = slice(k, k + 1)  # (a tensor of scalars has one for each element)
            each = [
                a[one] if is_list(a) or name == "scalars" else a
                for name, a in zip(names, args, strict=False)
            ]
            op(*each, **kwargs)


def is_list(a: Any) -> bool:
    return isinstance(a, list | tuple)


def _reshape_newest(view: OpOverload, trace: Trace, x: Tensor, *args: Any) -> Any:
    """Record a view in place of an op that reshapes the newest value, which nothing else shows:
    torch's own ``vector @ matrix`` ends in one, and writes cost the recording more."""
    if not (
        x.__class__ is Traced
        and x.tracer is trace
        and x.ref == trace.count - 1
        and trace.records
        and getattr(trace.records[-1][0], "simple", False)
        and x.ref not in trace.autograd.leaves
        and not (trace.autograd.retained or trace.stand_ins)
        and torch.is_grad_enabled()
    ):
        return NotImplemented
    with trace:
        shown = view(x, *args)
    x.ref = shown.ref
    refresh(x, shown.sig)
    uncount(x)
    return x


_LISTS = [
    op
    for name in dir(torch)
    if name.startswith("_foreach_") and name.endswith("_")
    for packet in [getattr(aten, name)]
    for overload in packet.overloads()
    for op in [getattr(packet, overload)]  # (__getattr__ itself would make another one)
]
_ANSWERS: dict[OpOverload, Callable] = {
    **{op: partial(_on_lists, op) for op in _LISTS},
    **{op: partial(_laid, op) for op in READ_AS_LAID},
    **{op: partial(within_function, op) for op in DIFFERENTIATED},
    **OPENED,
    aten.expand.default: note_expand,
    aten.bmm.default: fold_batches,
    aten._local_scalar_dense.default: _scalar,
    aten.equal.default: _equal,
    aten._linalg_check_errors.default: _check_errors,
    aten.lift_fresh.default: _lift_fresh,
    aten.squeeze_.dim: partial(_reshape_newest, aten.squeeze.dim),
    aten.squeeze_.dims: partial(_reshape_newest, aten.squeeze.dims),
    aten.unsqueeze_.default: partial(_reshape_newest, aten.unsqueeze.default),
    aten._conj.default: _conj,
    aten.view_as_real.default: _view_as_real,
    aten._to_copy.default: record_cast,
    aten.native_batch_norm.default: _with_trace(_batch_norm),
    aten._native_batch_norm_legit.default: _with_trace(_batch_norm),
    aten._batch_norm_with_update.default: _with_trace(_batch_norm_with_update),
    aten._batch_norm_no_update.default: _with_trace(_batch_norm_no_update),
    aten.cudnn_batch_norm.default: _with_trace(_cudnn_batch_norm),
    aten.miopen_batch_norm.default: _with_trace(_batch_norm),
    aten.linalg_lstsq.default: _with_trace(_lstsq),
    aten._pack_padded_sequence.default: _pack_padded,
}
_ANSWERS |= {op: partial(raising_first, op, _ANSWERS.get(op)) for op in RAISING_OPS}
#: keyed by the functions behind the overloads, which hash in C
SPECIAL: dict[Any, Callable] = {op._op: answer for op, answer in _ANSWERS.items()}
#: the answers while an index has been asked for its number
AT_A_PLACE = {**SPECIAL, aten.select.int._op: _select, aten.slice.Tensor._op: _slice}

"""Checkpoints inside a recording: regions of it that the backward recomputes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map_only

from .. import debug
from ..debug import at
from ..errors import CaptureError
from ..graph import draws
from ..trace.dtensors import record_function
from ..trace.patches import ORIGINALS, recorder
from ..trace.records import Region, n_new_values, written_slots
from ..trace.shapes.instr import Instr
from ..trace.shapes.sig import fill, floating
from ..trace.traced import Traced, current
from ..trace.tracer import Trace
from .autograd_function import apply_function, call_function
from .deferred import calls_late
from .function_rules import Context


@contextmanager
def recorded_region(trace: Trace, policy: Callable[[Node], int] | None = None) -> Iterator[None]:
    """Record a region that the backward recomputes, except values the policy saves."""
    outer, trace.regions = trace.region, trace.regions + 1
    trace.region = trace.regions if policy is None else Region(trace.regions, policy)
    try:
        yield
    finally:
        trace.region = outer


def name_value(x: Traced, name: str) -> None:
    """Give the record that made a value, or wrote it last, the user's name for it."""
    trace = x.tracer
    end, root = trace.count, trace.root(x.ref)
    for k in reversed(range(len(trace.records))):
        instr, refs, *_ = trace.records[k]
        end -= n_new_values(instr)
        if end <= x.ref or any(trace.root(refs[s]) == root for s in written_slots(instr)):
            trace.named = trace.named or {}
            trace.named[k] = name
            return


def checkpoint_region(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Record ``fn`` as a region that the backward recomputes: a non-reentrant checkpoint."""
    trace = recorder()
    if trace is None:
        yield from ORIGINALS["checkpoint"](fn, *args, **kwargs)
        return
    calls_late(fn)
    start, count = len(trace.records), trace.count
    with recorded_region(trace):
        yield
    if not (args[0] if args else kwargs.get("preserve_rng_state", True)):
        check_preserved(trace, start, count)
    context_fn = kwargs.get(
        "context_fn", args[1] if len(args) > 1 else torch_checkpoint.noop_context_fn
    )
    if context_fn is not torch_checkpoint.noop_context_fn:
        keep_saved(trace, start, context_fn()[0])


def check_preserved(trace: Trace, start: int, count: int) -> None:
    """Refuse random numbers in a region, of the records from ``start`` and the values from
    ``count``, whose generator is not put back: eager's backward draws others."""
    drawn = [
        line
        for instr, *_, line in trace.records[start:]
        if instr.facts.random and (not isinstance(instr, Instr) or draws(as_node(instr)))
    ]
    if drawn and not trace.autograd.active().isdisjoint(range(count, trace.count)):
        raise CaptureError(
            "a checkpoint with preserve_rng_state=False draws random numbers"
            f"{at(drawn[0])}, and would draw others in the backward; say preserve_rng_state=True"
        )


def as_node(instr: Instr) -> Any:
    """Return an op with its literals as what looks like a node."""
    return SimpleNamespace(target=instr.op, args=instr.args, kwargs=instr.kwargs)


def keep_saved(trace: Trace, start: int, context: Any) -> None:
    """Remove from a region, whose records begin at ``start``, the ops that the policy of
    ``create_selective_checkpoint_contexts`` saves."""
    if not hasattr(context, "policy_fn"):
        raise CaptureError(
            "checkpoint(context_fn=...) with contexts of your own is not "
            f"captured{at(debug.user_line())}; those of create_selective_checkpoint_contexts are"
        )
    save = (
        torch_checkpoint.CheckpointPolicy.MUST_SAVE,
        torch_checkpoint.CheckpointPolicy.PREFER_SAVE,
    )
    told = torch_checkpoint.SelectiveCheckpointContext(is_recompute=False)
    for i, (instr, refs, grad, inside, line) in enumerate(trace.records[start:], start):
        if isinstance(instr, Instr) and inside == trace.regions:
            protos = [s.proto for s in instr.sigs]
            args = fill(instr.args, protos)
            kwargs = {k: fill(v, protos) for k, v in instr.kwargs.items()}
            if context.policy_fn(told, instr.op, *args, **kwargs) in save:
                trace.records[i] = (instr, refs, grad, None, line)


def recorded_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``Function.apply`` inside a recording, as reentrant checkpoints do. A compiled one
    without an argument that requires grad has no derivative by what it closes over."""
    trace = current()
    assert trace is not None
    if trace.dtensors and (done := record_function(trace, cls, args)) is not NotImplemented:
        return done
    if cls is not torch_checkpoint.CheckpointFunction:
        return apply_function(cls, *args, **kwargs)
    calls_late(args[0])
    records = len(trace.records)
    given = [a for a in args[2:] if isinstance(a, Tensor)]
    requiring = [a for a in given if a.requires_grad]
    cut = nullcontext() if trace.may_ask_constants or requiring else torch.no_grad()
    count = trace.count
    try:
        with recorded_region(trace), cut:
            result = args[0](*args[2:])
    except RuntimeError as e:
        if "a leaf Variable that requires grad" in str(e):
            raise written_in_checkpoint() from e
        raise
    if not args[1]:
        check_preserved(trace, records, count)
    if trace.may_ask_constants or not (requiring and torch.is_grad_enabled()):
        return result
    roots = {trace.root(trace.ref_of(a)[0]) for a in given}
    if any(
        trace.root(refs[s]) in roots
        for instr, refs, *_ in trace.records[records:]
        for s in written_slots(instr)
    ):
        raise written_in_checkpoint()
    return tree_map_only(Tensor, lambda t: requiring_grad(t, requiring), result)


def written_in_checkpoint() -> CaptureError:
    return CaptureError(
        f"a checkpoint writes to its argument{at(debug.user_line())}, and would do so again in "
        "the backward; say use_reentrant=False, or clone() it there"
    )


def requiring_grad(t: Tensor, because_of: Sequence[Tensor]) -> Tensor:
    """Return a result that requires grad, as a Function's does, without a derivative."""
    if t.requires_grad or not floating(t):
        return t
    return call_function(
        "checkpoint", because_of, lambda ctx: t.clone(), Context(), lambda ctx, g: None
    )

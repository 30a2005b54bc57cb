"""Continue ``autograd.grad`` of a recording through autograd's graph of outside tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..debug import at, user_line
from ..errors import CaptureError
from ..trace.patches import ORIGINALS
from ..trace.traced import Traced, quiet
from ..trace.tracer import Trace
from .calls import Row

#: ``grad_fn`` as it is outside of recordings
node_of = torch._C.TensorBase.grad_fn.__get__


def gradients(
    trace: Trace,
    outs: Sequence[int],
    ins: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    inside: Callable[[Sequence[Tensor]], list],
    retain_graph: bool | None,
    create_graph: bool,
    batched: bool,
) -> list[Tensor | None]:
    """Return the gradients of the values ``outs`` in ``ins``; ``inside`` returns those in the
    recording. At tensors from outside autograd continues, on traced gradients."""
    refs = [trace.ref_of(x)[0] for x in ins]
    real: dict[int, Any] = {
        r: from_outside(trace, r) for r in (*outs, *refs) if open_to_autograd(trace, r)
    }
    if not batched and all(r in real and real[r].requires_grad for r in (*outs, *refs)):
        roots, leaves = [real[ref] for ref in outs], [real[ref] for ref in refs]
        return grad_outside(roots, leaves, cotangents, retain_graph, create_graph, True, True)
    known = {ref: real[ref] for ref in refs if ref in real}
    graphs = outside_ends(trace, outs, refs) if known or not trace.may_ask_constants else {}
    if not graphs:
        return inside(ins)
    if batched or not all(open_to_autograd(trace, ref) for ref in graphs):
        shape = list(next(iter(graphs.values())).shape)
        raise CaptureError(
            f"a tensor from outside, of shape {shape}, was computed there from one that is "
            f"differentiated here{at(user_line())}: compute it inside, or detach() it"
        )
    stops = graphs | known  # gradients in these have a part inside, too
    others = [x for x, ref in zip(ins, refs, strict=True) if ref not in known]
    found = inside([*(outside_value(trace, ref) for ref in stops), *others])
    parts = [(t, g) for t, g in zip(stops.values(), found, strict=False) if g is not None]
    done = grad_outside(
        [t for t, _ in parts],
        list(known.values()),
        [g for _, g in parts],
        retain_graph,
        create_graph,
        True,
        True,
    )
    outside, rest = dict(zip(known, done, strict=True)), iter(found[len(stops) :])
    return [outside[ref] if ref in known else next(rest) for ref in refs]


def grad_outside(
    outputs: Any,
    inputs: Any,
    grads: Any,
    retain_graph: bool | None,
    create_graph: bool,
    *options: Any,
) -> Any:
    """Return ``autograd.grad`` of tensors from outside alone; ``grads`` may be traced."""
    with Unpacking() if create_graph else nullcontext():
        return ORIGINALS["grad"](outputs, inputs, grads, retain_graph, create_graph, *options)


class Unpacking(TorchDispatchMode):
    """Keep the history of saved results: autograd detaches what it saved and then sets the history
    of the result, which a detached tensor of a recording would not show."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default or args[0].__class__ is Traced:
            return func(*args, **(kwargs or {}))
        with quiet():
            return func(*args)


def outside_ends(trace: Trace, outs: Sequence[int], ins: Sequence[int]) -> dict[int, Tensor]:
    """Return, by number, outside tensors that ``outs`` need and that ``ins`` lead to."""
    wanted = [t for ref in ins if (t := from_outside(trace, ref)) is not None]
    found = {}
    for ref in trace.given_refs() if wanted else ():
        t = from_outside(trace, ref)
        if t is None or node_of(t) is None or not trace.autograd.reaches(ref, outs):
            continue
        if any(x is not t and leads_to(t, x) for x in wanted):
            found[ref] = t
    return found


def source(trace: Trace, ref: int) -> Tensor | None:
    """Return the tensor that an input or a lifted tensor stands for, or is a sample of."""
    if ref >= len(trace.inputs):
        return None
    return trace.origins[ref] if ref >= 0 else trace.lifted[-1 - ref]


def from_outside(trace: Trace, ref: int) -> Tensor | None:
    """Return the outermost outside tensor that a value stands for, or is a sample of."""
    t = source(trace, ref)
    return t if t.__class__ is not Traced else from_outside(t.tracer, t.ref)  # type: ignore


def open_to_autograd(trace: Trace, ref: int) -> bool:
    """Return whether autograd may use the outside tensor of a value: it is closed over, or common
    to all samples of a ``vmap``, and the function runs once."""
    t = source(trace, ref)
    alike = ref < 0 or (
        t is not None and trace.samples is not None and trace.samples.dims[ref] is None
    )
    if not (alike and trace.may_ask_constants) or ref in trace.roots().written:
        return False
    if any(instr.__class__ is Row and refs[0] == ref for instr, refs, *_ in trace.records):
        return False
    return t.__class__ is not Traced or open_to_autograd(t.tracer, t.ref)  # type: ignore


def outside_value(trace: Trace, ref: int) -> Tensor:
    """Return a tensor from outside, as a value of the recording."""
    if ref < 0:
        return trace.lifted[-1 - ref]
    twin = trace.alias(trace.arguments[ref])
    twin.ref = ref
    return twin


def leads_to(t: Tensor, x: Tensor) -> bool:
    """Return whether autograd's graph of ``t`` leads back to ``x``."""
    seen, stack = set(), [node_of(t)]
    while stack:
        fn: Any = stack.pop()
        if fn is None or fn in seen:
            continue
        if fn is node_of(x) or getattr(fn, "variable", None) is x:
            return True
        seen.add(fn)
        stack.extend(f for f, _ in fn.next_functions)
    return False

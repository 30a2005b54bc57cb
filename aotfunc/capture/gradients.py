"""Record ``torch.autograd.grad`` and ``.backward()``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import debug
from ..debug import at
from ..errors import CaptureError, OpError
from ..trace import outside
from ..trace.dtensors import unsupported
from ..trace.kinds import is_dtensor
from ..trace.shapes.sig import contiguous_stride, make_sig
from ..trace.traced import Traced, current, shows_gradient
from ..trace.tracer import Trace
from . import outside_graphs
from .calls import interned
from .grad_step import GradStep
from .gradient_layouts import computed_layouts, dense_layout
from .hooks import before_hooks


def check_undistributed(outs: Any) -> None:
    if any(map(is_dtensor, outs)):
        raise unsupported("a gradient")


def autograd_grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """Run ``torch.autograd.grad`` inside a recording, as one recorded step."""
    trace = current()
    assert trace is not None
    outs, keys = as_list(outputs), list(inputs) if isinstance(inputs, dict) else None
    check_undistributed(outs)
    ins = as_list(inputs if keys is None else inputs.values())
    if not ins:
        raise empty("grad")
    if materialize_grads and allow_unused is False:
        raise OpError.like(
            ValueError(),
            f"torch.autograd.grad: materialize_grads without allow_unused{at(debug.user_line())}; "
            "leave allow_unused out",
        )
    if not any(isinstance(t, Traced) for t in (*outs, *ins)):
        return outside_graphs.grad_outside(
            *(outputs, inputs, grad_outputs, retain_graph, create_graph, only_inputs),
            *(allow_unused, is_grads_batched, materialize_grads),
        )
    gs = [None] * len(outs) if grad_outputs is None else as_list(grad_outputs)
    for o, g in zip(outs, gs, strict=True):
        if g is None and (o.numel() != 1 or is_grads_batched):
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    size = gs[0].shape[0] if is_grads_batched else None  # type: ignore[union-attr]
    refs = [trace.ref_of(o)[0] for o in outs]
    ins = [asked_for(trace, x, ins) for x in ins]
    inside = functools.partial(gradients_inside, trace, outs, gs, create_graph, size)
    grads = outside_graphs.gradients(
        trace, refs, ins, gs, inside, retain_graph, create_graph, is_grads_batched
    )
    if any(g is None for g in grads) and not (allow_unused or materialize_grads):
        if any(o.__class__ is Traced and o.tracer is not trace for o in outs):
            raise CaptureError(
                "a hook, backward or transform asks for the gradient of what was computed outside "
                f"of it{at(debug.user_line())}; compute that inside, under torch.enable_grad()"
            )
        raise CaptureError(
            "one of the differentiated tensors was not used to compute the "
            f"outputs{at(debug.user_line())}; allow_unused=True returns None for it"
        )
    if materialize_grads:
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, ins, strict=True)]
    return dict(zip(keys, grads, strict=True)) if keys is not None else tuple(grads)


def asked_for(trace: Trace, x: Tensor, ins: Sequence[Tensor]) -> Tensor:
    """Return the value whose gradient autograd returns for ``x``: that has passed the hooks of
    ``x``, unless the backward goes on from it to another one of ``ins``."""
    if x.__class__ is not Traced or x.tracer is not trace or (before := before_hooks(x)) is x:
        return x
    goes_on = any(trace.autograd.reaches(trace.ref_of(y)[0], [x.ref]) for y in ins if y is not x)
    return x if goes_on else before


def empty(what: str) -> Exception:
    """Return the error for empty ``inputs``: a ValueError in PyTorch 2.11, then RuntimeError."""
    message = f"torch.autograd.{what}: inputs is empty{at(debug.user_line())}"
    return OpError.like(ValueError(), message)


def gradients_inside(
    trace: Trace,
    outs: Sequence,
    gs: Sequence,
    create_graph: bool,
    size: int | None,
    ins: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the gradients in ``ins`` inside the recording, None where no path leads."""
    refs = [trace.ref_of(o)[0] for o in outs]
    used = [trace.autograd.reaches(trace.ref_of(x)[0], refs) for x in ins]
    wanted = [x for x, yes in zip(ins, used, strict=True) if yes]
    if not wanted:
        return [None] * len(ins)
    for x in wanted:
        if trace.ref_of(x)[0] < len(trace.inputs):
            outside.check_outside_hooks(trace, x, at(debug.user_line()))
    sigs = [dense_layout(trace.ref_of(x)[1]) for x in wanted]
    if size is not None:
        sigs = [
            make_sig(s := (size, *x.shape), contiguous_stride(s), x.dtype, x.device) for x in sigs
        ]
    how = len(outs), tuple(g is not None for g in gs), bool(create_graph), size
    step = interned(GradStep, tuple(sigs), *how)
    given = [*outs, *(g for g in gs if g is not None), *wanted]
    trace.settle()
    if size is None:
        made_of = tuple([trace.ref_of(t)[0] for t in given])
        step = interned(GradStep, computed_layouts(trace, step, made_of), *how)
    found = iter(trace.record(step, given))
    return [next(found) if yes else None for yes in used]


def as_list(tensors: Tensor | Iterable[Tensor]) -> list[Any]:
    """Return the tensors of an argument of one or several as a list."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def autograd_backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """Run ``.backward()`` inside a recording: add the gradients of the leaves that were made
    inside, in their memory unless ``create_graph``, as autograd does."""
    trace = current()
    assert trace is not None
    outs = as_list(tensors)
    if inputs is not None and not isinstance(inputs, Tensor) and not inputs:
        raise empty("backward")
    if not outs:
        return
    check_undistributed(outs)
    gs = [None] if grad_tensors is None else as_list(grad_tensors)
    refs = [trace.ref_of(o)[0] for o in outs]
    if inputs is None:
        found, leaves = trace.autograd.leaves_of(refs)
    else:
        leaves = as_list(inputs)
        found = [ref for ref, _ in map(trace.ref_of, leaves) if ref < len(trace.inputs)]
    given = [trace.lifted[-1 - ref] for ref in found if ref < 0]
    shown = trace.graded is not None and len(given) == len(found)
    if found and not (shown and all(map(shows_gradient, given))):
        raise CaptureError(
            "`.backward()` inside a captured function would write the .grad of a tensor from "
            f"outside{at(debug.user_line())}; return the gradient instead, by "
            "torch.autograd.grad(...) or grad(f), or call .backward() on the result"
        )
    for t in given:
        if t._post_accumulate_grad_hooks:
            raise CaptureError(
                f"a tensor from outside, of shape {list(t.shape)}, has post-accumulate hooks, and "
                f"gets a .grad inside a captured function{at(debug.user_line())}: do there what "
                "they do"
            )
    if inputs is None:
        leaves = [*given, *leaves]
    wanted = [before_hooks(x) if x.__class__ is Traced else x for x in leaves]
    if not (retain_graph or create_graph):
        trace.spent += tuple(refs)
    if not leaves:
        raise RuntimeError(
            "element 0 of tensors does not require grad and does not have a grad_fn"
        )
    for x, g in zip(
        leaves, autograd_grad(outs, wanted, gs, create_graph=create_graph), strict=True
    ):
        with torch.set_grad_enabled(create_graph):
            if x.grad is None:
                x.grad = g.clone()  # one that is expanded could not be added to
            elif create_graph:
                x.grad = x.grad + g
            else:
                x.grad.add_(g)

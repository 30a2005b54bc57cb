"""Ask for values that a function left behind: they are computed when something uses them, which
may be long after the recording ended."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from ..debug import at, user_line
from ..errors import CaptureError
from ..graph import draws
from ..trace.memory import version
from ..trace.patches import ORIGINALS
from ..trace.traced import Traced, as_if_outside, quiet
from ..trace.tracer import Trace
from ..transforms.activity import live
from .concretize import so_far

#: as autograd sees a traced value
requires_grad = torch._C.TensorBase.requires_grad.__get__
_WHY = "a gradient by an argument that it was computed from may be asked for"
_KEPT = "keep x.detach(), or compute it before"
_NORM = torch.ops.aten._native_batch_norm_legit_functional.default


def check_inputs(trace: Trace, t: Traced) -> None:
    """Refuse the value ``t`` of a finished recording if it would be another one now: a tensor that
    it depends on was written to since, or it depends on random draws."""
    known = trace._values is not None and t.ref in trace._values.env
    if known and trace.root(t.ref) >= len(trace.inputs):  # (a view shows what is written)
        return
    program = so_far(trace, [t])
    found = needed_nodes(program.outputs[0])
    if any(map(draws, found)):
        raise left("it depends on random numbers, which would be drawn again")
    reals = [*trace.origins, *trace.lifted]
    for p, x, before in zip(program.placeholders, reals, trace.last_versions, strict=False):
        if p not in found:
            continue
        if x.__class__ is Traced:
            if x.tracer.finished:
                check_inputs(x.tracer, x)
        elif version(x) != before:
            what = f"a tensor of shape {list(x.shape)} that it depends on was written to since"
            raise left(what)


class Leaked(torch.autograd.Function):
    """The value of a leaked result. Autograd knows what it was computed from beside arguments;
    with an ``error`` one of these requires grad, too, and the backward raises."""

    @staticmethod
    def forward(ctx, t, value, error):  # type: ignore[no-untyped-def]
        ctx.error = error
        return value.view_as(value)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if ctx.error is not None:
            raise CaptureError(*ctx.error.args)
        return g, None, None


def leaked_value(t: Traced) -> Tensor:
    """Return the value of a leaked result. It requires grad where the result does in eager."""
    value, error = t.tracer.value(t), None
    if needing(t):
        error, t = left(_WHY, _KEPT), torch.empty(0, requires_grad=True)
    elif not requires_grad(t):
        return value
    with as_if_outside(), quiet(), torch.enable_grad():
        # (a recording that is under way would record it)
        return ORIGINALS["apply"](Leaked, t, value, error)


def needing(t: Traced) -> bool:
    """Return whether a leaked result depends on an argument that requires grad."""
    wrt = [
        i
        for i, x in enumerate(t.tracer.origins)
        if (needing(x) if x.__class__ is Traced and x.tracer.finished else x.requires_grad)
    ]
    return bool(wrt) and live(so_far(t.tracer, [t]), tuple(wrt))[0]


def run_outside(op: OpOverload, args: tuple, kwargs: dict) -> Any:
    """Run an op on leaked values, below autograd. Where one depends on an argument that requires
    grad, autograd is to see the op again; it has seen it if another tensor requires grad."""
    given = tree_leaves((args, kwargs))
    refused = torch.is_grad_enabled() and op is not torch.ops.aten.detach.default
    if refused and any(x.__class__ is Traced and needing(x) for x in given):
        if op.is_view or any(isinstance(x, Tensor) and requires_grad(x) for x in given):
            raise left(_WHY, _KEPT)
        args, kwargs = tree_map_only(Traced, leaked_value, (args, kwargs))
        with as_if_outside():
            return op(*args, **kwargs)
    args, kwargs = tree_map_only(Traced, lambda x: x.tracer.value(x), (args, kwargs))
    return op(*args, **kwargs)


def needed_nodes(out: Node) -> set[Node]:
    """Return the nodes that a value depends on, with itself. The result of a batch norm in
    training does not depend on the running statistics, which it updates."""
    found: set[Node] = set()
    todo = [out]
    while todo:
        n = todo.pop()
        if n in found:
            continue
        found.add(n)
        normed = n.target is getitem and n.args[0].target is _NORM and n.args[1] < 3
        todo += [a for a in n.args[0].args[:3] if a is not None] if normed else n._input_nodes
    return found


def left(why: str, way_out: str = "keep its number (x.item()) inside") -> CaptureError:
    return CaptureError(
        f"a value leaked from a transform and is used outside of it{at(user_line())}, but {why}: "
        f"return it (has_aux=True), or {way_out}"
    )

"""Ask for values that a function left behind: they are computed when something uses them, which
may be long after the recording ended."""

from __future__ import annotations

from operator import getitem

import torch
from torch.fx import Node

from ..debug import at, user_line
from ..errors import CaptureError
from ..graph import draws
from ..trace.memory import version
from ..trace.traced import Traced
from ..trace.tracer import Trace
from .concretize import so_far

_NORM = torch.ops.aten._native_batch_norm_legit_functional.default


def check_inputs(trace: Trace, t: Traced) -> None:
    """Refuse the value ``t`` of a finished recording if it would be another one now: a tensor that
    it depends on was written to since, or it depends on random draws."""
    known = trace._values is not None and t.ref in trace._values.env
    if known and trace.root(t.ref) >= len(trace.inputs):  # (a view shows what is written)
        return
    program = so_far(trace, [t])
    found = sources(program.outputs[0])
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


def sources(out: Node) -> set[Node]:
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


def left(why: str) -> CaptureError:
    return CaptureError(
        f"a value leaked from a transform and is used outside of it{at(user_line())}, but {why}: "
        "return it (has_aux=True), or keep its number (x.item()) inside"
    )

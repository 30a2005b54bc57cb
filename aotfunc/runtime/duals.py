"""Tell which tensors of a program have a tangent of ``torch.autograd.forward_ad``, and refuse
programs in which one meets ``no_grad`` or ``detach``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..debug import at, user_line
from ..errors import CaptureError
from ..graph import Program
from ..trace.marks import dead_end, hidden_write, no_tangent
from ..transforms.activity import active_nodes
from ..transforms.jvp import jvp
from ..transforms.lower import CALLS, lowered


def has_tangent(t: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(t).tangent is not None
    except RuntimeError:  # a batch of them: vmap has no rule for the question
        return True


def pushed_program(program: Program, wrt: tuple[int, ...]) -> Program:
    """Return ``(inputs, tangents) -> (outputs and new values, their tangents or None)``."""
    return program.once(("pushed", wrt), lambda: jvp(program.flat(), wrt, zeros=False))


def refuse_cuts(program: Program, tensors: Sequence[Tensor]) -> None:
    """Raise CaptureError if a tangent meets a cut: eager's tangents pass ``no_grad`` and stop at
    ``detach``, and a program does not tell these apart."""
    wrt = tuple(i for i, t in enumerate(tensors) if has_tangent(t))
    if wrt and program.once(("cut", wrt), lambda: meets_a_cut(program, wrt)):
        raise CaptureError(
            "torch.autograd.forward_ad through a function with no_grad or detach "
            f"inside{at(user_line())}: use aotfunc.jvp, whose tangents stop at both"
        )


def meets_a_cut(program: Program, wrt: tuple[int, ...]) -> bool:
    flat = lowered(program.flat(), CALLS)
    inputs = flat.placeholders
    active = active_nodes(flat.graph.nodes, [inputs[i] for i in wrt])
    marks = (torch.ops.aten.detach.default, dead_end, hidden_write, no_tangent)
    return any(
        n.target in marks and any(i in active for i in n._input_nodes) for n in flat.graph.nodes
    )

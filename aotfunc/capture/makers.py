"""Which op makes a value, by its name: rewriting may put another op there than eager has."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from ..graph import op_of

#: the name of what is no op: an autograd.Function, a hook
FUNCTION = "autograd.Function"


def op_name(target: Any) -> str:
    """Return the name of an op, in place or not."""
    return target._schema.name.rstrip("_") if isinstance(target, OpOverload) else FUNCTION


def maker(out: Any) -> str:
    """Return the op that makes an output of a program, by name, also inside a call."""
    if not isinstance(out, Node):
        return ""
    target = op_of(out).target
    known = dict(enumerate(getattr(target, "made", ())))
    return known.get(out.args[1], FUNCTION) if known else op_name(target)  # type: ignore

"""Which op makes a value, by its name: rewriting may put another op there than eager has."""

from __future__ import annotations

import operator
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

#: the name of what is no op: an autograd.Function, a hook
FUNCTION = "autograd.Function"


def name_of(target: Any) -> str:
    """Return the name of an op, in place or not."""
    return target._schema.name.rstrip("_") if isinstance(target, OpOverload) else FUNCTION


def op_of(n: Node) -> Node:
    return op_of(n.args[0]) if n.target is operator.getitem else n  # type: ignore[arg-type]


def maker(out: Any) -> str:
    """Return the name of the op that makes an output of a program; a compiled call knows those of
    its results."""
    if not isinstance(out, Node):
        return ""
    target = op_of(out).target
    known = dict(enumerate(getattr(target, "made", ())))
    return known.get(out.args[1], FUNCTION) if known else name_of(target)  # type: ignore

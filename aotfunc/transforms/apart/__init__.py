"""Rules for where the results of an op hold the batch.

An op has a rule if it treats the samples of a batch alike and apart from one another: pointwise
ops with the batch aligned, reductions and views along other dimensions, products of matrices whose
rows, columns or batch it is, and so on. An op without a rule may mix samples.
"""

from __future__ import annotations

from functools import cache

import torch
from torch._ops import OpOverload

from ...trace.shapes.rules import LEFT_OUT, UNTAGGED
from ...trace.shapes.sig import Facts
from . import dimensions, matrices, networks, views  # noqa: F401
from .elementwise import aligned
from .parts import RULES, Rule

aten = torch.ops.aten

#: ops whose arguments are sample numbers
OF_NUMBERS = {
    aten.view.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.index.Tensor,
    aten.index_put.default,
}


@cache
def part_rule_for(op: OpOverload) -> Rule | None:
    """Return the op's own rule, or that of pointwise ops."""
    if op in RULES:
        return RULES[op]
    facts, name = Facts(op), op._schema.name.removeprefix("aten::")
    tagged = torch.Tag.pointwise in op.tags or name in UNTAGGED
    return aligned if tagged and facts.pure and not facts.random and name not in LEFT_OUT else None

"""Rules for where the results of an op hold the batch, for each op that treats the samples of a
batch alike and apart from one another: pointwise ops with the batch aligned, reductions and views
that leave its dimension alone, products of matrices whose rows, columns or batch it is, and so on.
An op without a rule is not known to do so."""

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

#: ops that take the numbers of the samples
OF_NUMBERS = {
    aten.view.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.index.Tensor,
    aten.index_put.default,
}


@cache
def part_rule_for(op: OpOverload) -> Rule | None:
    """Return the rule written for an op, or that of pointwise ones."""
    if op in RULES:
        return RULES[op]
    facts, name = Facts(op), op._schema.name.removeprefix("aten::")
    tagged = torch.Tag.pointwise in op.tags or name in UNTAGGED
    return aligned if tagged and facts.pure and not facts.random and name not in LEFT_OUT else None

"""Recorded hooks of a result, registered at each call: autograd calls them before those that the
caller registers, and hands what they return on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..capture.custom_derivative import CustomDerivative, RuleProgram
from ..capture.hooks import Hooked
from .execute import execute, new_layout
from .late_reads import Versions, check_unwritten
from .late_state import at_moment, moment


class RecordedHooks:
    """The hooks of one value, as a program of its cotangent and of the ``residuals``."""

    def __init__(self, rule: RuleProgram, residuals: Sequence[Node], name: str) -> None:
        self.program, self.residuals, self.name = rule.program, residuals, name

    def register(self, values: Sequence[Tensor]) -> list[Any]:
        """Register them on the first of ``values``; the others are the residuals. Return it, and
        the list of what may not be written to until they are called."""
        (t, *residuals), then = values, moment()
        read_late: Versions = []

        def hook(g: Tensor) -> Tensor:
            check_unwritten(read_late, self.name)
            if then is not None:
                then.check(self.name)
            with at_moment(then):
                return execute(self.program, [new_layout(g), *residuals])[0]

        t.register_hook(hook)
        return [t, read_late]


def recorded_hooks(n: Node, name: str) -> RecordedHooks | None:
    """Return the hooks that a call's node records; None without, or an error of theirs."""
    target = n.target
    if not isinstance(target, Hooked):
        return None
    rule = CustomDerivative.part(target, target.backward, (True,))
    if not isinstance(rule, RuleProgram) or not isinstance(rule.program.outputs[0], Node):
        return None
    residuals = target.parts(n)[2][rule.first : rule.first + rule.n_residuals]
    return RecordedHooks(rule, residuals, name)

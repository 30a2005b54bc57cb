"""Raise an error for a NaN gradient if ``set_detect_anomaly`` is on around a transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from ..debug import at, user_line
from ..graph import Program
from ..trace.traced import current, under_way
from ..transforms.lower import lowered


def without_nan(program: Program, inputs: Sequence[Tensor], grads: Sequence[Any]) -> Sequence[Any]:
    """Return the ``grads`` of a program. Where anomalies are detected a NaN in one raises
    RuntimeError, as autograd's engine does: now, or when the recording runs."""
    if not torch.is_anomaly_enabled() or not torch.is_anomaly_check_nan_enabled():
        return grads
    if current() is not None:
        if not all(trace.may_ask_constants for trace in under_way.traces):
            return grads  # compiled once, also for when nothing is to be detected
        return [torch.ops.aotfunc.check_gradient(g, at(user_line())) for g in grads]
    if not any(map(has_nan, grads)):
        return grads
    first: list[Node] = []

    class Watched(fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if not first and n.op == "call_function" and has_nan(value):
                if not any(has_nan(self.env[i]) for i in n.all_input_nodes):
                    first.append(n)
            return value

    graph = lowered(program).graph
    Watched(fx.GraphModule({}, graph), garbage_collect_values=False).run(*inputs)
    where = (
        f"; {first[0].target} is the first to return one{at(first[0].meta.get('line'))}"
        if first
        else ""
    )
    raise RuntimeError(f"a gradient has nan values{where}")


def has_nan(x: Any) -> bool:
    if isinstance(x, tuple | list):
        return any(map(has_nan, x))
    return isinstance(x, Tensor) and bool(x.isnan().any())

"""A graph that may run once only: its nodes are called one by one, and Python is generated when
it turns out to run often."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch._ops import OpOverload

from .. import debug
from ..trace.emit import remap, remap_dict
from .eager import OURS, as_said, compare, compile_graph, entry, last_uses

#: a run of generated code saves a microsecond or two for each node, and 50 are spent to make it
OFTEN = 5


class Interpreted:
    """A function of the graph's placeholders that returns its flat outputs as a tuple."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.runs = graph, 0
        self.code: Callable[..., tuple] | None = None

    def __call__(self, *inputs: Any) -> tuple:
        if self.code is not None:
            return self.code(*inputs)
        self.runs += 1
        if self.runs < OFTEN and debug.LEVEL < 4:  # 4 prints the code
            return interpreted(self.graph, inputs)
        self.code = compile_graph(self.graph)
        return self.code(*inputs)


def interpreted(graph: fx.Graph, inputs: tuple) -> tuple:
    """The outputs for these inputs, with each value dropped after its last use."""
    last, feed = last_uses(graph), iter(inputs)
    env: dict[fx.Node, Any] = {}
    for n in graph.nodes:
        target = n.target
        if n.op == "placeholder":
            env[n] = next(feed)
            if debug.LEVEL >= 2 and n.meta.get("role") != "tangent":
                compare(n, env[n])
            continue
        if n.op == "output":
            return tuple(remap(n.args[0], env))
        if n.op == "get_attr":
            env[n] = getattr(graph.owning_module, target)
            continue
        args = remap(n.args, env)
        if target is operator.getitem:
            value = args[0][args[1]]
        else:
            value = entry(target, False)(*args, **remap_dict(n.kwargs, env))
            if isinstance(target, OpOverload) and target.namespace not in OURS:
                value = as_said(n, value)
            if debug.LEVEL >= 2:
                compare(n, value)
        env[n] = value
        del args, value
        for dead in last.get(n, ()):
            del env[dead]
    raise AssertionError("a graph ends with its output")

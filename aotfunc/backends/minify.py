"""Shrink a graph on which something fails, by delta debugging: Zeller and Hildebrandt,
"Simplifying and Isolating Failure-Inducing Input", IEEE Transactions on Software Engineering,
2002."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from ..errors import ArgumentError
from ..graph import output_node

Fails = Callable[[fx.GraphModule, list], bool]


def minifier(
    fail_f: fx.GraphModule,
    inps: Sequence[Any],
    module_fails: Fails,
    dump_state: Callable[[fx.GraphModule, list], object] | None = None,
    **_: Any,
) -> tuple[fx.GraphModule, list]:
    """Return ``(graph module, inputs)`` with as few nodes as can be found for which
    ``module_fails(graph_module, inputs)`` is still true; it may raise, which counts as false.

    A smaller graph returns one value instead of all, or takes a value as an input instead of
    computing it. Such values are those of a run op by op. ``dump_state(graph_module, inputs)`` is
    called with each smaller graph that fails. Functorch's other options have no meaning. Raises
    ArgumentError where the graph does not fail to begin with.

    >>> gm = make_fx(lambda x: x.exp().sin().cos())(torch.ones(2))
    >>> has_sin = lambda gm, inputs: "sin" in gm.code
    >>> small, inputs = minifier(gm, [torch.ones(2)], has_sin)
    >>> print(small.code.strip())
    def forward(self, exp):
        sin = torch.ops.aten.sin.default(exp);  exp = None
        return (sin,)
    """
    best, inputs = fail_f, list(inps)
    if not fails(module_fails, best, inputs):
        raise ArgumentError("minifier: module_fails is not true of the graph that is given")
    shrunk = True
    while shrunk:
        shrunk = False
        for gm, given in candidates(best, inputs):
            if fails(module_fails, gm, given):
                best, inputs, shrunk = gm, given, True
                if dump_state is not None:
                    dump_state(best, inputs)
                break
    return best, inputs


def fails(module_fails: Fails, gm: fx.GraphModule, inputs: list) -> bool:
    try:
        given = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        return bool(module_fails(gm, given))
    except Exception:  # another failure
        return False


def candidates(gm: fx.GraphModule, inputs: list) -> Iterator[tuple[fx.GraphModule, list]]:
    """Yield smaller graphs, the smallest first: those that end early, then those that begin
    late."""
    size = len(gm.graph.nodes)
    values = ValueRecorder(gm)
    values.run(*inputs)
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    returned = output_node(gm.graph).all_input_nodes
    for n in dict.fromkeys([*calls, *returned]):
        if returned != [n]:
            yield from rebuilt_between(gm, values.found, [n], set(), size)
    width = len(calls)
    while width:  # in ever smaller chunks
        for start in range(0, len(calls), width):
            known = set(calls[start : start + width])
            yield from rebuilt_between(gm, values.found, returned, known, size)
        width //= 2


class ValueRecorder(fx.Interpreter):
    """An interpreter that keeps the value of each node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.found: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


def rebuilt_between(
    gm: fx.GraphModule, values: dict, outs: Sequence[Node], known: set[Node], size: int
) -> Iterator[tuple[fx.GraphModule, list]]:
    """Yield the graph that returns ``outs`` and takes the ``known`` values as inputs, if it has
    fewer than ``size`` nodes, or as many and more inputs."""
    needed, todo = set(), list(outs)
    while todo:
        n = todo.pop()
        if n not in needed:
            needed.add(n)
            todo += [] if n in known else n.all_input_nodes
    taken = [n for n in gm.graph.nodes if n in needed and (n in known or n.op == "placeholder")]
    if not all(isinstance(values[n], torch.Tensor) for n in taken) or not needed - set(taken):
        return
    graph, env = fx.Graph(), {}
    for n in taken:
        env[n] = graph.placeholder(n.name)
        env[n].meta = dict(n.meta)
    for n in gm.graph.nodes:
        if n in needed and n not in env:
            env[n] = graph.node_copy(n, env.__getitem__)
    graph.output(tuple([env[n] for n in outs]))
    fewer = sum(n.op == "call_function" for n in graph.nodes)
    if fewer < sum(n.op == "call_function" for n in gm.graph.nodes) or len(graph.nodes) < size:
        yield fx.GraphModule(gm, graph), [values[n] for n in taken]

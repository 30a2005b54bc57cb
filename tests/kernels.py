"""The C++ backend with a kernel also where calling the ops would be as good."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from aotfunc.backends import Backend, cpp_decompositions
from aotfunc.backends.eager import compile_graph
from aotfunc.backends.loops.backend import with_kernels
from aotfunc.backends.loops.launch import Launch


class EveryKernel(Backend):
    """``made`` is what kernels there were, in the order of compilation, but for that of matrix
    products, ``multiplied`` the launches of this one."""

    made: list[Launch] = []
    multiplied: list[Launch] = []


def compiled(gm: fx.GraphModule, example_inputs: list) -> Callable:
    graph, _ = with_kernels(gm, lambda nodes: True)
    launches = [n.target for n in graph.nodes if isinstance(n.target, Launch)]
    EveryKernel.made += [f for f in launches if f.__name__ != "aot_matmul"]
    EveryKernel.multiplied += [f for f in launches if f.__name__ == "aot_matmul"]
    return compile_graph(graph)


def with_threads(f: Callable, *args: object) -> list:
    """The results with one thread, two and three."""
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(f(*args))
    finally:
        torch.set_num_threads(before)
    return results


every_kernel = EveryKernel(compiled, cpp_decompositions)

"""Compile a graph's kernels from one C++ source and call them in place of its nodes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx import Node

from ... import debug
from ...graph import n_ops, output_node
from ...trace.collector import paused_gc
from ..eager import compile_graph
from ..results import is_lazy, resolved
from . import native
from .arguments import count_rows, sizes
from .blocks import sum_in_blocks
from .builder import build_kernel
from .cpp import Printer
from .folded import fold
from .fuse import Unit, grouped, stored
from .ir import Apply, Kernel, Prefix, walk
from .joined import join_products
from .launch import TENSORS, Launch, has_memory
from .looped import consists_of_launches
from .matmul import matrix_product, product_task
from .members import seen_through, within_kernels
from .order import calls
from .real_views import without_views_of_parts
from .recompute import recompute
from .resized import SUMMED
from .reuse import fitting, reuse
from .schedule import schedule_kernel
from .steps import in_steps
from .tasks import InRange, LaidOut, Task, launch

#: number of elements that take as long as the call of PyTorch that a launch saves
SMALL = 32768

#: results of so many bytes are new pages at each call, which a launch asks for in larger pieces
LARGE = 1 << 25

#: functions that kernels compute faster than PyTorch
QUICK = frozenset(
    ("exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "erfc", "pow", "logsumexp")
)


def compile_cpp(gm: fx.GraphModule, example_inputs: list) -> Callable:
    """Compile a functional aten graph for the CPU: pointwise ops and reductions become C++
    kernels, fixed ones multiply matrices, and other ops are called. Raises CompilerError
    if there is no C++ compiler, or it fails."""
    with paused_gc():
        graph, source = with_kernels(gm)
    if source and (debug.watched is not None or debug.LEVEL >= 3):
        debug.note("cpp", graph, lambda: source, n_ops(graph))
    steady = graph if consists_of_launches(graph) else None
    run = compile_graph(graph)
    if not any(isinstance(n.target, Launch) for n in graph.nodes):
        run.boxed.steady = steady  # type: ignore[attr-defined]
        return run
    by_ops = functools.cache(lambda: compile_graph(gm.graph))

    def boxed(args: list[Tensor]) -> tuple:
        if any([a.__class__ not in TENSORS or is_lazy(a) for a in args]):
            if not all([has_memory(a) for a in args]):
                return by_ops().boxed(args)
            # the memory that kernels read does not hold the value
            args[:] = [resolved(a) if is_lazy(a) else a for a in args]
        return run.boxed(args)

    boxed.own = run.boxed.own  # type: ignore[attr-defined]
    boxed.unchecked = run  # type: ignore[attr-defined]
    boxed.alone = one_launch(graph)  # type: ignore[attr-defined]
    boxed.steady = steady  # type: ignore[attr-defined]

    def call(*args: Tensor) -> tuple:
        return boxed([*args])

    call.boxed, call.source = boxed, run.source  # type: ignore[attr-defined]
    return call


def one_launch(graph: fx.Graph) -> Callable | None:
    """Return the graph as the function of its only launch; None if it has other nodes."""
    *inputs, last, output = graph.nodes
    given = all(n.op == "placeholder" for n in inputs) and last.args == (*inputs,)
    return last.target.entry if given and list(output.args[0]) == [last] else None


def worth(nodes: Sequence[Node]) -> bool:
    """Return whether these nodes run faster as a kernel than called one by one."""
    if len(nodes) > 1 or nodes[0].target in SUMMED:
        return True
    val = nodes[0].meta["val"]
    if isinstance(val, Tensor):
        if val.numel() <= SMALL or val.numel() * val.element_size() >= LARGE:
            return True
    kernel = schedule_kernel(build_kernel(nodes, nodes, "kernel"))
    both_parts = any(a.part for a in kernel.accesses)  # which PyTorch turns at once
    if kernel.scatters or (kernel.cross >= 0 and not both_parts):
        return True
    columns = kernel.vector < kernel.outer
    return any(
        (isinstance(e, Apply | Prefix) and e.fn in QUICK) or (isinstance(e, Prefix) and columns)
        for e in walk(kernel.values)
    )


def with_kernels(gm: fx.GraphModule, worth: Callable = worth) -> tuple[fx.Graph, str]:
    """Return the graph with launches in place of nodes, and the kernels' source."""
    old = copy_graph(gm.graph)
    without_views_of_parts(old)
    in_steps(old)
    sum_in_blocks(old, within_kernels)
    units = [u for u in grouped(old).units if u.nodes]
    found = calls(old, recompute(old, units), worth)
    kernels = {u: kernel_of(u) for u in found if u.kernel}
    products = {u: p for u in found if not u.kernel and (p := matrix_product(u.nodes[0]))}
    join_products(kernels, products)
    found = [u for u in found if u.nodes]
    texts, name_of, late = text(list(kernels.values()))
    loaded = native.loaded_kernels(texts)
    tasks = {u: task(k, loaded[name_of[k.name]], late[k.name]) for u, k in kernels.items()}
    tasks |= {u: product_task(p) for u, p in products.items()}
    graph = fx.Graph(gm)
    new: dict[Node, Any] = {}
    for n in old.nodes:
        if n.op in ("placeholder", "get_attr"):
            new[n] = graph.node_copy(n)
    for u in needed(found, tasks, old):
        if u in tasks:
            launch(graph, new, tasks[u])
        else:
            new[u.nodes[0]] = graph.node_copy(u.nodes[0], new.__getitem__)
    graph.node_copy(output_node(old), new.__getitem__)
    fold(graph, (LaidOut, InRange))
    reuse(graph, gm.meta.get("donated", {}))
    return graph, "\n\n".join(texts.values())


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of the graph, which may be changed."""
    new: dict[Node, Node] = {}
    copy = fx.Graph(graph.owning_module)
    for n in graph.nodes:
        new[n] = copy.node_copy(n, new.__getitem__)
    return copy


def needed(found: Sequence[Unit], tasks: Mapping[Unit, Task], graph: fx.Graph) -> list[Unit]:
    """Return the units that must run: views and numbers are left out if only kernels read them."""
    reads = set(output_node(graph).all_input_nodes)
    kept = []
    for u in reversed(found):
        if u in tasks:
            reads.update(tasks[u].memory)
        elif seen_through(u.nodes[0]) and u.nodes[0] not in reads:
            continue
        else:
            reads.update(u.nodes[0].all_input_nodes)
        kept.append(u)
    return kept[::-1]


def task(kernel: Kernel, compiled: native.LoadedKernel, late: set[tuple[int, int]]) -> Task:
    return Task(
        compiled,
        count_rows(kernel),
        sizes(kernel),
        [a.tensor for a in kernel.accesses],
        list(dict.fromkeys([kernel.accesses[s.access].tensor for s in kernel.stores])),
        max(1, native.GRAIN * count_rows(kernel) // max(1, math.prod(kernel.extents))),
        kernel.checks,
        fitting(kernel, late),
    )


def kernel_of(u: Unit) -> Kernel:
    """Return the unit's kernel, named after the last value that it stores."""
    outs = stored(u.nodes)
    return schedule_kernel(build_kernel(u.nodes, outs, f"k_{outs[-1].name}"))


def text(kernels: Sequence[Kernel]) -> tuple[dict[str, str], dict[str, str], dict[str, set]]:
    """Return the text of each function and, for each kernel, the function's name, which equal
    kernels share, and the accesses that it reads after writing (:func:`fitting`)."""
    texts: dict[str, str] = {}
    functions: dict[str, str] = {}
    late: dict[str, set] = {}
    names: dict[str, str] = {}  # code -> the name of its first kernel
    for kernel in kernels:
        printer = Printer(kernel)
        found, late[kernel.name] = printer.text(), printer.late
        code = native.nameless(kernel.name, found)
        functions[kernel.name] = name = names.setdefault(code, kernel.name)
        texts.setdefault(name, found)
    return texts, functions, late

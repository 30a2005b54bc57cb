"""The C++ backend: a graph's kernels in one source, compiled, called in the place of its nodes."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from ... import debug
from ...errors import GraphError
from ...graph import output_node, size
from ..eager import compile_graph
from ..results import resolved
from . import native
from .arguments import rows, sizes
from .blocks import in_blocks
from .cpp import function
from .folded import fold
from .fuse import Unit, calls, grouped, stored
from .ir import Apply, Check, Kernel, walk
from .launch import Launch, has_memory
from .lower import lower
from .members import seen_through
from .recompute import recompute
from .schedule import schedule

#: elements that take no longer than calling PyTorch does, which is what a launch saves
SMALL = 32768

#: classes of tensors that have memory, or are zeros
TENSORS = (Tensor, nn.Parameter)

#: functions that kernels compute faster than PyTorch does
QUICK = frozenset(("exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "erfc", "pow"))


def cpp(gm: fx.GraphModule, example_inputs: list) -> Callable:
    """Compile a functional aten graph for the CPU: pointwise ops and reductions become C++
    kernels, other ops are called as they are. Raises CompilerError where there is no C++
    compiler, or it fails."""
    graph, source = with_kernels(gm)
    if source and (debug.watched is not None or debug.LEVEL >= 3):
        debug.note("cpp", graph, lambda: source, size(graph))
    for n in graph.nodes:
        if isinstance(n.target, Launch):
            n.target = n.target.run
    run = compile_graph(graph)
    if not source:
        run.own = 0  # type: ignore[attr-defined]
        return run
    by_ops = functools.cache(lambda: compile_graph(gm.graph))

    def call(*args: Tensor) -> tuple:
        if any([a.__class__ not in TENSORS or a.is_neg() for a in args]):
            if not all([has_memory(a) for a in args]):
                return by_ops()(*args)
            # the memory that kernels read would not be the value
            args = tuple([resolved(a) if a.is_neg() else a for a in args])
        return run(*args)

    call.source = run.source  # type: ignore[attr-defined]
    call.own = own(output_node(graph).args[0])  # type: ignore[attr-defined]
    return call


def own(results: Sequence[Any]) -> int:
    """How many of the first results are of launches, and so tensors whose memory only they use."""
    for count, n in enumerate(results):
        if not isinstance(n, Node) or n.meta.get("laid_out") is not n or n in results[:count]:
            return count
    return len(results)


def worth(nodes: Sequence[Node]) -> bool:
    """Whether these nodes are better as a kernel than called one by one."""
    if len(nodes) > 1:
        return True
    val = nodes[0].meta["val"]
    if isinstance(val, Tensor) and val.numel() <= SMALL:
        return True
    kernel = lower(nodes, nodes, "kernel")
    if kernel.scatters or schedule(kernel).cross >= 0:
        return True
    return any(isinstance(e, Apply) and e.fn in QUICK for e in walk(kernel.values))


def with_kernels(gm: fx.GraphModule, worth: Callable = worth) -> tuple[fx.Graph, str]:
    """The graph with launches of kernels in the place of what these compute, and their source."""
    old = copied(gm.graph)
    in_blocks(old)
    units = [u for u in grouped(old).units if u.nodes]
    found = calls(old, recompute(old, units), worth)
    kernels = {u: named(u) for u in found if u.kernel}
    source, name_of = text(list(kernels.values()))
    library: Any = native.load(f"{native.PRELUDE}{source}\n") if source else {}
    graph = fx.Graph(gm)
    new: dict[Node, Any] = {}
    for n in old.nodes:
        if n.op in ("placeholder", "get_attr"):
            new[n] = graph.node_copy(n)
    for u in needed(found, kernels, old):
        if u.kernel:
            launch(graph, new, kernels[u], library[name_of[kernels[u].name]])
        else:
            new[u.nodes[0]] = graph.node_copy(u.nodes[0], new.__getitem__)
    graph.node_copy(output_node(old), new.__getitem__)
    fold(graph, (LaidOut, InRange))
    return graph, source


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy, which may be changed."""
    new: dict[Node, Node] = {}
    copy = fx.Graph()
    for n in graph.nodes:
        new[n] = copy.node_copy(n, new.__getitem__)
    return copy


def needed(found: Sequence[Unit], kernels: Mapping[Unit, Kernel], graph: fx.Graph) -> list[Unit]:
    """Those without the views and numbers that only kernels read, which look through them."""
    reads = set(output_node(graph).all_input_nodes)
    kept = []
    for u in reversed(found):
        if u.kernel:
            reads.update([a.tensor for a in kernels[u].accesses])
        elif seen_through(u.nodes[0]) and u.nodes[0] not in reads:
            continue
        else:
            reads.update(u.nodes[0].all_input_nodes)
        kept.append(u)
    return kept[::-1]


def named(u: Unit) -> Kernel:
    """The unit's kernel, called as the last value that it stores."""
    outs = stored(u.nodes)
    return schedule(lower(u.nodes, outs, f"k_{outs[-1].name}"))


def text(kernels: Sequence[Kernel]) -> tuple[str, dict[str, str]]:
    """Their source, and for each the name of its function: equal ones share it."""
    texts: dict[str, str] = {}
    functions: dict[str, str] = {}
    names: dict[str, str] = {}  # code -> the first kernel that has it
    for kernel in kernels:
        found = function(kernel)
        code = native.without_comments(found).replace(f" {kernel.name}(", " (")
        functions[kernel.name] = name = names.setdefault(code, kernel.name)
        texts.setdefault(name, found)
    return "\n\n".join(texts.values()), functions


def launch(graph: fx.Graph, new: dict[Node, Any], kernel: Kernel, compiled: Any) -> None:
    """Nodes that run a kernel and take its results."""
    outs = [kernel.accesses[s.access].tensor for s in kernel.stores]
    memory = [a.tensor for a in kernel.accesses]
    inputs = [n for n in dict.fromkeys(memory) if n not in outs]
    place = {n: i for i, n in enumerate([*inputs, *outs])}
    vals = [n.meta["val"] for n in outs]
    grain = native.GRAIN * rows(kernel) // max(1, math.prod(kernel.extents))
    target = Launch(
        compiled,
        rows(kernel),
        sizes(kernel),
        [(tuple(v.shape), tuple(v.stride()), v.dtype) for v in vals],
        [place[n] for n in memory],
        max(1, grain),
    )
    checks: dict[Node, list[Check]] = {n: [] for n in inputs}
    for c in kernel.checks:
        checks[c.tensor].append(c)
    args = [
        checked(graph, new[n] if n.op != "call_function" else laid_out(graph, new[n]), checks[n])
        for n in inputs
    ]
    call = graph.create_node("call_function", target, tuple(args), {})
    if len(outs) == 1:
        call._rename(outs[0].name)
        call.meta = dict(outs[0].meta)
        call.meta["laid_out"] = call
        new[outs[0]] = call
        return
    call.meta = {"val": tuple(vals), "line": outs[-1].meta.get("line")}
    for i, n in enumerate(outs):
        part = new[n] = graph.create_node(
            "call_function", operator.getitem, (call, i), name=n.name
        )
        part.meta = {**n.meta, "laid_out": part}


class LaidOut:
    """A tensor laid out as the graph says, by which kernels read it; nearly always it is. Raises
    GraphError for another shape or dtype than the graph's: kernels would read other memory."""

    __name__ = "laid_out"

    def __init__(self, val: Tensor) -> None:
        self.shape, self.stride, self.dtype = val.shape, val.stride(), val.dtype

    def __call__(self, t: Tensor) -> Tensor:
        if t.shape != self.shape or t.dtype is not self.dtype:
            raise GraphError(
                f"an op returned {t.dtype}{list(t.shape)}, and its fake implementation says "
                f"{self.dtype}{list(self.shape)}: mend what is registered with register_fake"
            )
        if t.is_neg():
            t = t.resolve_neg()
        if t.stride() == self.stride:
            return t
        return torch.empty_strided(t.shape, self.stride, dtype=t.dtype).copy_(t)


def laid_out(graph: fx.Graph, n: Node) -> Node:
    """What a kernel may read of a called op's result; a kernel's own needs no look."""
    if "laid_out" not in n.meta:
        target = LaidOut(n.meta["val"])
        n.meta["laid_out"] = graph.create_node("call_function", target, (n,), {})
        n.meta["laid_out"].meta = dict(n.meta)
    return n.meta["laid_out"]


class InRange:
    """A tensor whose elements are in range, as far as a kernel reads memory at these places.
    Raises what the op that it stands for raises."""

    __name__ = "in_range"

    def __init__(self, check: Check) -> None:
        self.check = check

    def __call__(self, t: Tensor) -> Tensor:
        shape, strides, start = self.check.window
        window = t.as_strided(shape, strides, t.storage_offset() + start)
        low, high = window.aminmax()
        if int(low) < self.check.low:
            raise self.check.error(int(low))
        if int(high) >= self.check.high:
            raise self.check.error(int(high))
        return t


def checked(graph: fx.Graph, n: Node, checks: Sequence[Check]) -> Node:
    """A kernel's input behind what must hold of it."""
    for c in checks:
        found = n.meta.setdefault("in_range", {})
        key = (c.window, c.low, c.high)
        if key not in found:
            found[key] = graph.create_node("call_function", InRange(c), (n,), {})
            found[key].meta = dict(n.meta)
        n = found[key]
    return n

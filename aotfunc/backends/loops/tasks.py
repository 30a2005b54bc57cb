"""Put launches into a graph: the kernel, its memory, and the conditions for running it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from ...errors import GraphError
from ..results import is_lazy
from . import native
from .ir import Requirement
from .launch import Launch


@dataclass(frozen=True)
class Task:
    """A launch: its kernel, the values whose memory it gets, and those that it makes; ``fitting``:
    for each of these the values whose memory it may take."""

    compiled: native.LoadedKernel
    rows: int
    sizes: Sequence[int]
    memory: Sequence[Node]
    outs: Sequence[Node]
    grain: int
    checks: Sequence[Requirement] = ()
    fitting: Mapping[Node, Sequence[Node]] = field(default_factory=dict)


def launch(graph: fx.Graph, new: dict[Node, Any], task: Task) -> None:
    """Make nodes that run a kernel and take its results."""
    outs = task.outs
    inputs = [n for n in dict.fromkeys(task.memory) if n not in outs]
    place = {n: i for i, n in enumerate([*inputs, *outs])}
    vals = [n.meta["val"] for n in outs]
    target = Launch(
        task.compiled,
        task.rows,
        task.sizes,
        [(tuple(v.shape), tuple(v.stride()), v.dtype) for v in vals],
        [place[n] for n in task.memory],
        task.grain,
    )
    checks: dict[Node, list[Requirement]] = {n: [] for n in inputs}
    for c in task.checks:
        checks[c.tensor].append(c)
    args = [
        with_checks(
            graph, new[n] if n.op != "call_function" else with_layout(graph, new[n]), checks[n]
        )
        for n in inputs
    ]
    call = graph.create_node("call_function", target, tuple(args), {})
    fitting = {outs.index(n): [*map(place.get, found)] for n, found in task.fitting.items()}
    if len(outs) == 1:
        call._rename(outs[0].name)
        call.meta = outs[0].meta | {"laid_out": call, "fitting": fitting}
        new[outs[0]] = call
        return
    call.meta = {"val": tuple(vals), "line": outs[-1].meta.get("line"), "fitting": fitting}
    for i, n in enumerate(outs):
        part = new[n] = graph.create_node(
            "call_function", operator.getitem, (call, i), name=n.name
        )
        part.meta = {**n.meta, "laid_out": part}


class LaidOut:
    """A tensor laid out as the graph says, which kernels rely on; most need no copy. Raises
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
        if is_lazy(t):
            t = t.resolve_conj().resolve_neg()
        if t.stride() == self.stride:
            return t
        return torch.empty_strided(t.shape, self.stride, dtype=t.dtype).copy_(t)


def with_layout(graph: fx.Graph, n: Node) -> Node:
    """Return a called op's result in the layout that kernels expect; a kernel's own has it."""
    if "laid_out" not in n.meta:
        target = LaidOut(n.meta["val"])
        n.meta["laid_out"] = graph.create_node("call_function", target, (n,), {})
        n.meta["laid_out"].meta = dict(n.meta)
    return n.meta["laid_out"]


class InRange:
    """A tensor whose elements are in range, as far as a kernel uses them as indices. Raises the
    errors of the op that it stands for."""

    __name__ = "in_range"

    def __init__(self, check: Requirement) -> None:
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


def with_checks(graph: fx.Graph, n: Node, checks: Sequence[Requirement]) -> Node:
    """Return a kernel's input after the checks of its requirements."""
    for c in checks:
        found = n.meta.setdefault("in_range", {})
        key = (c.window, c.low, c.high)
        if key not in found:
            found[key] = graph.create_node("call_function", InRange(c), (n,), {})
            found[key].meta = dict(n.meta)
        n = found[key]
    return n

"""A compiled function for one signature before it runs: graphs, costs, compiling it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ..debug import at, user_line
from ..errors import ArgumentError
from ..partition import Report
from ..partition.cost import flops, nbytes, traffic
from ..partition.memory import peak, saved
from .graph_module import graph_module
from .halves import Halves
from .pipeline import examples

if TYPE_CHECKING:
    from .compiled import Compiled
    from .entry import Entry


class Lowered:
    """A function captured for one signature; :meth:`Compiled.lower` returns it.

    Where gradients are on and an argument or a closed-over tensor requires grad, it runs as a
    "forward" and a "backward" half of a "joint" graph, else as the "function"."""

    def __init__(self, compiled: Compiled, entry: Entry, tensors: Sequence[Tensor]) -> None:
        self._compiled, self._entry, self._tensors = compiled, entry, tensors
        call = entry.call
        grads = entry.enables or torch.is_grad_enabled()
        wrt = tuple([i for i, t in enumerate(tensors) if t.requires_grad]) if grads else ()
        halves = call.program.once(("halves", wrt), lambda: Halves(call, wrt)) if wrt else None
        self._halves = halves if halves is not None and halves.any_live else None

    @property
    def graphs(self) -> dict[str, fx.GraphModule]:
        """Return the graphs by name, as modules."""
        programs = {"function": self._entry.call.program}
        if self._halves is not None:
            programs.update(self._halves.programs())
        graphs = {name: graph_module(p, name) for name, p in programs.items()}
        if "joint" in graphs:
            assert self._halves is not None
            graphs["joint"].meta["num_fwd_outputs"] = self._halves.early
        return graphs

    @property
    def graph(self) -> fx.Graph:
        """Return the function's graph."""
        return self.graphs["function"].graph

    @property
    def code(self) -> str:
        """Return the function as Python."""
        return self.graphs["function"].code.strip()

    def compile(self) -> Callable:
        """Compile the function now for this signature, its backward too, for the first call."""
        if self._halves is None:
            self._entry.call.compiled(self._tensors)
        else:
            for half in (self._halves.forward, self._halves.backward):
                half.compiled(examples(half.program))
        return self._compiled

    def cost_analysis(self) -> dict[str, dict[str, float]]:
        """Return each half's "flops", those of its products, convolutions and attention, and
        "bytes accessed", the reads and writes of its ops one by one."""
        return {
            name: {
                "flops": sum(map(flops, gm.graph.nodes)),
                "bytes accessed": sum(map(traffic, gm.graph.nodes)),
            }
            for name, gm in self._run()
        }

    def memory_analysis(self) -> dict[str, int]:
        """Return bytes: "arguments" and closed-over tensors, "results", "saved" for the backward
        beyond these, and the "peak" of each half beyond its inputs, for ops that run one by one
        with values freed after their last read (memory that kernels need for themselves is not
        counted)."""
        program = self._entry.call.program
        found = {
            "arguments": sum([nbytes(p.meta["val"]) for p in program.placeholders]),
            "results": sum(map(nbytes, program.vals)),
        }
        if self._halves is not None:
            found["saved"] = saved(self._halves.forward.program.graph, self._halves.count)
        return found | {f"{name} peak": peak(gm.graph) for name, gm in self._run()}

    def partition_report(self) -> Report:
        """Return what the forward saves for the backward, and what the backward computes again:
        each value with its line, and how far from the best the partition can be
        (:class:`aotfunc.partition.Report`: text, JSON and a picture). Raises ArgumentError where
        there is no backward.

        >>> from aotfunc import jit
        >>> w = torch.ones(64, 64, requires_grad=True)
        >>> f = jit(lambda w: (w @ w).sin().exp().sum(), memory_budget="20kB")
        >>> report = f.lower(w).partition_report()
        >>> [r.name for r in report.saved], [r.op for r in report.recomputed]
        (['w', 'mm'], ['aten.sin.default', 'aten.exp.default'])
        """
        halves = self._halves
        if halves is None:
            raise ArgumentError(
                f"partition_report: {self._compiled.who} has no backward for these arguments: "
                f"none requires grad, or gradients are off{at(user_line())}"
            )
        return self._compiled.pipeline.report(halves.joint(), halves.count)

    def _run(self) -> list[tuple[str, fx.GraphModule]]:
        graphs = self.graphs
        return [(k, graphs[k]) for k in ("forward", "backward") if k in graphs] or [
            *graphs.items()
        ]

    def __repr__(self) -> str:
        return f"<{self._compiled.who} for {self._entry.call.program.signature}>"

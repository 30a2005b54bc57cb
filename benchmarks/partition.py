"""Partitions of forward and backward beside PyTorch's: memory, recomputation, and the time that
partitioning takes.

python -m benchmarks.partition [--layers 12] [--only NAME] [--large 225] [--run]. The same joint
graphs (traced by PyTorch, with Inductor's decompositions, equal nodes merged) go through
PyTorch's partitions and ours. "Saved" counts distinct storages that the forward makes and hands
over, inputs and parameters excepted. "Again" is the time of the nodes that run in both graphs,
as a share of the forward's, under aotfunc's cost for backends that fuse; "peak" is simulated.
"Bytes" is what ours saves at PyTorch's recomputation over what PyTorch's saves, "time" what
ours computes again at PyTorch's saved bytes over what PyTorch's does. ``--large`` measures
graphs of many layers instead, ``--run`` real peaks and backward times. Models of transformers
need `pip install aotfunc[models]`."""

from __future__ import annotations

import argparse
import copy
import gc
import math
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import functorch.compile as functorch
import numpy as np
import torch
from torch import Tensor, fx
from torch._functorch import config
from torch.utils._python_dispatch import TorchDispatchMode

import aotfunc
from aotfunc.partition import Bytes, Cost, Partition, Profiled, Roofline, Time, nbytes
from aotfunc.partition.frontier import Frontier
from aotfunc.partition.memory import peak
from aotfunc.partition.ops import base
from aotfunc.partition.problem import Problem
from aotfunc.partition.roles import Joint, read_joint
from aotfunc.partition.solve import INF
from benchmarks.partition_zoo import transformer, zoo

COST = Roofline()
Halves = tuple[fx.GraphModule, fx.GraphModule]


class Measured:
    """Bytes saved, the time of what runs again, also as a share of the forward's, and of the whole
    backward, and the simulated peak."""

    def __init__(
        self, fw: fx.GraphModule, bw: fx.GraphModule, forward_time: float, cost: Cost = COST
    ) -> None:
        handed = fw.graph.output_node().args[0][1:]  # type: ignore[index]
        late = [n for n in bw.graph.nodes if n.op == "placeholder"]
        owners = {}
        for n, given in zip(handed, late, strict=False):
            if isinstance(n.meta["val"], Tensor) and base(n).op != "placeholder":
                owners.setdefault(base(n), given)
        self.bytes = sum(nbytes(n.meta["val"]) for n in owners)
        times = {n.name: cost.time(n) for n in fw.graph.nodes}
        run = [n for n in bw.graph.nodes if n.op == "call_function" and n.users]
        self.time = sum(times.get(n.name, 0.0) for n in run)
        self.backward = sum(map(cost.time, run))
        self.again = self.time / forward_time
        self.peak = max(peak(fw.graph), peak(bw.graph, owners.values()))


def timed(f: Callable, *args: Any, repeat: int = 1) -> tuple[Any, float]:
    """What ``f`` returns, and its least processor time in milliseconds."""
    times = []
    for _ in range(repeat):
        gc.collect()
        start = time.process_time()
        out = f(*args)
        times.append(time.process_time() - start)
    return out, min(times) * 1e3


def theirs(joint: fx.GraphModule, budget: float | None) -> Halves:
    """PyTorch's partition: without recomputation, or its minimum cut under a budget. It changes
    the joint graph."""
    if budget is None:
        return functorch.default_partition(joint, (), num_fwd_outputs=1)
    with config.patch(activation_memory_budget=budget):
        return functorch.min_cut_rematerialization_partition(joint, (), num_fwd_outputs=1)


def ours(joint: fx.GraphModule, budget: Any, **options: Any) -> Partition:
    return aotfunc.partition(joint, memory_budget=budget, num_fwd_outputs=1, **options)


def mean(ratios: Sequence[float]) -> str:
    """The geometric mean and the largest."""
    if not ratios:
        return "-"
    logs = [math.log(max(r, 1e-3)) for r in ratios]
    return f"{math.exp(statistics.mean(logs)):.2f} (at most {max(ratios):.2f})"


def floor(joint: Joint) -> int:
    """Bytes below which no peak falls, whatever is saved and in whatever order nodes run: those of
    all gradients, and of what a node reads and makes, of the nodes that run in any case."""
    layout = joint.layout

    def together(values: Iterable[int]) -> int:
        return sum(layout.size[o] for o in {layout.owner[i] for i in values})

    always = [i for i in range(len(joint.nodes)) if joint.forward[i] or joint.live[i]]
    gradients = [joint.index[o] for o in joint.late_outputs if isinstance(o, fx.Node)]
    return max(together(gradients), *(together([i, *joint.inputs[i]]) for i in always))


# ----- the zoo -----------------------------------------------------------------------------------

MODES = {"default": None, "min-cut": 1.0, "budget 0.5": 0.5, "budget 0.1": 0.1}


def compare(layers: int, only: str) -> None:
    print(
        "| model (nodes) | PyTorch's | saved MB | again | peak MB | ms | ours: bytes | time | ms "
        "|\n| --- | --- " + "| ---: " * 7 + "|"
    )
    bytes_, times, zero, speed, gaps, exacts, peaks, floors, lows = [[] for _ in range(9)]
    for name, make in zoo(layers).items():
        if only not in name:
            continue
        joint = make()
        free = ours(joint, 0.0).report
        lowest = min(peak for _, _, peak in free.frontier)
        least = INF
        for mode, budget in MODES.items():
            (fw, bw), their_ms = timed(theirs, copy.deepcopy(joint), budget)
            m = Measured(fw, bw, free.forward_time)
            least = min(least, m.peak)
            saving, our_ms = timed(ours, joint, Time(m.again * (1 + 1e-9)))
            kept = ours(joint, Bytes(m.bytes)).report
            sharp = ours(joint, Bytes(m.bytes), exact=True).report
            less = saving.report.bytes / m.bytes if m.bytes else 1.0
            faster = kept.share(kept.time) / m.again if m.again else 1.0
            (zero if budget is None else bytes_).append(less)
            if budget is not None and m.again > 0:
                times.append(faster)
            speed.append(our_ms / their_ms)
            gaps.append(kept.gap)
            exacts.append(sharp.gap)
            row = [f"{m.bytes / 1e6:.2f}", f"{m.again:.1%}", f"{m.peak / 1e6:.1f}"]
            row += [f"{their_ms:.0f}", f"{less:.2f}", f"{faster:.2f}", f"{our_ms:.0f}"]
            title = f"{name} ({len(joint.graph.nodes)})" if budget is None else ""
            print(f"| {title} | {mode} | " + " | ".join(row) + " |", flush=True)
        peaks.append(lowest / least)
        floors.append(floor(read_joint(joint.graph, 1)) / least)
        lows.append(f"| {name} | {least / 1e6:.2f} | {peaks[-1]:.2f} | {floors[-1]:.2f} |")
    print("\n| model | least peak of PyTorch's, MB | ours | no less than |")
    print("\n".join(["| --- | ---: | ---: | ---: |", *lows]))
    gains = [z for z in zero if z < 0.995]
    print(f"\nbytes at equal recomputation: {mean(bytes_)}; without any: {mean(zero)}, ", end="")
    print(f"on the {len(gains)} graphs where there is something to gain {mean(gains)}")
    print(f"recomputation at equal bytes: {mean(times)}")
    print(f"least peak: {mean(peaks)}, no less than {mean(floors)}; partitioning: {mean(speed)}")
    print(f"gap: {max(gaps):.1%} at most, median {statistics.median(gaps):.1%}; ", end="")
    print(f"with exact: {max(exacts):.4%} at most")


# ----- many layers -------------------------------------------------------------------------------


def certified(joint: fx.GraphModule, size: int) -> float:
    """The gap of a partition within so many bytes to its bound, which is found when it is asked
    for."""
    return ours(joint, Bytes(size)).report.gap


def large(layers: int) -> None:
    """One cut beside networkx's, a frontier and a budget, for a tenth of the layers and all."""
    import networkx as nx

    found = []
    for count in (max(layers // 10, 1), layers):
        joint = transformer(count, d=16)
        _, whole = timed(ours, joint, 1.0, repeat=2)
        problem = Problem(read_joint(joint.graph, 1), COST)
        network = problem.network
        redo = problem.again(1.0)
        bound = network.cheapest(problem.save, redo).value
        cut, ms = timed(network.cut, problem.save, redo, bound, repeat=3)
        frontier = Frontier(problem)
        points, frontier_ms = timed(lambda f: f.points, frontier)
        half = frontier.ends[1].choice.bytes / 2
        gap, budget_ms = timed(certified, joint, int(half))
        graph = nx.DiGraph()
        costs, edges = np.concatenate([redo, problem.save]), network.edge.tocoo()
        for u, v, k in zip(*edges.coords, edges.data, strict=True):
            finite = k < len(costs) and costs[k] < INF
            graph.add_edge(u, v, **({"capacity": costs[k]} if finite else {}))
        value, their_ms = timed(nx.minimum_cut_value, graph, network.source, network.sink)
        assert math.isclose(value, cut.value, rel_tol=1e-4)
        found.append(whole)
        print(
            f"{len(joint.graph.nodes)} nodes: a cut {ms:.1f} ms, networkx's {their_ms:.0f} ms "
            f"({their_ms / ms:.0f}x); partition {whole:.0f} ms; {len(points)} points of the "
            f"frontier {frontier_ms:.0f} ms; partition at half of the bytes with its bound "
            f"{budget_ms:.0f} ms, gap {gap:.2%}",
            flush=True,
        )
    print(f"ten times the layers take {found[1] / found[0]:.1f} times as long to partition")


# ----- real runs ---------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that ops have made and that live, after each op."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.made: list[weakref.ref] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outs = func(*args, **(kwargs or {}))
        flat = outs if isinstance(outs, tuple | list) else [outs]
        self.made += [weakref.ref(t) for t in flat if isinstance(t, Tensor)]
        tensors = [t for r in self.made if (t := r()) is not None]
        self.made = [weakref.ref(t) for t in tensors]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        live = sum(size for p, size in sizes.items() if p not in self.known)
        self.most = max(self.most, live)
        return outs


def real(val: Tensor) -> Tensor:
    """Return a tensor of a fake one's shape: small numbers, or a mask, or indices."""
    if val.is_floating_point():
        return torch.randn(val.shape) * 0.02
    if val.dtype is torch.bool:
        return torch.ones(val.shape, dtype=val.dtype)
    return torch.randint(2, val.shape, dtype=val.dtype)


def real_inputs(joint: fx.GraphModule) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and cotangents."""
    nodes = [n for n in joint.graph.nodes if n.op == "placeholder"]
    torch.manual_seed(0)
    made = [real(n.meta["val"]) for n in nodes]
    late = ["tangents" in n.name for n in nodes]
    return (
        [t for t, yes in zip(made, late, strict=True) if not yes],
        [t for t, yes in zip(made, late, strict=True) if yes],
    )


def run_times(halves: Halves, inputs: list[Tensor], cotangents: list[Tensor]) -> tuple:
    """The processor time of the backward and of the whole step, in milliseconds."""
    start = time.process_time()
    outs = halves[0](*inputs)
    between = time.process_time()
    halves[1](*outs[1:], *cotangents)
    end = time.process_time()
    return (end - between) * 1e3, (end - start) * 1e3


def run(layers: int, repeat: int = 25) -> None:
    """Real peaks beside simulated ones, and times at equal bytes, both executed op by op and in
    random order. "No less than" is what is left of PyTorch's backward where it computes only as
    much again as any partition within these bytes must: by measured costs, which leave out what
    order and caches do."""
    print(
        "| model | PyTorch's | backward ms | ours | ratio | no less than | step | our peak MB "
        "| simulated |\n| --- | --- " + "| ---: " * 7 + "|"
    )
    ratios, floors, steps, gains, off = [], [], [], [], []
    for name, make in zoo(layers).items():
        joint, cost = make(), Profiled()
        inputs, cotangents = real_inputs(joint)
        for mode, budget in list(MODES.items())[1:]:
            their = theirs(copy.deepcopy(joint), budget)
            measured = Measured(*their, 1.0, cost)
            fw, bw, report = ours(joint, Bytes(measured.bytes), cost=cost)
            both = (their, (fw, bw))
            order = [0, 1] * repeat
            random.shuffle(order)
            times: tuple[list, list] = ([], [])
            for which in (0, 1, *order):
                times[which].append(run_times(both[which], inputs, cotangents))
            (a, step), (b, our_step) = (
                [statistics.median(x) for x in zip(*t[1:], strict=True)] for t in times
            )
            ratios.append(b / a)
            steps.append(our_step / step)
            floors.append(1 - (measured.time - report.bound) / measured.backward)
            if report.time < 0.95 * measured.time:
                gains.append(b / a)
            with Live([*inputs, *cotangents]) as live:
                outs = fx.Interpreter(fw).boxed_run(list(inputs))
                rest = [*outs[1:], *cotangents]
                del outs
                fx.Interpreter(bw).boxed_run(rest)
            off.append(abs(report.peak / live.most - 1))
            print(
                f"| {name} | {mode} | {a:.1f} | {b:.1f} | {b / a:.2f} | {floors[-1]:.2f} | "
                f"{steps[-1]:.2f} | {live.most / 1e6:.2f} | {report.peak / 1e6:.2f} |",
                flush=True,
            )
    print(f"\nbackward at equal bytes: {mean(ratios)}, no less than {mean(floors)}; ", end="")
    print(f"in the {len(gains)} rows where ours computes less again {mean(gains)}; ", end="")
    print(f"whole steps {mean(steps)}; peaks are off by {max(off):.1%} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="of the transformers")
    parser.add_argument("--only", default="", help="the models whose names hold this")
    parser.add_argument("--large", type=int, help="measure a transformer of so many layers")
    parser.add_argument("--run", action="store_true", help="run the partitions")
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    if options.large:
        large(options.large)
    elif options.run:
        run(options.layers)
    else:
        compare(options.layers, options.only)


if __name__ == "__main__":
    main()

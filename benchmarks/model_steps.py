"""Measure one network in this process, by the columns asked for: right or wrong, how fast, how
much memory.

python -m benchmarks.model_steps JSON prints one line of JSON for each thing found, as
:mod:`benchmarks.cpu.worker` does."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import aotfunc
from benchmarks.cpu import allocations
from benchmarks.cpu.worker import Way, double, say, spent, times
from benchmarks.model_programs import Network, networks

#: how each column compiles a module
COLUMNS: dict[str, Callable[[nn.Module], Callable]] = {
    "eager": lambda m: m,
    "compile": torch.compile,
    "aot_eager": lambda m: torch.compile(m, backend="aot_eager"),
    "ours-eager": lambda m: aotfunc.aot_module(m, "eager"),
    "ours-cpp": lambda m: aotfunc.aot_module(m, "cpp"),
}


def prepare(column: str) -> None:
    """Import what a column's first call would import, and forget what another column's left."""
    if column in ("compile", "aot_eager"):
        importlib.import_module("torch._inductor.codegen.cpp")
        torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(1))
    elif column != "eager":
        aotfunc.clear_caches()
        aotfunc.jit(lambda x: x + 1, backend=column.removeprefix("ours-"))(torch.ones(1))


# ----- training steps ----------------------------------------------------------------------------


class Step:
    """A training step of a network of its own; it leaves the gradients in the parameters."""

    def __init__(self, network: Network, column: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.loss, self.module = network.loss, network.make()
        self.inputs = network.inputs(network.batch)
        if dtype is torch.float64:
            self.module = network.in_double(self.module)
            self.inputs = {k: double(v) for k, v in self.inputs.items()}
        self.forward = COLUMNS[column](self.module)

    def __call__(self) -> Tensor:
        self.module.zero_grad()
        loss = self.loss(self.forward(**self.inputs))
        loss.backward()
        return loss.detach()

    def left(self) -> list[Tensor]:
        """Every gradient, and the buffers, which a step may write to; no gradient is an empty
        tensor."""
        grads = [p.new_empty(0) if p.grad is None else p.grad for p in self.module.parameters()]
        return [t.clone() for t in (*grads, *self.module.buffers())]

    def twice(self) -> tuple[float, list[Tensor]]:
        """The processor time of the first call, and all that two calls leave."""
        before = spent()
        first = self()
        seconds = spent() - before
        return seconds, [first, *self.left(), self(), *self.left()]

    def trained(self, count: int) -> list[Tensor]:
        """The losses of so many steps of AdamW."""
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
        losses = []
        for _ in range(count):
            losses.append(self())
            optimizer.step()
        return losses


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any tensors, relative to the largest element of each; in those
    that are all but zero beside the others, it is relative to a thousandth of that of the others.
    """
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if b.numel()]
    sizes = [b.abs().max().item() for _, b in pairs]
    least = max(1e-3 * max(sizes), 1e-30)
    off = [(a - b).abs().max().item() / max(s, least) for (a, b), s in zip(pairs, sizes)]
    return max(x if x == x else float("inf") for x in off)


def training(network: Network, task: dict) -> None:
    """First calls, differences, AdamW, times and memory of the columns that are right."""
    _, exact = Step(network, "eager", torch.float64).twice()
    _, eager = Step(network, "eager").twice()
    losses = Step(network, "eager").trained(task["steps"])
    allowed = max(10 * difference(eager, exact), 1e-5)
    right: dict[Way, Step] = {}
    for way in [(column, "step") for column in task["columns"]]:
        if list(way) in task["skip"]:
            continue
        say("start", way)
        try:
            prepare(way[0])
            step = Step(network, way[0])
            first, found = step.twice()
            off = difference(found, exact)
            if off > allowed:
                raise AssertionError(f"wrong: error {off:.1e}, allowed {allowed:.1e}")
            by = difference(found, eager)
            trained = difference(Step(network, way[0]).trained(task["steps"]), losses)
        except Exception as e:
            say("failed", way, why=f"{type(e).__name__}: {e}".strip().splitlines()[0][:300])
            continue
        say("found", way, first=first, differs=by, trained=trained)
        right[way] = step
    for way, seconds in times(right, task["repeats"], task["budget_s"]).items():
        say("found", way, seconds=seconds)
    for way, step in right.items():
        step.module.zero_grad()
        say("found", way, bytes=allocations.peak(step))


# ----- per-sample gradients ----------------------------------------------------------------------


def per_sample(network: Network, task: dict) -> None:
    """Each sample's gradients by ``vmap(grad(loss))`` beside a loop over the samples."""
    torch.manual_seed(0)
    module = network.make().eval()
    inputs = network.inputs(network.batch)
    params = {k: p.detach() for k, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def loss(params: dict, sample: dict) -> Tensor:
        one = {k: v.unsqueeze(0) for k, v in sample.items()}
        return network.loss(aotfunc.functional_call(module, (params, buffers), (), one))

    def loop(params: dict, inputs: dict) -> dict:
        found = []
        for i in range(network.batch):
            leaves = {k: p.requires_grad_() for k, p in params.items()}
            out = loss(leaves, {k: v[i] for k, v in inputs.items()})
            grads = torch.autograd.grad(out, list(leaves.values()), allow_unused=True)
            found.append(
                [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(leaves.values(), grads, strict=True)
                ]
            )
        return dict(zip(params, map(torch.stack, zip(*found, strict=True)), strict=True))

    program = aotfunc.vmap(aotfunc.grad(loss), in_dims=(None, 0))
    ways: dict[str, Callable] = {"eager": loop}
    for column in task["columns"]:
        if column.startswith("ours-"):
            ways[column] = aotfunc.jit(program, backend=column.removeprefix("ours-"))
    expected = loop(params, inputs)
    runs: dict[Way, Any] = {}
    for column, run in ways.items():
        way = (column, "per-sample")
        if list(way) in task["skip"]:
            continue
        say("start", way)
        try:
            off = difference([*run(params, inputs).values()], [*expected.values()])
            if off > 1e-3:
                raise AssertionError(f"wrong: error {off:.1e}")
        except Exception as e:
            say("failed", way, why=f"{type(e).__name__}: {e}".strip().splitlines()[0][:300])
            continue
        say("found", way, differs=off)
        runs[way] = lambda run=run: run(params, inputs)
    for way, seconds in times(runs, task["repeats"], task["budget_s"] / 2).items():
        say("found", way, seconds=seconds)


def main() -> None:
    task = json.loads(sys.argv[1])
    os.environ.pop("LD_PRELOAD", None)  # compilers need not be counted
    torch.set_num_threads(1)
    network = networks(task["quick"])[task["name"]]
    (per_sample if task["mode"] == "per-sample" else training)(network, task)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # what libraries do while they end is no result

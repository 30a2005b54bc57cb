"""One workload in this process, by the columns asked for: correct, how fast, how much memory.

python -m benchmarks.cpu.worker JSON prints one line of JSON for each thing found. Before anything
that may kill the process it prints a line that says what it is about to do."""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from benchmarks.cpu import allocations
from benchmarks.cpu.columns import arguments, columns, leaves, prepare
from benchmarks.cpu.workloads import Workload, workloads

Way = tuple[str, str]


def say(kind: str, way: Way, **found: Any) -> None:
    print(json.dumps({"kind": kind, "column": way[0], "way": way[1], **found}), flush=True)


# ----- right or wrong ---------------------------------------------------------------------------


def double(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


def error(found: Any, expected: Any) -> float:
    """The largest error of any result, relative to the largest element of that result."""
    worst = 0.0
    found, expected = leaves(found), leaves(expected)
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    for got, right in zip(found, expected):
        scale = right.abs().max().clamp(min=1e-30)
        off = ((got.double() - right).abs().max() / scale).item()
        worst = max(worst, off if off == off else float("inf"))
    return worst


class Judge:
    """A result is right if it is about as near to float64's as eager PyTorch's in float32."""

    def __init__(self, w: Workload, args: tuple) -> None:
        program = w.program(torch.func, w.f)
        self.expected = program(*tree_map(double, args))
        self.eager = error(program(*args), self.expected)

    def verdict(self, found: Any) -> str | None:
        off = error(found, self.expected)
        if off <= max(10 * self.eager, 1e-5):
            return None
        return f"wrong: error {off:.1e}, eager's {self.eager:.1e}"


def runners(w: Workload, names: list[str], skip: list, quick: bool) -> dict[Way, Callable]:
    """The callables whose results are right, called twice; of the others it is said why not."""
    args, right, made = w.args(), {}, columns()
    judge = Judge(w, args)
    for name in names:
        for how, make in made[name](w, quick).items():
            way = (name, how)
            if list(way) in skip:
                continue
            say("start", way)
            try:
                f = make()
                given = arguments(name, f, args)
                run = lambda f=f, given=given: f(*given)
                why = judge.verdict(run()) or judge.verdict(run())
            except Exception as e:
                why = f"{type(e).__name__}: {e}".strip().splitlines()[0][:200]
            if why:
                say("failed", way, why=why)
            else:
                right[way] = run
    return right


# ----- how fast, how much memory ----------------------------------------------------------------


def times(runs: dict[Way, Callable], repeats: int, budget_s: float) -> dict[Way, float]:
    """Median processor seconds of a call; the columns take turns, every other time backwards."""
    number: dict[Way, int] = {}
    seen: dict[Way, list[float]] = {way: [] for way in runs}
    for way, run in runs.items():
        say("start", way)
        once = cpu(run, 1)
        number[way] = max(1, int(0.01 / max(cpu(run, 3 if once < 0.01 else 1), 1e-7)))
    gc.collect()
    gc.freeze()
    began = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - began > budget_s:
            break
        for way in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            seen[way].append(cpu(runs[way], number[way]))
    return {way: statistics.median(seconds) for way, seconds in seen.items()}


def cpu(run: Callable, number: int) -> float:
    start = time.process_time()
    for _ in range(number):
        run()
    return (time.process_time() - start) / number


def spent() -> float:
    """Processor seconds of this process and of those that it has waited for: compilers."""
    own, theirs = (
        resource.getrusage(resource.RUSAGE_SELF),
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    return own.ru_utime + own.ru_stime + theirs.ru_utime + theirs.ru_stime


def first_call(w: Workload, name: str, quick: bool) -> None:
    args = w.args()
    make = columns()[name](w, quick)["program"]
    say("start", (name, "program"))
    given = arguments(name, None, args)
    before = spent()
    make()(*given)
    say("first", (name, "program"), seconds=spent() - before)


def main() -> None:
    task = json.loads(sys.argv[1])
    os.environ.pop("LD_PRELOAD", None)  # compilers need not be counted
    torch.set_num_threads(1)
    names, quick = task["columns"], task["quick"]
    if task["mode"] == "cold":
        prepare(names[0])
        first_call(workloads(quick)[task["name"]], names[0], quick)
        return
    for name in names:
        prepare(name)
    torch.manual_seed(1)
    runs = runners(workloads(quick)[task["name"]], names, task["skip"], quick)
    if task["mode"] == "memory":
        for way, run in runs.items():
            say("start", way)
            say("memory", way, bytes=allocations.peak(run))
        return
    for way, seconds in times(runs, task["repeats"], task["budget_s"]).items():
        say("time", way, seconds=seconds)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # what libraries do while they end is no result

"""Every compiled function reports what it saves and computes again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import functorch.compile as functorch
import pytest
import torch
from torch import Tensor, fx, nn

from aotfunc import aot_function, aot_module, jit
from aotfunc.errors import ArgumentError, PartitionError
from aotfunc.partition import Peak, Time, save_dots

NET = nn.Sequential(
    *(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))
)
X = torch.randn(32, 8)


def loss(x: Tensor) -> Tensor:
    return NET(x).square().sum()


COMPILED = {
    "jit": lambda: jit(loss),
    "cpp": lambda: jit(loss, "cpp", memory_budget=0.3),
    "bytes": lambda: jit(loss, "eager", memory_budget="4kB"),
    "time": lambda: jit(loss, "eager", memory_budget=Time(0.1)),
    "peak and policy": lambda: aot_function(loss, memory_budget=Peak("1MB"), policy=save_dots),
    "aot_function": lambda: aot_function(loss, "eager"),
    "module": lambda: aot_module(NET, "eager", memory_budget=0.0),
    "PyTorch's": lambda: aot_function(
        loss, "eager", partition_fn=functorch.min_cut_rematerialization_partition
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_reports(name: str) -> None:
    lowered = COMPILED[name]().lower(X)
    report = lowered.partition_report()
    made = [r for r in report.saved if r.reason not in ("input", "parameter")]
    assert sum(r.bytes for r in made) == report.bytes == lowered.memory_analysis()["saved"]
    late = Counter(str(n.target) for n in lowered.graphs["backward"].graph.nodes)
    assert Counter(r.op for r in report.recomputed) <= late
    for r in [*made, *report.recomputed]:
        assert name == "module" or (Path(__file__).name in r.line and "NET(x)" in r.line)
        assert r.name in str(report)
    assert report.gap >= 0 and report.peak >= report.bytes
    assert json.loads(report.to_json())["bytes"] == report.bytes
    picture = ElementTree.fromstring(report.svg())
    assert len(picture.findall("{*}circle")) == len(report.frontier) + 1


def test_budgets_are_what_is_reported() -> None:
    report = COMPILED["bytes"]().lower(X).partition_report()
    assert report.bytes <= report.limit == 4000 and report.time > 0


def test_no_backward_no_report() -> None:
    for f, x in ((jit(torch.sin), X), (jit(loss), X)):
        with torch.set_grad_enabled(f.f is not loss), pytest.raises(ArgumentError, match="grad"):
            f.lower(x).partition_report()


def test_halves_with_other_names_have_no_report() -> None:
    def renamed(joint: fx.GraphModule, inputs: list, *, num_fwd_outputs: int) -> tuple:
        halves = functorch.default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs)
        for n in halves[0].graph.nodes:
            n.name = f"mine_{n.name}"
        return halves

    f: Callable = aot_function(lambda x: x.sin().exp().sum(), "eager", partition_fn=renamed)
    with pytest.raises(PartitionError, match="no report: the joint graph has no mine_"):
        f.lower(X.clone().requires_grad_()).partition_report()

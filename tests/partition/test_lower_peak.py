"""What the backward runs once more so that less lives at its peak."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from aotfunc import aot_function, jit, partition
from aotfunc.partition import Peak, Roofline, Time
from aotfunc.partition.memory import peak
from aotfunc.partition.ops import is_random, once
from aotfunc.partition.problem import Problem
from aotfunc.partition.roles import Joint, read_joint
from aotfunc.partition.within import ANEW, Within
from tests.partition.joints import JointOf
from tests.partition.test_solve import MODELS


def readable(joint: Joint, order: list[int], given: set[int]) -> bool:
    """Return whether every node runs after its inputs."""
    ran = set(given)
    for i in order:
        if not ran >= set(joint.inputs[i]):
            return False
        ran.add(i)
    return True


def recurrent(x: Tensor, w: Tensor) -> Tensor:
    h = c = x
    for _ in range(6):
        i, f, g, o = (torch.cat([x, h], -1) @ w).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h.sum()


GRAPHS = {
    **MODELS,
    "recurrent": lambda: JointOf(
        recurrent, torch.randn(8, 8).requires_grad_(), torch.randn(16, 32).requires_grad_()
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_choice_runs_in_order_with_no_higher_peak(name: str) -> None:
    joint = GRAPHS[name]().module
    problem = Problem(read_joint(joint.graph, 1), Roofline())
    within, cost = Within(problem), Roofline()
    for choice in within.frontier.points:
        plain, low = within.run(choice, False), within.run(choice, True)
        assert max(low.peaks) <= max(plain.peaks) and low.early == plain.early
        assert set(low.late) == set(plain.late)
        held = {problem.joint.index[problem.nodes[k]] for k in np.flatnonzero(choice.saved)}
        assert readable(problem.joint, low.late, held)
        again = list(low.late)
        for i in plain.late:
            again.remove(i)
        nodes = [problem.joint.nodes[i] for i in again]
        assert not [n for n in nodes if once(n)] and not held & set(again)
        assert sum(map(cost.time, nodes)) <= ANEW * problem.forward_time


def waves(x: Tensor) -> Tensor:
    """A chain whose backward has many values at once."""
    for _ in range(12):
        x = (x * 1.01).sin() + x * x.cos()
    return x.sum()


def test_a_lower_peak_has_the_same_numbers() -> None:
    torch.manual_seed(0)
    args = [torch.rand(64, 64, dtype=torch.float64).requires_grad_()]
    second = lambda grads: torch.autograd.grad(sum(g.square().sum() for g in grads), args)
    joint = jit(waves).lower(*args).graphs["joint"]
    fw, bw, report = partition(joint, memory_budget=0.0)
    assert report.anew and "run once more" in str(report)
    plain = max(report._within.run(report._choice, False).peaks)
    owners = [n for n in bw.graph.nodes if n.op == "placeholder" and "tangent" not in n.name]
    made = {r.name for r in report.saved if r.reason not in ("input", "parameter")}
    assert max(peak(fw.graph), peak(bw.graph, [n for n in owners if n.name in made])) < plain
    assert peak(bw.graph, [n for n in owners if n.name in made]) == report.peaks[1]
    compiled = lambda budget: aot_function(waves, "eager", memory_budget=budget)
    lowered = compiled(0.0).lower(*args)
    least = lowered.partition_report()
    assert least.anew
    made = {r.name for r in least.saved if r.reason not in ("input", "parameter")}
    late = lowered.graphs["backward"].graph  # what is compiled does not merge what runs twice
    held = [n for n in late.find_nodes(op="placeholder") if n.name in made]
    assert peak(late, held) == least.peaks[1]
    expected = torch.autograd.grad(waves(*args), args, create_graph=True)
    for budget in (0.0, Peak(least.peak)):
        got = torch.autograd.grad(compiled(budget)(*args), args)
        torch.testing.assert_close(got, expected)
    got = torch.autograd.grad(compiled(0.5)(*args), args, create_graph=True)
    torch.testing.assert_close(second(got), second(expected))
    for met in (Peak(plain), Time(0.1)):
        assert not partition(joint, memory_budget=met).report.anew
    assert not partition(joint, memory_budget=report.bytes).report.anew


def test_values_may_have_any_names() -> None:
    """Names that a partition gives are taken, and metadata of another partition is left over."""
    x = torch.rand(64, 64).requires_grad_()
    for budget in (0.0, 1.0):
        joint = jit(waves).lower(x).graphs["joint"]
        _, bw, _ = partition(joint, memory_budget=0.0)
        again = [n.meta["original"] for n in bw.graph.nodes if "original" in n.meta]
        calls = [n for n in joint.graph.nodes if n.op == "call_function" and n.name not in again]
        for name, n in zip(again, reversed(calls), strict=False):
            n.name = f"{name}_again"
        for n in joint.graph.nodes:
            n.meta["original"] = "x"
        _, bw, report = partition(joint, memory_budget=budget)
        assert again and len(report.anew) == (len(again) if budget < 1 else 0)

    def f(x_host: Tensor, x: Tensor, x_kept: Tensor, sin_again: Tensor) -> Tensor:
        y = (x_host * x * x_kept).sin().exp() * sin_again
        x.mul_(2)
        return y.sum()

    args = [torch.rand(3).requires_grad_() for _ in range(4)]
    args[1].requires_grad_(False)
    wanted = [args[0], args[2], args[3]]
    for wrap in (jit, lambda f: aot_function(f, "eager", memory_budget=0.0)):
        got = torch.autograd.grad(wrap(f)(args[0], args[1].clone(), *args[2:]), wanted)
        plain = (args[0] * args[1] * args[2]).sin().exp() * args[3]
        torch.testing.assert_close(got, torch.autograd.grad(plain.sum(), wanted))


def test_the_report_counts_results_where_a_draw_is_not_read() -> None:
    def f(x: Tensor) -> Tensor:
        torch.nn.functional.dropout(x, 0.5, True)
        return x.sin().exp().sum()

    lowered = aot_function(f, "eager", memory_budget=0.5).lower(torch.ones(3).requires_grad_())
    assert [r.name for r in lowered.partition_report().saved]


class Noisy(torch.autograd.Function):
    """Its backward draws what lives idle where most is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        noise = torch.rand_like(g.expand(8, -1, -1))
        y = (g + noise.sum(0)).expand(8, -1, -1).sin().exp().sum(0)
        return y * noise.sum(0) * g


class Even:
    """Every op takes as long as every other."""

    def time(self, n: fx.Node) -> float:
        return float(n.op == "call_function")


def test_what_the_backward_draws_runs_once() -> None:
    def f(x: Tensor) -> Tensor:
        x = Noisy.apply(x)
        for _ in range(50):
            x = x.sin()
        return x

    def split(module: fx.GraphModule, **options: Any) -> tuple:
        return partition(module, memory_budget=0.0, cost=Even(), **options)[:2]

    _, bw = JointOf(f, torch.rand(4, 4).requires_grad_()).check(split)
    assert len([n for n in bw.graph.nodes if is_random(n)]) == 1

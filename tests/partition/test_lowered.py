"""What the backward runs once more so that less lives at its peak."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from aotfunc import aot_function, jit, partition
from aotfunc.partition import PartitionError, Peak, Roofline, Time, split, verify
from aotfunc.partition.memory import peak
from aotfunc.partition.ops import once
from aotfunc.partition.problem import Problem
from aotfunc.partition.roles import Joint, read_joint
from aotfunc.partition.within import ANEW, Within
from tests.partition.test_solve import MODELS


def readable(joint: Joint, order: list[int], given: set[int]) -> bool:
    """Return whether every node runs after its inputs."""
    ran = set(given)
    for i in order:
        if not ran >= set(joint.inputs[i]):
            return False
        ran.add(i)
    return True


@pytest.mark.parametrize("name", MODELS)
def test_every_choice_runs_in_order_with_no_higher_peak(name: str) -> None:
    joint = MODELS[name]().module
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
    least = compiled(0.0).lower(*args).partition_report()
    assert least.anew
    expected = torch.autograd.grad(waves(*args), args, create_graph=True)
    for budget in (0.0, Peak(least.peak)):
        got = torch.autograd.grad(compiled(budget)(*args), args)
        torch.testing.assert_close(got, expected)
    got = torch.autograd.grad(compiled(0.5)(*args), args, create_graph=True)
    torch.testing.assert_close(second(got), second(expected))
    assert not partition(joint, memory_budget=Time(0.1)).report.anew
    assert not partition(joint, memory_budget=report.bytes).report.anew


def test_the_verifier_knows_what_may_run_once_more() -> None:
    args = [torch.ones(4).requires_grad_(), torch.ones(4).requires_grad_()]
    f = lambda x, w: (torch.nn.functional.dropout(x, 0.5, True) * w).exp().sum()
    joint = jit(f).lower(*args).graphs["joint"]
    fw, bw, _ = partition(joint, memory_budget=0.0)
    bad = fx.GraphModule(bw, split.Copy().graph)
    copied: dict[fx.Node, fx.Node] = {}
    bad.graph.graph_copy(bw.graph, copied)
    draw = next(n for n in joint.graph.nodes if once(n) and n.op == "call_function")
    with bad.graph.inserting_after(list(bad.graph.nodes)[-1]):
        new = bad.graph.call_function(draw.target, tuple(copied.get(a, a) for a in draw.args))
    new.meta.update(draw.meta, again=draw.name)
    bad.graph.output(tuple(copied[n] for n in bw.graph.output_node().args[0]))
    with pytest.raises(PartitionError):
        verify(fw, bad, joint, num_fwd_outputs=1)

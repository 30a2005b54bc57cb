"""Budgets buy the best that there is: against all subsets on small graphs, and against what the
frontier itself promises on larger ones."""

from __future__ import annotations

import json
import operator
import random
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from aotfunc import jit, partition
from aotfunc.errors import ArgumentError
from aotfunc.partition import Bytes, PartitionError, Peak, Profiled, Roofline, Time, exact
from aotfunc.partition.budget import Share, as_budget
from aotfunc.partition.exact import StateGraph
from aotfunc.partition.frontier import Frontier
from aotfunc.partition.problem import Problem
from aotfunc.partition.roles import read_joint
from aotfunc.partition.solve import INF
from tests.partition.joints import Hand, JointOf, aten, doubled, kept_bytes, sig
from tests.partition.test_solve import MODELS

# ----- small graphs, all choices -----------------------------------------------------------------


def small(seed: int) -> fx.GraphModule:
    """A random joint graph with at most 14 nodes before the backward: values that the forward
    needs, values that only the backward reads, draws, views, casts, tuples, and values of several
    sizes, also of none."""
    rng = random.Random(seed)
    h = Hand()
    values = [h.input(name) for name in "ab"[: rng.randint(1, 2)]]
    t = h.input("t", "tangent")
    # costs that are far apart, and some that are alike
    sizes = rng.choice([[1, 4, 16, 64], [0, 4], [49, 50, 51]])
    ops = [aten.sin, aten.exp, aten.mul, aten.mul, aten.alias, aten._to_copy, aten.var_mean]
    for _ in range(rng.randint(2, 10)):
        op, x, size = (
            rng.choice([*ops, aten.rand_like]),
            rng.choice(values[-4:]),
            rng.choice(sizes),
        )
        if op is aten.mul:
            values.append(h(op.Tensor, x, rng.choice(values), val=sig(size)))
        elif op is aten.alias:
            values.append(h(op.default, x, val=x.meta["val"]))
        elif op is aten._to_copy:
            half = sig(*x.meta["val"].shape, dtype=torch.bfloat16)
            values.append(h(op.default, x, val=half))
        elif op is aten.var_mean and len(h.graph.nodes) < 13:
            both = h(op.correction, x, val=(sig(1), sig(size)))
            values += [h.item(both, i) for i in range(2)]
        else:
            op = aten.sin if op is aten.var_mean else op
            values.append(h(op.default, x, val=sig(size)))
    gradients = []
    for _ in range(rng.randint(1, 2)):
        gradient = t
        for v in rng.sample(values, rng.randint(1, min(5, len(values)))):
            gradient = h(aten.mul.Tensor, gradient, v)
        gradients.append(gradient)
    return h.module([rng.choice(values), *gradients])


class Uneven:
    """A cost that no two nodes share; views and parts of tuples are free."""

    def time(self, n: fx.Node) -> float:
        made = n.op == "call_function" and n.target not in (aten.alias.default, operator.getitem)
        return float(sum(map(ord, n.name)) % 23 + 77 * (len(n.name) % 2)) if made else 0.0


def all_choices(gm: fx.GraphModule) -> list[tuple[int, float]]:
    """(bytes, time) of every choice of what to save that can be carried out: what runs in the two
    halves, for all subsets at once."""
    nodes = [n for n in gm.graph.nodes if n.op != "output"]
    result, *gradients = gm.graph.output_node().args[0]
    late: set[fx.Node] = set()
    for n in nodes:
        if n.name == "t" or late & set(n.all_input_nodes):
            late.add(n)
    random_ops = {n for n in nodes if n.target is aten.rand_like.default} - late
    able = [
        n
        for n in nodes
        if n.op == "call_function"
        and n not in late
        and n.target is not aten.alias.default
        and not isinstance(n.meta["val"], tuple)
    ]
    subsets = np.arange(1 << len(able))
    given = {n: np.full(len(subsets), n.op == "placeholder") for n in nodes}
    given |= {n: subsets >> k & 1 > 0 for k, n in enumerate(able)}

    def runs(ends: list[fx.Node], stop: bool) -> dict[fx.Node, np.ndarray]:
        found = {n: np.full(len(subsets), n in ends) for n in nodes}
        for n in reversed(nodes):
            found[n] |= given[n] & (not stop) & (n.op != "placeholder")
            found[n] &= ~(given[n] & stop)
            for p in n.all_input_nodes:
                found[p] |= found[n]
        return found

    early, backward = runs([result, *random_ops], False), runs(gradients, True)
    size, time, fine = np.zeros(len(subsets)), np.zeros(len(subsets)), subsets >= 0
    for n in nodes:
        twice = early[n] & backward[n]
        time += Uneven().time(n) * twice
        fine &= ~twice | (n not in random_ops)
    for n in able:
        size += n.meta["val"].dtype.itemsize * n.meta["val"].shape[0] * given[n]
    return sorted({(int(b), t) for b, t in zip(size[fine], time[fine].tolist(), strict=True)})


@pytest.mark.parametrize("seed", range(200))
def test_nothing_beats_a_cut(seed: int) -> None:
    """Neither a point of the frontier nor the cheapest choice at any price."""
    gm = small(seed)
    problem = Problem(read_joint(gm.graph, 1), Uneven())
    if not problem.nodes:
        return
    every = all_choices(gm)
    points = Frontier(problem).points
    for c in [*points, *(problem.cheapest(price) for price in (0.1, 1.0, 7.0, INF))]:
        assert (c.bytes, c.time) in every
        assert not [1 for b, t in every if b <= c.bytes and t <= c.time and (b, t) != c[1:]]
    assert points[0][1:] == every[0]  # the least bytes, and nothing twice
    assert points[-1].time == 0 == problem.cheapest(INF).time
    for price in (0.1, 1.0, 7.0):
        cheapest = problem.cheapest(price)
        least = min(size + price * time for size, time in every)
        assert cheapest.bytes + price * cheapest.time == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("seed", range(36))
def test_no_choice_is_better(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = small(seed)
    problem = Problem(read_joint(gm.graph, 1), Uneven())
    if not problem.nodes:
        return
    every = all_choices(gm)
    frontier = Frontier(problem)
    walk = StateGraph(problem)
    levels: dict[float, int] = {}  # each least time, and the fewest bytes that it takes
    for limit in sorted({size for size, _ in every}):
        levels.setdefault(min(time for size, time in every if size <= limit), limit)
    for least, limit in levels.items():
        line, price = frontier.bound(limit)
        assert line <= least + 1e-6
        found, bound = walk.best(limit, "bytes", price, None, 1e-6, 1e6)
        assert found is not None and found.time == pytest.approx(least) and found.bytes <= limit
        assert least * (1 - 2e-6) <= bound <= least + 1e-6
        with monkeypatch.context() as m:  # a walk that drops nearly all says what it may have lost
            m.setattr(exact, "FIRST", 1)
            found, bound = walk.best(limit, "bytes", price, None, 1e-6, 0)
        assert bound <= least + 1e-6 and (found is None or found.bytes <= limit)
        found, bound = walk.best(least, "time", 1 / price if price else 1.0, None, 1e-6, 1e6)
        assert found is not None and found.time <= least + 1e-9
        fewest = min(size for size, time in every if time <= least + 1e-9)
        assert found.bytes == fewest and fewest * (1 - 2e-6) <= bound <= fewest
        within = frontier.within(limit, "bytes")
        assert within is None or (within.time >= least - 1e-9 and within.bytes <= limit)


# ----- networks ----------------------------------------------------------------------------------

BUDGETS = [0.0, 0.1, 0.3, 0.5, 0.7, 1.0]


@pytest.mark.parametrize("name", MODELS)
def test_every_budget_is_right_and_kept(name: str) -> None:
    joint = MODELS[name]()

    def split(module: fx.GraphModule, *, num_fwd_outputs: int, budget: object) -> tuple:
        nonlocal report
        fw, bw, report = partition(module, memory_budget=budget, num_fwd_outputs=num_fwd_outputs)
        return fw, bw

    report = None
    sizes, times, peaks = [], [], []
    for budget in BUDGETS:
        fw, bw = joint.check(split, budget=budget)
        assert report.bytes == kept_bytes(fw, 1)
        assert report.time == pytest.approx(sum(Roofline().time(n) for n in doubled(fw, bw)))
        assert report.time >= report.bound * (1 - 1e-9)
        sizes.append(report.bytes)
        times.append(-report.time)
        peaks.append(report.peak)
    assert sizes == sorted(sizes) and times == sorted(times) and peaks == sorted(peaks)
    assert report.time == 0

    half = (sizes[0] + sizes[-1]) // 2
    joint.check(split, budget=half)
    assert report.bytes <= half
    joint.check(split, budget=Time(0.2))
    assert report.time <= 0.2 * report.forward_time
    middle = (peaks[0] + peaks[-1]) // 2
    joint.check(split, budget=Peak(middle))
    assert report.peak <= middle
    if peaks[0] < peaks[-1]:
        with pytest.raises(PartitionError, match=f"the least is {peaks[0]}"):
            joint.check(split, budget=Peak(peaks[0] - 1))


@pytest.mark.parametrize("name", MODELS)
def test_hard_budgets_are_near_the_bound(name: str) -> None:
    """Also where the budget lies between two points of the frontier that are far apart."""
    joint = MODELS[name]().module
    least, most = (
        partition(joint, num_fwd_outputs=1, memory_budget=b).report.bytes for b in (0.0, 1.0)
    )
    for share in (0.1, 0.5, 0.9, 0.98):
        limit = int(least + share * (most - least))
        report = partition(joint, memory_budget=limit, num_fwd_outputs=1).report
        assert report.bytes <= limit and report.gap <= 1.1e-3
        exact = partition(joint, memory_budget=limit, num_fwd_outputs=1, exact=True).report
        assert report.bound <= exact.time * (1 + 1e-9) and exact.time <= report.time
        assert exact.bytes <= limit and exact.gap <= 2e-6


def test_nothing_to_choose() -> None:
    joint = JointOf(lambda a, b: a * b, *(torch.randn(4).requires_grad_() for _ in range(2)))
    for budget in (64, 0):
        report = partition(
            joint.module, memory_budget=Bytes(budget), num_fwd_outputs=1, exact=True
        ).report
        assert (report.bytes, report.time, report.gap) == (0, 0.0, 0.0)


def test_more_is_saved_than_must_be_only_where_the_budget_asks() -> None:
    """Draws and what may run only once are saved under every budget."""
    joint = JointOf(
        lambda a, b: ((torch.rand_like(a) * a).exp() @ b).tanh(),
        *(torch.randn(4, 4).requires_grad_() for _ in range(2)),
    )
    with pytest.raises(PartitionError, match="the least is 64"):
        partition(joint.module, memory_budget="32 B", num_fwd_outputs=1)
    assert partition(joint.module, memory_budget=64, num_fwd_outputs=1).report.bytes == 64


# ----- what a budget may be ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, meant",
    [
        (0, Share(0.0)),
        (1, Share(1.0)),
        (0.5, Share(0.5)),
        ("512MiB", Bytes(512 << 20)),
        ("6 GB", Bytes(6 * 10**9)),
        (4096, Bytes(4096)),
        (Time(0.1), Time(0.1)),
    ],
)
def test_budgets(given: object, meant: object) -> None:
    assert as_budget(given) == meant


@pytest.mark.parametrize("given", [1.5, -0.1, -8, "lots", None, True, [0.5]])
def test_what_is_no_budget(given: object) -> None:
    with pytest.raises(ArgumentError):
        as_budget(given)
    with pytest.raises(ArgumentError, match="0 or more"):
        Time(-0.1)


def test_what_is_no_cost() -> None:
    joint = MODELS["chain"]().module
    with pytest.raises(ArgumentError, match="fused, roofline, flops, profiled"):
        partition(joint, cost="guess", num_fwd_outputs=1)
    with pytest.raises(ArgumentError, match="num_fwd_outputs"):
        partition(joint)


# ----- the report --------------------------------------------------------------------------------


def test_report() -> None:
    x, w = torch.randn(64, 64).requires_grad_(), torch.randn(64, 64).requires_grad_()

    def f(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w).sin().exp() @ w).tanh().sum()

    joint = jit(f).lower(x, w).graphs["joint"]
    found = partition(joint, memory_budget=0.4)
    report = found.report
    assert all(
        "test_budgets.py" in r.line for r in report.saved if r.bytes and r.reason != "input"
    )
    assert report.recomputed and all("test_budgets.py" in r.line for r in report.recomputed)
    assert sum(r.time for r in report.recomputed) == pytest.approx(report.time)
    text = str(report)
    assert "aten.sin.default" in text and "computed again" in text and "simulated" in text

    told = json.loads(report.to_json())
    assert told["bytes"] == report.bytes and len(told["saved"]) == len(report.saved)
    assert [report.bytes, report.time, report.peak] in [
        [size, pytest.approx(time), peak] for size, time, peak in told["frontier"]
    ]
    picture = ElementTree.fromstring(report.svg())
    circles = picture.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(report.frontier) + 1

    plain = [t.detach() for t in (x, w)]
    outs = found.fw(*plain)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in outs[1:]}
    theirs = {t.untyped_storage().data_ptr() for t in plain}
    assert report.bytes == sum(s.nbytes() for p, s in storages.items() if p not in theirs)


def test_measured_costs() -> None:
    joint = MODELS["mlp"]().module
    cost = Profiled(repeat=1)
    _, _, report = partition(joint, memory_budget=0.5, cost=cost, num_fwd_outputs=1)
    assert report.time > 0 and report.forward_time > 0
    known = dict(cost.known)
    partition(joint, memory_budget=0.2, cost=cost, num_fwd_outputs=1)
    assert cost.known == known  # each op is measured once
    products = [time for name, time in known.items() if "addmm" in name or "mm.default" in name]
    assert products and np.isfinite(list(known.values())).all()


def test_equal_ops_are_measured_once() -> None:
    """Also those of PyTorch's joint graphs, whose values are fake tensors."""
    with FakeTensorMode():
        like = torch.empty(4, 8), torch.empty(4, 8), torch.empty(8, 4).t()
    graph, cost = fx.Graph(), Profiled(repeat=1)
    for x in like:
        given = graph.placeholder("x")
        given.meta["val"] = x
        (sin := graph.call_function(torch.ops.aten.sin.default, (given,))).meta["val"] = x
        assert cost.time(sin) > 0
    assert len(cost.known) == 2

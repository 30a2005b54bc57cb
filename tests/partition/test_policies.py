"""Policies say what may be saved; gradients are right under all of them, and names and checkpoints
work inside every transform."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import aotfunc
from aotfunc import (
    checkpoint,
    checkpoint_name,
    grad,
    grad_and_value,
    jit,
    jvp,
    make_fx,
    partition,
    vmap,
)
from aotfunc.errors import ArgumentError, PartitionError
from aotfunc.partition import (
    Verdict,
    both,
    either,
    everything_saveable,
    must_recompute,
    must_save,
    names,
    nothing_saveable,
    problem,
    save_any_but_these,
    save_dots,
    save_dots_no_batch,
    save_only_these,
)
from aotfunc.partition.ops import is_random
from tests.partition.joints import Hand, JointOf, aten
from tests.partition.test_hazards import DRAWS, x
from tests.partition.test_numbers import PROGRAMS
from tests.reference import assert_same

BUDGETS = [0.0, 0.1, 0.3, 0.5, 0.7, 1.0]
POLICIES = {
    "everything": everything_saveable,
    "nothing": nothing_saveable,
    "dots": save_dots,
    "no elementwise": must_recompute(lambda n: torch.Tag.pointwise in n.target.tags),
    "all that may be": lambda n: Verdict.SAVE,
}
HAZARDS = {**PROGRAMS, **{name: (f, x(5, 5), x(5, 5)) for name, f in DRAWS.items()}}


@pytest.mark.parametrize("given", [None, "save", 7, -1])
@pytest.mark.parametrize("wrap", [grad, lambda f: jit(grad(f), backend="eager")])
def test_what_is_no_verdict(given: Any, wrap: Callable) -> None:
    """A policy that forgets to return says nothing, not that nothing is saved."""
    f = checkpoint(lambda x: x.sin().sin().sum(), policy=lambda n: given)
    with pytest.raises(PartitionError, match=f"a policy returns a Verdict, not {given!r}"):
        wrap(f)(torch.ones(3))


@pytest.mark.parametrize("name", HAZARDS)
def test_every_policy_at_every_budget_is_right(name: str) -> None:
    f, *inputs = HAZARDS[name]
    joint = JointOf(f, *inputs)
    drawn = [n.target for n in joint.module.graph.nodes if is_random(n)]
    peaks: dict[str, list[int]] = {p: [] for p in POLICIES}

    def split(module: fx.GraphModule, *, num_fwd_outputs: int, budget: float, p: str) -> tuple:
        fw, bw, report = partition(
            module, memory_budget=budget, policy=POLICIES[p], num_fwd_outputs=num_fwd_outputs
        )
        peaks[p].append(report.peak)
        return fw, bw

    for p in POLICIES:
        for budget in BUDGETS:
            fw, bw = joint.check(split, budget=budget, p=p)
            assert [n.target for n in fw.graph.nodes if is_random(n)] == drawn
            assert not [n for n in bw.graph.nodes if n.op == "call_function" and is_random(n)]
        assert peaks[p] == sorted(peaks[p])


@pytest.mark.parametrize("name", ["views", "attention", "casts"])
def test_sizes_may_be_symbols(name: str) -> None:
    f, *inputs = PROGRAMS[name]
    joint = JointOf(f, *inputs, mode="symbolic")
    for policy in (None, nothing_saveable, save_dots):
        for budget in (0.0, 0.5, 1.0):

            def split(module: fx.GraphModule, **options: Any) -> tuple:
                given = {"memory_budget": budget, "policy": policy}  # noqa: B023
                return partition(module, **given, **options)[:2]

            joint.check(split)


# ----- which values ------------------------------------------------------------------------------


def attention(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (x @ w).view(8, 3, 2, 4).permute(1, 2, 0, 3).unbind(0)
    scores = checkpoint_name((q @ k.transpose(-1, -2)).softmax(-1), "scores")
    mixed = checkpoint_name(scores @ v, "mixed")
    return mixed.transpose(0, 1).reshape(8, 8).tanh().sum()


INPUTS = (torch.randn(8, 8).requires_grad_(), torch.randn(8, 24).requires_grad_())


def saved_ops(policy: object, f: Callable = attention) -> set[str]:
    joint = jit(f).lower(*INPUTS).graphs["joint"]
    report = partition(joint, policy=policy).report  # type: ignore[arg-type]
    ops = {n.name: n for n in joint.graph.nodes}
    return {
        str(ops[r.name].target) for r in report.saved if r.reason not in ("input", "parameter")
    }


@pytest.mark.parametrize(
    "policy, ops",
    [
        (nothing_saveable, set()),
        (save_dots, {"mm", "bmm"}),
        (save_dots_no_batch, {"mm"}),
        (save_only_these("scores"), {"_softmax"}),
        (save_only_these("scores", "mixed"), {"_softmax"}),
        (either(save_only_these("scores"), save_dots_no_batch), {"mm", "_softmax"}),
        (both(save_dots, must_recompute(lambda n: n.target is aten.mm.default)), {"bmm"}),
        (both(everything_saveable, save_any_but_these("scores")), {"mm", "bmm", "tanh"}),
    ],
)
def test_what_policies_save(policy: object, ops: set[str]) -> None:
    found = {op.split(".")[1] for op in saved_ops(policy)}
    assert found <= ops and (found or not ops)


def test_a_policy_may_insist() -> None:
    joint = jit(attention).lower(*INPUTS).graphs["joint"]
    report = partition(joint, memory_budget=0.0, policy=must_save("scores")).report
    assert [r.reason for r in report.saved if r.bytes == 2 * 8 * 8 * 4] == ["the policy saves it"]
    free = partition(joint, memory_budget=0.0).report
    assert free.bytes < report.bytes


def test_policies_of_one_meaning_are_one_and_travel() -> None:
    p = either(save_dots, save_only_these("a", "b"))
    assert p == either(save_dots, save_only_these("b", "a")) != either(save_dots)
    assert hash(p) == hash(pickle.loads(pickle.dumps(p))) and pickle.loads(pickle.dumps(p)) == p


# ----- names -------------------------------------------------------------------------------------


def named(graph: fx.Graph) -> set[str]:
    return {name for n in graph.nodes for name in names(n)}


def test_a_name_is_no_op_and_is_kept_by_every_transform() -> None:
    def f(x: Tensor) -> Tensor:
        y = checkpoint_name({"y": x.sin()}, "y")["y"]
        y.mul_(2)
        checkpoint_name(y, "twice")
        return y.exp().sum()

    x = torch.randn(3, 4)
    assert_same(jit(f)(x), f(x), rtol=0, atol=0)
    for g in (
        grad(f),
        vmap(f),
        vmap(grad(f)),
        lambda x: jvp(f, (x,), (x,)),
    ):
        assert {"y", "twice"} <= named(make_fx(g)(x).graph)
    plain = make_fx(lambda x: (x.sin() * 2).exp().sum())(x)
    assert [n.target for n in make_fx(f)(x).graph.nodes][1:4] == [
        n.target for n in plain.graph.nodes
    ][1:4]


def test_names_are_part_of_what_is_remembered() -> None:
    def f(x: Tensor, name: str) -> Tensor:
        return checkpoint_name(x.sin(), name).exp().sum()

    for name in ("a", "b"):
        assert named(
            make_fx(lambda x, name=name: grad(lambda x: f(x, name))(x))(torch.ones(2)).graph
        ) == {name}


# ----- checkpoints -------------------------------------------------------------------------------


def layer(x: Tensor, w: Tensor) -> Tensor:
    return F.dropout(checkpoint_name((x @ w).sin(), "sin").exp(), 0.5) @ w


@pytest.mark.parametrize("policy", [None, save_dots, save_only_these("sin"), everything_saveable])
def test_checkpoints_inside_every_transform(policy: object) -> None:
    inner = checkpoint(layer, policy=policy)
    x, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)

    def of(f: Callable) -> Callable:
        return lambda w: f(f(x, w), w).tanh().sum()

    def seeded(f: Callable) -> object:
        torch.manual_seed(3)
        return f(w)

    wrappers = [
        lambda f: f,
        grad,
        lambda f: jit(grad(f)),
        lambda f: lambda w: jvp(f, (w,), (w,))[1],
        lambda f: lambda w: vmap(grad(f), randomness="same")(w.expand(2, 4, 4)),
        lambda f: grad(lambda w: grad(f)(w).square().sum()),
    ]
    for wrap in wrappers:
        torch.testing.assert_close(seeded(wrap(of(inner))), seeded(wrap(of(layer))))
    for compiled in (jit(of(inner)), aotfunc.aot_function(of(inner), "eager"), of(inner)):
        leaf = w.clone().requires_grad_()
        torch.manual_seed(3)
        compiled(leaf).backward()
        torch.testing.assert_close(leaf.grad, seeded(grad(of(layer))))


@pytest.mark.parametrize("outer", [None, nothing_saveable, save_dots])
@pytest.mark.parametrize("policy", [None, save_dots, must_save("a")])
def test_derivatives_take_parts_of_tuples_made_in_a_checkpoint(
    policy: object, outer: object
) -> None:
    """Twice, the forward reads them outside, and the tuples are never saved."""
    x, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    for op in (lambda h: F.layer_norm(h, (4,)), lambda h: h.sort(1)[0], lambda h: h.var(1)):
        inner = lambda w, op=op: op((x @ w).sin()).exp()
        found = []
        for f in (inner, jit(checkpoint(inner, policy=policy), "eager", policy=outer)):
            leaf = w.clone().requires_grad_()
            (g,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(g.square().sum(), leaf))
        torch.testing.assert_close(*found)


def test_a_checkpoint_saves_what_its_policy_lets_it() -> None:
    x, w = torch.randn(5, 4), torch.randn(4, 4).requires_grad_()

    def saved(policy: object) -> set[str]:
        def f(w: Tensor) -> Tensor:
            return checkpoint(lambda w: ((x @ w).sin().exp() @ w).tanh(), policy=policy)(w).sum()

        joint = jit(f).lower(w).graphs["joint"]
        report = partition(joint).report
        return {r.name for r in report.saved if r.reason not in ("input", "parameter")}

    assert saved(None) == {"tanh"}
    assert saved(save_dots) == {"mm", "tanh"}
    assert saved(everything_saveable) >= {"mm", "exp", "tanh"}

    def count(policy: object) -> int:  # in one program, too
        f = checkpoint(lambda w: (x @ w).sin().exp().sum(), policy=policy)
        return [n.target for n in make_fx(grad_and_value(f))(w).graph.nodes].count(aten.mm.default)

    assert count(None) == count(save_dots) + 1


# ----- compiled functions ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize(
    "options",
    [{"memory_budget": 0.0}, {"memory_budget": "1kB"}, {"policy": save_dots}]
    + [{"memory_budget": 0.5, "policy": save_any_but_these("scores")}],
)
def test_compiled_functions_within_budgets(backend: str, options: dict) -> None:
    wanted = torch.autograd.grad(attention(*INPUTS), INPUTS)
    lowered = {}
    for make in (jit, aotfunc.aot_function):
        f = make(attention, backend, **options)
        for got, want in zip(torch.autograd.grad(f(*INPUTS), INPUTS), wanted, strict=True):
            torch.testing.assert_close(got, want)
        lowered[make] = f.lower(*INPUTS).memory_analysis()["saved"]
    everything = aotfunc.aot_function(attention, backend).lower(*INPUTS)
    most = everything.memory_analysis()["saved"]
    assert max(lowered.values()) < most or options == {"policy": save_dots}
    assert pickle.loads(pickle.dumps(aotfunc.aot_function(F.relu, backend, **options))) is not None


@pytest.mark.eager  # both backends are compared
def test_the_cost_is_the_backends() -> None:
    """Where ops run one by one, what fuses is not computed again for nothing."""
    chain = lambda x: x.sin().exp().tanh().sin().exp().sum()
    x = torch.randn(64).requires_grad_()
    found = {b: jit(chain, b).lower(x).memory_analysis()["saved"] for b in ("eager", "cpp")}
    assert found["cpp"] == 0 < found["eager"]


def test_budgets_that_mean_nothing_are_refused_at_once() -> None:
    with pytest.raises(ArgumentError, match="memory_budget is 2"):
        jit(F.relu, memory_budget=2.5)
    with pytest.raises(ArgumentError, match="partition_fn decides"):
        aotfunc.aot_function(F.relu, partition_fn=aotfunc.default_partition, policy=save_dots)


# ----- the host's memory -------------------------------------------------------------------------


def by_host(n: fx.Node) -> Verdict:
    return Verdict.OFFLOAD if n.target in (aten.exp.default, aten.mm.default) else Verdict.FREE


@pytest.mark.parametrize("name", ["mlp", "attention", "exp read twice", "dropout", "rand_like"])
def test_what_goes_to_the_host_comes_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the device is the CPU, too; what is done to leave it is the same."""
    monkeypatch.setattr(problem, "off_host", lambda n: True)
    f, *inputs = HAZARDS[name]
    joint = JointOf(f, *inputs)

    def split(module: fx.GraphModule, *, num_fwd_outputs: int, budget: float) -> tuple:
        nonlocal report
        fw, bw, report = partition(
            module, memory_budget=budget, policy=by_host, num_fwd_outputs=num_fwd_outputs
        )
        return fw, bw

    report = None
    for budget in (0.0, 1.0):
        fw, bw = joint.check(split, budget=budget)
        away = [r.name for r in report.saved if r.reason == "offloaded to the host"]
        assert report.bytes == sum(
            r.bytes
            for r in report.saved
            if r.reason not in ("input", "parameter", "offloaded to the host")
        )
        for n in away:
            names = [m.name for m in fw.graph.nodes]
            assert names.index(f"{n}_host") == names.index(n) + 1  # its memory is free then
            back = next(m for m in bw.graph.nodes if m.name == n)
            assert back.target is aten._to_copy.default and back.users


def test_only_what_lies_elsewhere_goes_to_the_host() -> None:
    for device, away in (("cpu", False), ("cuda", True)):
        h = Hand()
        h.val.device = device
        a, t = h.input("a"), h.input("t", "tangent")
        y = h(aten.exp.default, a)
        gm = h.module([y, h(aten.mul.Tensor, t, y)])
        fw, bw, report = partition(gm, policy=by_host, num_fwd_outputs=1)
        assert [n.meta["val"].device for n in fw.graph.output_node().args[0][1:]] == [
            torch.device("cpu") if away else "cpu"
        ]
        assert report.bytes == (0 if away else 16)
        assert [n.target for n in bw.graph.nodes].count(aten._to_copy.default) == away

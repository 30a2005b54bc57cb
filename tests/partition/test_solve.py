"""The cut is the cheapest: against networkx on random graphs, all subsets on small ones, and
torch's partitions."""

from __future__ import annotations

import copy
import itertools
import math
import random

import functorch.compile as functorch
import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aotfunc.partition import (
    PartitionError,
    Roofline,
    default_partition,
    min_cut_rematerialization_partition,
    nbytes,
)
from aotfunc.partition.problem import saving_cost
from aotfunc.partition.roles import read_joint
from aotfunc.partition.solve import INF, Network
from aotfunc.partition.split import module, split
from aotfunc.partition.verify import verify
from tests.partition.joints import JointOf, doubled, kept_bytes, saved


def value(
    save: list[float],
    redo: list[float],
    inputs: list[list[int]],
    needed: list[int],
    kept: list[bool],
) -> float:
    """What it costs to save ``kept`` and to compute the rest of what is needed again."""
    todo, seen, cost = list(needed), set(), sum(s for s, k in zip(save, kept, strict=True) if k)
    while todo:
        i = todo.pop()
        if i not in seen and not kept[i]:
            seen.add(i)
            cost += redo[i]
            todo += inputs[i]
    return cost


@pytest.mark.parametrize("seed", range(60))
def test_as_cheap_as_networkx(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 60)
    inputs = [sorted(rng.sample(range(i), min(i, rng.randint(0, 3)))) for i in range(count)]
    save = [rng.choice([INF, 1.0, rng.randint(1, 10 ** rng.randint(1, 9))]) for _ in range(count)]
    redo = [rng.choice([INF, 0.0, rng.random() * 10 ** rng.randint(0, 8)]) for _ in range(count)]
    save = [
        1.0 if s == r == INF or not p else s for s, r, p in zip(save, redo, inputs, strict=True)
    ]
    needed = rng.sample(range(count), rng.randint(1, count))

    net = nx.DiGraph()
    net.add_nodes_from(["source", "sink"])

    def edge(a: object, b: object, cost: float) -> None:
        net.add_edge(a, b, **({} if cost == INF else {"capacity": cost}))

    for i in range(count):
        edge("source", (i, "in"), redo[i])
        edge((i, "in"), (i, "out"), save[i])
        for p in inputs[i]:
            edge((p, "out"), (i, "in"), INF)
    for i in needed:
        edge((i, "out"), "sink", INF)
    try:
        wanted = nx.minimum_cut_value(net, "source", "sink")
    except nx.NetworkXUnbounded:
        return
    kept = min_cut(save, redo, inputs, needed)
    assert value(save, redo, inputs, needed, kept) == pytest.approx(wanted, rel=1e-6)
    assert kept == min_cut(save, redo, inputs, needed)


def min_cut(save: list, redo: list, inputs: list, needed: list) -> list[bool]:
    return Network(inputs, needed).cheapest(np.array(save), np.array(redo)).saved.tolist()


def softmax(x: Tensor, w: Tensor) -> Tensor:
    y = (x @ w).sin().exp()
    return (y / y.sum(-1, keepdim=True)).tanh()


SMALL = {
    "pointwise": lambda x, w: (x.sin().exp() * w.tanh()).sigmoid(),
    "softmax": softmax,
    "views": lambda x, w: ((x @ w).t()[:3].sin().exp() * w[:3].cos()).sum(0),
    "norm": lambda x, w: F.layer_norm(x @ w, (6,)).tanh(),
    "cast": lambda x, w: x.sin().bfloat16() @ w.bfloat16(),
}


@pytest.mark.parametrize("price", [0.01, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", SMALL)
def test_no_subset_is_cheaper(name: str, price: float) -> None:
    """Every choice of saved values is split and priced by what then runs twice; none beats the
    cut."""
    joint = JointOf(
        SMALL[name], torch.randn(6, 6).requires_grad_(), torch.randn(6, 6).requires_grad_()
    )
    read = read_joint(joint.module.graph, joint.num_outputs)

    def cost(fw: torch.fx.GraphModule, bw: torch.fx.GraphModule) -> float:
        return kept_bytes(fw, 1) + price * sum(Roofline().time(n) for n in doubled(fw, bw))

    early = [n for n, late in zip(read.nodes, read.late, strict=True) if not late]
    inputs = [n for n in early if n.op == "placeholder"]
    able = [n for n in early if n.op != "placeholder" and saving_cost(n, False) < INF]
    assert len(able) <= 10
    least = math.inf
    for k in range(len(able) + 1):
        for subset in itertools.combinations(able, k):
            fw, bw = (module(joint.module, g, "part") for g in split(read, [*inputs, *subset]))
            least = min(least, cost(fw, bw))
    ours = cost(*min_cut_rematerialization_partition(joint.module, num_fwd_outputs=1, price=price))
    assert ours == pytest.approx(least, rel=1e-6)


class Block(nn.Module):
    def __init__(self, d: int, attention: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(
            nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)
        )
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        if self.attention:
            b, t, d = x.shape
            q, k, v = (
                self.qkv(self.norm(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
            )
            a = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
            x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(x)


def of_module(net: nn.Module, x: Tensor) -> JointOf:
    names, params = zip(*net.named_parameters(), strict=True)

    def f(x: Tensor, *params: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, params, strict=True)), (x,)).sum()

    return JointOf(f, x, *params, params=range(1, len(params) + 1))


MODELS = {
    "mlp": lambda: of_module(
        nn.Sequential(*[Block(32, False) for _ in range(2)]), torch.randn(4, 8, 32)
    ),
    "transformer": lambda: of_module(
        nn.Sequential(*[Block(32, True) for _ in range(2)]), torch.randn(4, 8, 32)
    ),
    "chain": lambda: JointOf(
        lambda x: x.sin().exp().tanh().sin().exp().tanh().sum(), torch.randn(64).requires_grad_()
    ),
    "conv": lambda: of_module(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.MaxPool2d(2)
        ),
        torch.randn(2, 3, 12, 12),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_not_more_bytes_than_torch(name: str) -> None:
    joint = MODELS[name]()
    assert not doubled(*joint.check(default_partition))
    joint.check(min_cut_rematerialization_partition)
    theirs = {}

    def spy(graph, inputs, *, num_fwd_outputs, **options):  # type: ignore[no-untyped-def]
        for partition in ("default_partition", "min_cut_rematerialization_partition"):
            split = getattr(functorch, partition)
            theirs[partition] = split(
                copy.deepcopy(graph), inputs, num_fwd_outputs=num_fwd_outputs, **options
            )
        theirs["joint"] = copy.deepcopy(graph)
        return theirs["default_partition"]

    functorch.aot_function(joint.f, functorch.nop, functorch.nop, partition_fn=spy)(*joint.primals)
    fw, bw = default_partition(theirs["joint"], num_fwd_outputs=1)
    assert kept_bytes(fw, 1) <= kept_bytes(theirs["default_partition"][0], 1)
    assert not doubled(fw, bw)

    def cost(fw: torch.fx.GraphModule, bw: torch.fx.GraphModule) -> float:
        return kept_bytes(fw, 1) + sum(Roofline().time(n) for n in doubled(fw, bw))

    fw, bw = min_cut_rematerialization_partition(theirs["joint"], num_fwd_outputs=1)
    assert cost(fw, bw) <= cost(*theirs["min_cut_rematerialization_partition"]) * (1 + 1e-6)
    assert kept_bytes(fw, 1) <= kept_bytes(theirs["min_cut_rematerialization_partition"][0], 1)
    heavy = [
        n
        for n in doubled(fw, bw)
        if n.target in (torch.ops.aten.mm.default, torch.ops.aten.convolution.default)
    ]
    assert not heavy


def test_lower_price_saves_less_and_computes_more() -> None:
    joint = MODELS["transformer"]()
    points = []
    for price in (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 100.0):
        fw, bw = joint.check(min_cut_rematerialization_partition, price=price)
        points.append((kept_bytes(fw, 1), -sum(Roofline().time(n) for n in doubled(fw, bw))))
    assert points == sorted(points)
    assert points[0][0] == 0  # the inputs alone
    assert points[-1] == (kept_bytes(joint.check(default_partition)[0], 1), 0)


def test_saved_bytes_are_the_storages() -> None:
    """What the report counts is what the saved tensors really keep alive."""
    joint = MODELS["transformer"]()
    fw, _ = joint.check(min_cut_rematerialization_partition)
    plain = [p.detach() for p in joint.primals]
    storages = {p.untyped_storage().data_ptr() for p in plain}
    kept = {r.untyped_storage().data_ptr(): r.untyped_storage().nbytes() for r in fw(*plain)[1:]}
    assert sum(size for p, size in kept.items() if p not in storages) == kept_bytes(fw, 1)
    handed = saved(fw, 1)
    assert sum(nbytes(n.meta["val"]) for n in handed if n.op != "placeholder") == kept_bytes(fw, 1)


def test_verify_finds_every_fault() -> None:
    """Break the split in each way that the verifier knows of."""
    joint = JointOf(
        lambda x, w: (x @ w).sin().exp(), torch.randn(4, 4).requires_grad_(), torch.randn(4, 4)
    )

    def broken(
        change: object, message: str, partition: object = min_cut_rematerialization_partition
    ) -> None:
        fw, bw = partition(joint.module, num_fwd_outputs=1)  # type: ignore[operator]
        verify(fw, bw, joint.module, num_fwd_outputs=1)
        nodes = [{n.name: n for n in half.graph.nodes} for half in (fw, bw)]
        change(*nodes)
        with pytest.raises(PartitionError, match=message):
            verify(fw, bw, joint.module, num_fwd_outputs=1)

    def output(nodes: dict[str, torch.fx.Node], values: list[torch.fx.Node]) -> None:
        nodes["output"].args = (tuple(values),)

    def swap(fw: dict[str, torch.fx.Node], bw: dict[str, torch.fx.Node]) -> None:
        sin, cos = torch.ops.aten.sin.default, torch.ops.aten.cos.default
        next(n for n in bw.values() if n.target is cos).target = sin

    def rewire(fw: dict[str, torch.fx.Node], bw: dict[str, torch.fx.Node]) -> None:
        fw["exp"].args = (fw["mm"],)

    broken(swap, "became aten.sin")
    broken(rewire, "arguments of")
    broken(lambda fw, bw: output(bw, bw["output"].args[0][:1]), "gradients")
    broken(lambda fw, bw: output(fw, [fw["mm"], *fw["output"].args[0][1:]]), "forward outputs")
    broken(lambda fw, bw: output(fw, fw["output"].args[0][:-1]), "backward inputs")
    broken(
        lambda fw, bw: output(fw, fw["output"].args[0][:1] + fw["output"].args[0][:0:-1]),
        "backward inputs",
    )

"""Forward and backward of every partition compute what eager autograd computes, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aotfunc.partition import Roofline, default_partition, min_cut_rematerialization_partition
from tests.partition.joints import JointOf, doubled, kept_bytes

aten = torch.ops.aten
cheapest = functools.partial(min_cut_rematerialization_partition, price=0.0)
unfused = functools.partial(min_cut_rematerialization_partition, cost=Roofline(fused=1.0))
PARTITIONS = {
    "default": default_partition,
    "min_cut": min_cut_rematerialization_partition,
    "least saved": cheapest,
    "unfused": unfused,
}


def t(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def attention(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (x @ w).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 8).sum(1)


def chain(x: Tensor) -> Tensor:
    for _ in range(12):
        x = x.sin() * 1.1
    return x.sum()


def batch_norm(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y, *stats = aten._native_batch_norm_legit.no_stats(x, w, None, True, 0.1, 1e-5)
    return y.relu(), *[s.detach() for s in stats]


PROGRAMS = {
    "sine": (lambda x: x.sin().sum(), t(4, 5)),
    "chain": (chain, t(16, 16)),
    "mlp": (
        lambda x, w, v: F.gelu(torch.addmm(w[0], x, w)).mm(v).tanh(),
        t(5, 5),
        t(5, 5),
        t(5, 5),
    ),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b).exp().mean(), t(4, 6), t(6), t(6)),
    "attention": (attention, t(2, 6, 8), t(8, 24)),
    "sdpa": (lambda q, k: F.scaled_dot_product_attention(q, k, k), t(1, 2, 8, 4), t(1, 2, 8, 4)),
    "conv": (lambda x, w: F.max_pool2d(F.conv2d(x, w).relu(), 2), t(2, 3, 8, 8), t(4, 3, 3, 3)),
    "conv, channels last": (
        lambda x, w: F.conv2d(x, w).sigmoid(),
        t(2, 3, 8, 8, grad=False).contiguous(memory_format=torch.channels_last).requires_grad_(),
        t(4, 3, 3, 3),
    ),
    "batch norm": (batch_norm, t(4, 3, 5, 5), t(3)),
    "views": (lambda x: (x.t()[1:3].sin().expand(2, 2, 4).exp() * x[:, 0]).sum((0, 1)), t(4, 5)),
    "view of a view saved": (lambda x: (x.exp().t().reshape(-1) ** 2)[3:9].cos(), t(4, 5)),
    "outputs are inputs and views": (lambda x: (x.sin(), x, x.t()), t(4, 5)),
    "same output twice": (lambda x: [x.exp()] * 2, t(4)),
    "unused input": (lambda x, y: x.sin(), t(4), t(4)),
    "no gradient wanted": (lambda x, y: x * y, t(4, grad=False), t(4)),
    "nothing differentiable": (lambda x, i: x.sign().detach() + i, t(4), torch.arange(4)),
    "constant gradient": (lambda x: x.sum() * 2, t(4, 5)),
    "gradient is an input": (lambda x, y: (x * y).sum(), t(4), t(4)),
    "exp read twice": (lambda x: x.exp() * x.exp().sum(), t(4, 5)),
    "one of two results": (lambda x: torch.var_mean(x, 1)[0].log() + x.sort(1)[0][:, 0], t(4, 5)),
    "split": (
        lambda x: torch.cat([a * b for a, b in zip(x.split(2), x.exp().split(2), strict=True)]),
        t(6, 5),
    ),
    "index": (
        lambda x, i: x[i].sin() + x.gather(0, i[:, None].expand(3, 5)),
        t(4, 5),
        torch.tensor([0, 2, 2]),
    ),
    "masks and constants": (
        lambda x: x.masked_fill(torch.ones(5, 5).triu(1) > 0, -1e9).softmax(-1),
        t(5, 5),
    ),
    "casts": (lambda x, w: x.sin().bfloat16().mm(w.bfloat16()).float().exp(), t(5, 5), t(5, 5)),
    "complex": (lambda x: (x * x.conj()).exp().sum(0), t(4, 5, dtype=torch.complex64)),
    "0-dim": (lambda x: x.sin() * x, t()),
    "zero-size": (lambda x: x.sin() * x.exp(), t(0, 3)),
    "fft": (lambda x: torch.fft.fft(x.sin()).abs().log1p(), t(4, 6)),
    "linalg": (lambda x: torch.linalg.solve(x + 9 * torch.eye(5), x.sin()), t(5, 5)),
}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_equal_to_eager(name: str, mode: str) -> None:
    f, *inputs = PROGRAMS[name]
    joint = JointOf(f, *inputs, mode=mode)
    sizes = {}
    for partition_name, partition in PARTITIONS.items():
        fw, bw = joint.check(partition)
        sizes[partition_name] = kept_bytes(fw, joint.num_outputs)
        if partition_name == "default":
            assert not doubled(fw, bw)
    assert sizes["least saved"] <= sizes["min_cut"] <= sizes["unfused"] <= sizes["default"]


def test_symbolic_graph_at_another_size() -> None:
    joint = JointOf(attention_any, t(2, 6, 8), t(8, 8), mode="symbolic")
    x, w = t(3, 7, 8), t(8, 8)
    tangents = [torch.randn_like(attention_any(x, w))]
    for partition in PARTITIONS.values():
        joint.check(partition, [x, w], tangents)


def attention_any(x: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        (x @ w).exp(), x, x.view(x.shape[0], -1, x.shape[2]).sin()
    )


class Net(torch.nn.Module):
    """What tracing by hand cannot do: batch norm that keeps statistics, dropout, in-place ops."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = (
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.BatchNorm2d(4),
            torch.nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu_(self.norm(self.conv(x))), 0.4)
        h = F.avg_pool2d(h, 3).flatten(1)
        return F.dropout(self.out(h).softmax(-1), 0.2)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_under_torch_aot_function(partition: str) -> None:
    """The signatures are functorch's: torch's own runtime takes our partitions, and trains as
    eager does."""
    from functorch.compile import aot_module, nop

    def split(joint, inputs, **options):  # type: ignore[no-untyped-def]
        if (
            partition == "least saved"
        ):  # recomputes batch norm from the statistics, which the runtime overwrites
            for n in joint.graph.find_nodes(op="placeholder"):
                n.meta["mutated"] = True
        return PARTITIONS[partition](joint, inputs, **options)

    results = []
    for wrap in (lambda m: m, lambda m: aot_module(m, nop, nop, partition_fn=split)):
        torch.manual_seed(0)
        net = Net()
        run = wrap(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for step in range(3):
            torch.manual_seed(step)
            run(torch.randn(6, 3, 8, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([*net.parameters(), *net.buffers()])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)

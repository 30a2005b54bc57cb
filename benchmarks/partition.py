"""Forward/backward partitions beside PyTorch's: bytes saved, what runs twice, and the time that
partitioning takes.

python -m benchmarks.partition [--layers 12]. The same joint graph (traced by PyTorch, with
Inductor's decompositions) goes through both partitions of both systems. "Saved" counts distinct
storages that the forward makes and hands over, inputs and parameters excepted. "Again" is the
traffic of the nodes that run in both graphs (aotfunc's cost model, fused), as a fraction of the
forward's. Times are the best of three."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import functorch.compile as functorch
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table

from aotfunc import partition
from aotfunc.partition import Roofline, nbytes
from aotfunc.partition.ops import base


class Block(nn.Module):
    """A transformer block with attention written out."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(
            nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        a = (q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5).softmax(-1) @ v
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(x)


class Residual(nn.Module):
    """Two convolutions around a skip."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.m, self.n = nn.GroupNorm(4, c), nn.GroupNorm(4, c)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.n(self.b(F.relu(self.m(self.a(x))))))


def chain(x: Tensor) -> Tensor:
    for _ in range(30):
        x = x.sin() * 1.1
    return x.sum()


def joint_graph(f: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    """PyTorch's own joint graph of a scalar function."""
    found = []

    def spy(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        found.append(copy.deepcopy(joint))
        return functorch.default_partition(joint, inputs, **options)

    nop = functorch.nop
    functorch.aot_function(f, nop, nop, partition_fn=spy, decompositions=select_decomp_table())(
        *inputs
    )
    return found[0]


def of_module(net: nn.Module, x: Tensor) -> fx.GraphModule:
    names, params = zip(*net.named_parameters(), strict=True)
    return joint_graph(
        lambda x, *p: torch.func.functional_call(
            net, dict(zip(names, p, strict=True)), (x,)
        ).sum(),
        x,
        *params,
    )


def measure(fw: fx.GraphModule, bw: fx.GraphModule) -> tuple[float, int, float]:
    """Megabytes and number of saved values, and the fraction of the forward that runs again."""
    handed = fw.graph.output_node().args[0][1:]  # type: ignore[index]
    owners = {base(n) for n in handed if isinstance(n.meta["val"], Tensor)}  # type: ignore
    made = [nbytes(n.meta["val"]) for n in owners if n.op != "placeholder"]
    time_of = {n.name: Roofline().time(n) for n in fw.graph.nodes}
    again = sum(time_of.get(n.name, 0.0) for n in bw.graph.nodes if n.op == "call_function")
    return sum(made) / 1e6, len(made), again / sum(time_of.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="of the transformer")
    layers = parser.parse_args().layers
    torch.manual_seed(0)
    torch.set_num_threads(1)
    mlp = nn.Sequential(
        *[m for _ in range(4) for m in (nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU())]
    )
    models = {
        "mlp, 4 layers": lambda: of_module(mlp, torch.randn(256, 512)),
        "chain of 30": lambda: joint_graph(chain, torch.randn(256, 1024).requires_grad_()),
        "conv net, 4 blocks": lambda: of_module(
            nn.Sequential(*[Residual(16) for _ in range(4)]), torch.randn(4, 16, 32, 32)
        ),
        f"transformer, {layers}": lambda: of_module(
            nn.Sequential(*[Block(256, 4) for _ in range(layers)]), torch.randn(4, 128, 256)
        ),
    }
    systems = {"aotfunc": partition, "torch": functorch}
    print(
        f"{'model':20} {'nodes':>6}  {'partition':24} {'saved MB':>9} {'values':>7} {'again':>7} "
        f"{'ms':>8}"
    )
    for name, make in models.items():
        joint = make()
        for kind in ("default_partition", "min_cut_rematerialization_partition"):
            for system, functions in systems.items():
                seconds = []
                for _ in range(3):
                    graph = copy.deepcopy(joint)
                    start = time.perf_counter()
                    fw, bw = getattr(functions, kind)(graph, (), num_fwd_outputs=1)
                    seconds.append(time.perf_counter() - start)
                megabytes, count, again = measure(fw, bw)
                label = f"{system} {kind.split('_')[0]}{'-cut' if 'cut' in kind else ''}"
                row = f"{megabytes:9.2f} {count:7} {again:7.1%} {min(seconds) * 1e3:8.1f}"
                print(f"{name:20} {len(joint.graph.nodes):6}  {label:24} {row}", flush=True)


if __name__ == "__main__":
    main()

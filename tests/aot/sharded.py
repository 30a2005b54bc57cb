"""Training by several processes, started by :mod:`.processes`."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from aotfunc import aot_module, jit
from aotfunc.errors import CaptureError


def trained(net, x, y):
    """The parameters after steps of AdamW, whole."""
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    full = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
    return [full(p).detach() for p in net.parameters()]


def accumulated(net, x, y, quiet):
    """The parameters after steps on the sum of the gradients of three parts of a batch, clipped,
    of which the last one alone is communicated."""
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for k in range(3):
            with nullcontext() if k == 2 else quiet(net):
                (net(x[k::3]) - y[k::3]).square().sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def check_no_sync(start, x, y, mine):
    """Each process adds up gradients that are not communicated; the sums are averaged. The plain
    net's, on the whole batch, are as many times as large, which clipping hides."""
    parallel = nn.parallel.DistributedDataParallel
    quiet, plain = parallel.no_sync, copy.deepcopy(start)
    wants = accumulated(plain, x, y, lambda net: nullcontext())
    for backend, how in ("eager", {}), ("cpp", {"gradient_as_bucket_view": True}):
        net = parallel(aot_module(copy.deepcopy(start), backend), **how)
        torch.testing.assert_close(accumulated(net, x[mine], y[mine], quiet), wants)


def check_training(rank, count):
    """Steps of a compiled module on parts of a batch are those of a plain one on all of it."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(8 * count, 3), torch.randn(8 * count, 2)
    mine = slice(rank * 8, rank * 8 + 8)
    parallel = nn.parallel.DistributedDataParallel

    def by_parts(net):
        for i in 0, 3:
            net[i] = fully_shard(aot_module(net[i]))
        return fully_shard(net)

    plain = trained(copy.deepcopy(start), x, y)
    for way in lambda m: parallel(aot_module(m)), lambda m: fully_shard(aot_module(m)), by_parts:
        torch.testing.assert_close(trained(way(copy.deepcopy(start)), x[mine], y[mine]), plain)
    check_no_sync(start, x, y, mine)
    split = Split(copy.deepcopy(start[0]), copy.deepcopy(start[3]), count)
    whole = nn.Sequential(start[0], nn.Tanh(), start[3])
    torch.testing.assert_close(trained(split, x, y), trained(whole, x, y))

    inside = nn.Sequential(parallel(nn.Linear(3, 8)), nn.Tanh())
    with pytest.raises(CaptureError, match=r"self\.0 is a module of DistributedData"):
        aot_module(inside)(x)
    whole = replicate(nn.Linear(3, 8))
    with pytest.raises(CaptureError, match="the module is a module of replicate"):
        aot_module(whole)


class Enter(torch.autograd.Function):
    """A value that all have, to be used by each for its part."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        dist.all_reduce(g := g.clone())
        return g


class Leave(torch.autograd.Function):
    """The sum of what all have."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(y := x.clone())
        return y

    @staticmethod
    def backward(ctx, g):
        return g


class Split(nn.Module):
    """Two layers, of whose hidden features each process has a part."""

    def __init__(self, up, down, count):
        super().__init__()
        mesh = init_device_mesh("cpu", (count,))
        split = lambda p, *where: nn.Parameter(distribute_tensor(p.detach(), mesh, where))
        self.up, self.bias = split(up.weight, Shard(0)), split(up.bias, Shard(0))
        self.down, self.last = split(down.weight, Shard(1)), split(down.bias, Replicate())

    @staticmethod
    @jit
    def layers(x, up, bias, down, last):
        return Leave.apply((Enter.apply(x) @ up.T + bias).tanh() @ down.T) + last

    def forward(self, x):
        return self.layers(x, *[p.to_local() for p in self.parameters()])

"""What each of several processes checks of programs that exchange tensors: ``python
tests/aot/processes.py RANK PROCESSES FILE``. They meet in the file."""

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import nn

from aotfunc import aot_module, grad, jit, jvp, vmap
from aotfunc.errors import CaptureError

#: what each process computes of its value, and what all compute of all values
TABLE = {
    "all_reduce": (
        lambda x: collectives.all_reduce(x.sin(), "sum", dist.group.WORLD),
        lambda xs: xs.sin().sum(0).expand_as(xs),
    ),
    "all_gather_tensor": (
        lambda x: collectives.all_gather_tensor(x.sin(), 1, dist.group.WORLD),
        lambda xs: torch.cat([*xs.sin()], 1).expand(len(xs), 4, -1),
    ),
    "all_gather_tensor_autograd": (
        lambda x: collectives.all_gather_tensor_autograd(x.sin(), 0, dist.group.WORLD),
        lambda xs: xs.sin().flatten(0, 1).expand(len(xs), -1, 2),
    ),
    "reduce_scatter_tensor": (
        lambda x: collectives.reduce_scatter_tensor(x.sin(), "sum", 0, dist.group.WORLD),
        lambda xs: xs.sin().sum(0).view(len(xs), -1, 2),
    ),
    "reduce_scatter_tensor_autograd": (
        lambda x: collectives.reduce_scatter_tensor_autograd(x.sin(), "sum", 0, dist.group.WORLD),
        lambda xs: xs.sin().sum(0).view(len(xs), -1, 2),
    ),
    "all_to_all_single": (
        lambda x: collectives.all_to_all_single(x.sin(), None, None, dist.group.WORLD),
        lambda xs: xs.sin().view(len(xs), len(xs), -1, 2).transpose(0, 1).reshape(xs.shape),
    ),
    "all_to_all_single_autograd": (
        lambda x: collectives.all_to_all_single_autograd(x.sin(), None, None, dist.group.WORLD),
        lambda xs: xs.sin().view(len(xs), len(xs), -1, 2).transpose(0, 1).reshape(xs.shape),
    ),
    "broadcast": (
        lambda x: collectives.broadcast(x.sin(), 1, dist.group.WORLD),
        lambda xs: xs[1].sin().expand_as(xs),
    ),
}


def check_collectives(rank, count):
    for name, (f, whole) in TABLE.items():
        if count > 2 and name not in ("all_reduce", "all_to_all_single"):
            continue  # four processes on two cores take their time
        ways = [lambda h: h, lambda h: jit(h, "eager")]
        check_collective(f, whole, rank, count, ways)
        if name == "all_reduce":
            check_collective(f, whole, rank, count, [lambda h: jit(h, "cpp")])


def check_collective(f, whole, rank, count, ways):
    """Values, both modes, batches and second order, of the sum over processes of each loss."""
    xs = torch.arange(count * 8.0).view(count, 4, 2)
    x, ts, batch = xs[rank], xs * 0.3 + 1, torch.stack([xs, xs + 1, xs * 2])
    loss, losses = (lambda x: f(x).square().sum()), (lambda xs: whole(xs).square().sum())
    squares = lambda g, of: lambda x: g(of)(x).square().sum()
    autograd, forward = torch.func.grad(losses), torch.func.jvp(whole, (xs,), (ts,))[1]
    second = torch.func.grad(squares(torch.func.grad, losses))(xs)
    close = torch.testing.assert_close
    for way in ways:
        close(way(f)(x), whole(xs)[rank])
        close(way(grad(loss))(x), autograd(xs)[rank])
        close(way(lambda x, t: jvp(f, (x,), (t,))[1])(x, ts[rank]), forward[rank])
        close(way(grad(squares(grad, loss)))(x), second[rank], rtol=1e-4, atol=1e-4)
        close(way(vmap(grad(loss)))(batch[:, rank]), torch.func.vmap(autograd)(batch)[:, rank])
        if way(f) is not f:  # PyTorch's own derivative of a broadcast is another one
            leaf = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(way(loss)(leaf), leaf)
            close(g, autograd(xs)[rank])


def check_training(rank, count):
    """Steps of a compiled module on parts of a batch are those of a plain one on all of it."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(8 * count, 3), torch.randn(8 * count, 2)
    mine = slice(rank * 8, rank * 8 + 8)

    def trained(net, x, y):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
        full = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
        return [full(p).detach() for p in net.parameters()]

    plain = trained(copy.deepcopy(start), x, y)
    replicated = nn.parallel.DistributedDataParallel(aot_module(copy.deepcopy(start)))
    torch.testing.assert_close(trained(replicated, x[mine], y[mine]), plain)
    sharded = fully_shard(aot_module(copy.deepcopy(start)))
    torch.testing.assert_close(trained(sharded, x[mine], y[mine]), plain)


def check_refusals():
    def summed(x):
        dist.all_reduce(y := x.sin())
        return y

    try:
        jit(summed)(torch.ones(3))
    except CaptureError as e:
        assert "torch.distributed's allreduce" in str(e), e
    else:
        raise AssertionError("an in-place collective was captured")


def main(rank, count, file):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=120),
    )
    check_collectives(rank, count)
    if count == 2:  # more processes train by the same collectives
        check_refusals()
        check_training(rank, count)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

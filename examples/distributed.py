"""The demo's net, trained by two processes, each of which takes half of every batch:
``python examples/distributed.py`` starts both.

``DistributedDataParallel`` averages the gradients of a compiled module as of any other. What the
two end with is compared with one process that takes whole batches and is not compiled; in float64,
so that a hundred steps do not make much of how sums are rounded."""

import os
import subprocess
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from aotfunc import aot_module

PROCESSES, BATCH, RATE = 2, 64, 0.3


def trained(
    net: nn.Module, images, labels, steps: int, rank: int = 0, processes: int = 1
) -> float:
    """Train on this process's share of each batch; the loss of the last one."""
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
    for k in range(steps):
        mine = torch.arange(k * BATCH, (k + 1) * BATCH)[rank::processes] % len(labels)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images[mine]), labels[mine])
        loss.backward()
        optimizer.step()
    return loss.item()


def process(rank: int, meet: str, steps: int, backend: str) -> None:
    """What one of the processes does; they meet in a file."""
    from digits import load, make_net  # the demo

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meet}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=100),
    )
    (images, labels), (test_images, test_labels) = load()
    images, test_images = images.double(), test_images.double()
    torch.manual_seed(0)
    net, reference = make_net().double(), make_net().double()
    reference.load_state_dict(net.state_dict())
    parallel = nn.parallel.DistributedDataParallel(aot_module(net, backend))
    loss = trained(parallel, images, labels, steps, rank, PROCESSES)
    trained(reference, images, labels, steps)
    for found, expected in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        right = (net(test_images).argmax(1) == test_labels).double().mean()
    print(f"process {rank}: loss {loss:.3f}, {right:.1%} of the test images right", flush=True)
    dist.destroy_process_group()


def main(quick: bool = False) -> None:
    steps, backend = ("3", "eager") if quick else ("100", "auto")
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as directory:
        running = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), f"{directory}/meet", steps, backend], env=env
            )
            for rank in range(PROCESSES)
        ]
        try:
            assert [p.wait() for p in running] == [0] * PROCESSES
        finally:
            for p in running:
                p.kill()
                p.wait()


if __name__ == "__main__":
    if sys.argv[1:]:
        process(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()

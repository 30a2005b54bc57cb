"""Whole training steps, ``loss.backward()`` and ``optimizer.step()`` included, as one program.

python -m benchmarks.training_steps [--quick] [--write] [--compile]. Each row trains one network
four ways, from the same parameters on the same batches: eagerly, with the network alone compiled
(``aot_module``), with the whole step in ``jit``, and with ``--compile`` the step in
``torch.compile``, which breaks its graph at the backward. Processor times, the ways in turn; the
first losses must agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import aotfunc
from benchmarks.measure import Report, arguments, ms, ratio

Network = tuple[nn.Module, Tensor]


def mlp(width: int, depth: int, batch: int) -> Network:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers), torch.randn(batch, width)


def convolutions() -> Network:
    layers = [
        m
        for i, o in ((3, 16), (16, 32), (32, 32))
        for m in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 256, 10)), torch.randn(8, 3, 16, 16)


def transformer() -> Network:
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return net, torch.randn(8, 32, 64)


NETWORKS: dict[str, Callable[[], Network]] = {
    "MLP, 4 layers of 8": lambda: mlp(8, 4, 16),
    "MLP, 6 layers of 256": lambda: mlp(256, 6, 64),
    "3 convolutions, batch norm": convolutions,
    "transformer, 2 layers of 64": transformer,
}
OPTIMIZERS: dict[str, Callable[[nn.Module], optim.Optimizer]] = {
    "SGD": lambda net: optim.SGD(net.parameters(), 1e-3, momentum=0.9),
    "AdamW": lambda net: optim.AdamW(net.parameters(), 1e-3),
}


def step_of(network: str, optimizer: str, way: str) -> Callable[[], Tensor]:
    """Return a training step of a network of its own."""
    torch.manual_seed(0)
    net, x = NETWORKS[network]()
    forward = aotfunc.aot_module(net) if way == "aot_module" else net
    updates = OPTIMIZERS[optimizer](net)

    def step() -> Tensor:
        updates.zero_grad()
        y = forward(x)
        loss = F.mse_loss(y, torch.zeros_like(y))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        updates.step()
        return loss.detach()

    compilers = {"jit": aotfunc.jit, "torch.compile": torch.compile}
    return compilers.get(way, lambda f: f)(step)


def spent(run: Callable[[], Tensor], calls: int) -> tuple[float, list[float]]:
    """Return the processor time of a call, and the losses."""
    start, losses = time.process_time(), [run() for _ in range(calls)]
    return (time.process_time() - start) / calls, [x.item() for x in losses]


def measure(network: str, optimizer: str, ways: list[str], quick: bool) -> list[str]:
    steps = {way: step_of(network, optimizer, way) for way in ways}
    first, losses = {}, {}
    for way, step in steps.items():
        each, losses[way] = spent(step, 3)
        first[way] = 3 * each
    seen: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3 if quick else 15):
        for way, step in steps.items():
            each, more = spent(step, 5)
            seen[way].append(each)
            losses[way] += more
    for way in ways:
        torch.testing.assert_close(losses[way][:9], losses["eager"][:9], rtol=1e-3, atol=1e-5)
    found = {way: statistics.median(times) for way, times in seen.items()}
    best = min(t for way, t in found.items() if way != "jit")
    named = f"{network}, {optimizer}"
    return [named, *map(ms, found.values()), ratio(best, found["jit"]), *map(ms, first.values())]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = ["eager", "aot_module", "jit"] + ["torch.compile"] * options.compile
    command = f"python -m benchmarks.training_steps{' --compile' * options.compile}"
    report = Report("training_steps", "Whole training steps", command)
    head = ["network, optimizer", *ways, "best other / jit", *[f"{way}, first 3" for way in ways]]
    rows = [measure(n, o, ways, options.quick) for n in NETWORKS for o in OPTIMIZERS]
    report.table("Processor time of a step", head, rows)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()

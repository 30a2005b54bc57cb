"""What Inductor's disk cache saves a second process: python -m benchmarks.inductor_cache.

Two processes, one after the other, call the same jitted functions for the first time, forward and
backward; they share a cache folder that is empty at the start. The time is that of the first call
and its backward, capture included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.measure import Report, arguments, ms

PROGRAMS = ("softmax", "layers with dropout", "transformer layer, bfloat16")


def program(name: str):
    """``(function, argument)``."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "softmax":
        return lambda x: (x.sin() * 3).softmax(-1), torch.randn(64, 64, requires_grad=True)
    if name == "layers with dropout":
        net = nn.Sequential(
            nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 8)
        )
        return net, torch.randn(16, 64, requires_grad=True)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).bfloat16()
    return layer, torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)


def first_calls() -> None:
    """Print ``[seconds, hits, misses, bypasses]`` of each program as JSON; run in a process of its
    own."""
    import torch
    from torch._dynamo.utils import counters

    import aotfunc

    torch.set_num_threads(1)
    aotfunc.jit(lambda x: x + 1, backend="inductor")(
        torch.ones(3)
    )  # imports are not what is measured
    found = {}
    for name in PROGRAMS:
        counters.clear()
        f, x = program(name)
        start = time.perf_counter()
        aotfunc.jit(f, backend="inductor")(x).float().sum().backward()
        seconds = time.perf_counter() - start
        events = [
            counters["inductor"][f"fxgraph_cache_{event}"] for event in ("hit", "miss", "bypass")
        ]
        found[name] = [seconds, *events]
    print(json.dumps(found))


def process(folder: str) -> dict[str, list]:
    command = [sys.executable, "-m", "benchmarks.inductor_cache", "--first"]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    if out.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--first", action="store_true", help="print what the first calls of this process take"
    )
    options = parser.parse_args()
    if options.first:
        first_calls()
        return
    report = Report(
        "inductor_cache",
        "Inductor's disk cache across processes",
        "python -m benchmarks.inductor_cache",
    )
    with tempfile.TemporaryDirectory() as folder:
        one, two = process(folder), process(folder)
    cells = lambda seconds, *events: [ms(seconds), " / ".join(map(str, events))]
    rows = [[name, *cells(*one[name]), *cells(*two[name])] for name in PROGRAMS]
    events = "hits / misses / bypasses"
    head = ["first call and backward", "first process", events, "second process", events]
    report.table("Compile times", head, rows)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()

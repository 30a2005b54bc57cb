"""Programs of several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aotfunc import grad, jit, vmap

ROOT = Path(__file__).parents[2]
GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()


@pytest.mark.skipif(not GLOO, reason="this build of PyTorch has no gloo")
@pytest.mark.limit(300)  # processes that wait for each other share the cores
@pytest.mark.parametrize("count", [2, 4])
def test_processes(tmp_path, count):
    """See :mod:`tests.aot.processes`."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.aot.processes"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(tmp_path / "meet")],
            cwd=ROOT,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [p.communicate()[1] for p in running]
    finally:
        for p in running:
            p.kill()
            p.wait()
    assert not any(p.returncode for p in running), "\n".join(said)


def test_named_ranges_of_the_profiler():
    """They are there while the function is captured, and record nothing afterwards."""

    def f(x):
        with torch.profiler.record_function("a range"):
            y = x.sin()
        return (y * 2).sum()

    x = torch.randn(3)
    torch.testing.assert_close(jit(f)(x), f(x))
    torch.testing.assert_close(grad(f)(x), x.cos() * 2)
    torch.testing.assert_close(vmap(f)(x[:, None]), x.sin() * 2)
    with torch.profiler.profile(acc_events=True) as p:  # 2.11 warns without
        jit(f, "eager")(x)
    assert "a range" in {e.key for e in p.key_averages()}


OPS = """
import torch
schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")]
packets = {s.name[6:]: getattr(torch.ops.aten, s.name[6:]) for s in schemas}
ops = lambda: [getattr(p, o) for p in packets.values() for o in p.overloads()]
before = ops()
import aotfunc
assert all(x is y for x, y in zip(before, ops(), strict=True))
"""


def test_ops_are_the_same_after_the_import():
    """DTensor's rules, and tables of others, know them by identity."""
    subprocess.run([sys.executable, "-c", OPS], cwd=ROOT, check=True)

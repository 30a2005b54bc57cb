"""Workloads measured in processes of their own, so that a crash or a hang costs one cell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.cpu import allocations

#: what was found of a workload: column -> {"seconds", "way", "why", "first", "again", "bytes"}
Cells = dict[str, dict[str, Any]]


def environment(**more: str) -> dict[str, str]:
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    one |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # so that its compilers are waited for
    one |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}
    # however much was allocated before, memory that is given back stays with the process
    one |= {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    return os.environ | one | more


def worker(task: dict, env: dict[str, str], limit_s: float) -> tuple[list[dict], str | None]:
    """The lines that it printed, and how it ended if not well."""
    module = task.get("worker", "benchmarks.cpu.worker")
    command = [sys.executable, "-W", "ignore", "-m", module, json.dumps(task)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(
                command, env=env, stdout=out, stderr=err, timeout=limit_s
            ).returncode
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            code, how = 1, f"not done after {limit_s:.0f} s"
        out.seek(0), err.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{")]
        last = err.read().strip().splitlines()[-1:]
    return lines, f"{how} {' '.join(last)}"[:200] if code else None


def together(task: dict, env: dict[str, str], limit_s: float) -> list[dict]:
    """What a worker finds of all columns; one that kills it is left out and said to have done
    so."""
    failures: list[dict] = []
    while True:
        lines, died = worker(task | {"skip": [f["at"] for f in failures]}, env, limit_s)
        started = [line for line in lines if line["kind"] == "start"]
        if not died or not started:
            if died:
                raise RuntimeError(f"{task['name']}: {died}")
            return lines + failures
        culprit = {k: started[-1][k] for k in ("column", "way")}
        failures.append({"kind": "failed", **culprit, "why": died, "at": list(culprit.values())})


def measured(task: dict, limit_s: float) -> Cells:
    """Times of one workload: the faster of each column's ways that are right."""
    cells: Cells = {}
    for line in together(task, environment(), limit_s):
        cell = cells.setdefault(line["column"], {})
        if line["kind"] == "time" and line["seconds"] < cell.get("seconds", float("inf")):
            cell |= {"seconds": line["seconds"], "way": line["way"]}
        elif line["kind"] == "failed":
            cell.setdefault("why", []).append(f"{line['way']}: {line['why']}")
    return cells


def memory(task: dict, limit_s: float) -> Cells:
    """Peaks of one workload: the lower of each column's ways."""
    cells: Cells = {}
    env = environment(LD_PRELOAD=allocations.library())
    for line in together(task | {"mode": "memory"}, env, limit_s):
        if line["kind"] == "memory":
            cell = cells.setdefault(line["column"], {})
            cell["bytes"] = min(line["bytes"], cell.get("bytes", line["bytes"]))
    return cells


def first_calls(task: dict, limit_s: float) -> Cells:
    """A first call with empty caches, and one in another process that finds them filled."""
    cells: Cells = {}
    for column in task["columns"]:
        with tempfile.TemporaryDirectory() as caches:
            env = environment(
                TORCHINDUCTOR_CACHE_DIR=f"{caches}/inductor",
                AOTFUNC_CACHE_DIR=f"{caches}/aotfunc",
                JAX_COMPILATION_CACHE_DIR=f"{caches}/jax",
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
                JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
            )
            for when in ("first", "again"):
                lines, _ = worker(task | {"mode": "cold", "columns": [column]}, env, limit_s)
                for line in lines:
                    if line["kind"] == "first":
                        cells.setdefault(column, {})[when] = line["seconds"]
    return cells

"""What a first call costs in a fresh process, the library's import included: 16 programs, ours
against torch.func's.

python -m benchmarks.first_use [--quick] [--write]. Every measurement is a process of its own; what
counts is its processor time after ``import torch``, the smallest of several runs. Bytecode is
cached, as that of installed packages is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

from benchmarks.first_use_programs import BATCHES, PROGRAMS
from benchmarks.measure import Report, arguments, ms


def child(library: str, name: str, threads: int) -> list[float]:
    """Seconds of importing torch, importing the library, and the program, in a new process."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "benchmarks.first_use_programs", library, name]
    env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(name: str, repeat: int, threads: int) -> dict[str, list[float]]:
    """The best run of each library; they take turns."""
    runs: dict[str, list[list[float]]] = {"aotfunc": [], "torch.func": []}
    for _ in range(repeat):
        for library, found in runs.items():
            found.append(child(library, name, threads))
    return {library: min(found, key=lambda t: t[1] + t[2]) for library, found in runs.items()}


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report("first_use", "First use", "python -m benchmarks.first_use")
    child("aotfunc", next(iter(PROGRAMS)), options.threads)  # caches the bytecode
    head = ["program", "torch.func", "aotfunc", "of which import", "ours / torch.func's"]
    torch_import, ratios, rows = math.inf, [], {}
    for name in [*PROGRAMS, *BATCHES]:
        best = measured(name, 1 if options.quick else 3, options.threads)
        (_, *theirs), (_, *ours) = best["torch.func"], best["aotfunc"]
        torch_import = min(torch_import, best["torch.func"][0], best["aotfunc"][0])
        ratio = sum(ours) / sum(theirs)
        rows[name] = [name, ms(sum(theirs)), ms(sum(ours)), ms(ours[0]), f"{ratio:.2f}"]
        if name in PROGRAMS:
            ratios.append(ratio)
    caption = "Processor time of import and first call, beyond `import torch`"
    report.table(caption, head, [rows[name] for name in PROGRAMS])
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    report.note(
        f"Geometric mean {mean:.2f}, largest {max(ratios):.2f}; `import torch` itself takes "
        f"{ms(torch_import)}."
    )
    caption = "What torch.func has ready with `import torch`: the difference is our import"
    report.table(caption, head, [rows[name] for name in BATCHES])
    if options.write:
        report.write()


if __name__ == "__main__":
    main()

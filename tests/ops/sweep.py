"""The whole op table in worker processes: python -m tests.ops.sweep [PATTERN …] [--jobs 2] [--part I/N] [--update].

Prints what fails and a summary, compares with known_failures.txt (a new failure or a listed one that passes ends with
status 1). --update rewrites the list from this run, --write puts the summary into docs/ops.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

HEADER = """# Failures of the op table that are known: `op dtype composition  reason`, one a line.
# The list may only shrink: a listed failure that passes is an error. python -m tests.ops.sweep --update rewrites it.
"""


def work() -> None:
    """A worker: op names come in, one line of JSON for each goes out."""
    import torch

    from tests.ops import table

    torch.set_num_threads(1)
    for line in sys.stdin:
        results = table.run(line.strip())
        print(json.dumps([[d, c, r] for (d, c), r in results.items()]), flush=True)


def start() -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.ops.sweep", "--worker"]
    env = {**os.environ, "AOTFUNC_DEBUG": os.environ.get("AOTFUNC_DEBUG", "1")}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )


def feed(names: queue.Queue, results: dict, progress) -> None:
    """Feed one worker until no names are left; a worker that dies is replaced, its op noted as a crash."""
    worker = start()
    while True:
        try:
            name = names.get_nowait()
        except queue.Empty:
            break
        print(name, file=worker.stdin, flush=True)
        line = worker.stdout.readline()
        if line:
            for dtype, composition, outcome in json.loads(line):
                results[name, dtype, composition] = outcome
        else:
            results[name, "-", "-"] = f"FAIL: the process died ({worker.wait()})"
            worker = start()
        progress(name)
    worker.stdin.close()
    worker.wait()


def sweep(names: list[str], jobs: int) -> dict[tuple[str, str, str], str]:
    from tqdm import tqdm

    todo: queue.Queue = queue.Queue()
    for name in names:
        todo.put(name)
    results: dict[tuple[str, str, str], str] = {}
    with tqdm(total=len(names), unit="op", mininterval=2) as bar:
        threads = [threading.Thread(target=feed, args=(todo, results, lambda n: bar.update())) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return dict(sorted(results.items()))


def summary(results: dict) -> list[list[str]]:
    counts = Counter((d, c, r.split(":")[0]) for (_, d, c), r in results.items())
    rows = []
    for dtype, composition in sorted({(d, c) for d, c, _ in counts}):
        n = {k: counts[dtype, composition, k] for k in ("pass", "FAIL", "skip")}
        compared = n["pass"] + n["FAIL"]
        share = f"{100 * n['pass'] / compared:.1f} %" if compared else "-"
        rows.append([dtype, composition, str(n["pass"]), str(n["FAIL"]), str(n["skip"]), share])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="shell patterns of op names (default all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts, interleaved (default 1/1)")
    parser.add_argument("--update", action="store_true", help="rewrite known_failures.txt from this run")
    parser.add_argument("--write", action="store_true", help="write the summary to docs/ops.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    from rich.console import Console
    from rich.table import Table

    from tests.ops import table

    names = [n for n in table.OPS if not options.patterns or any(fnmatch.fnmatch(n, p) for p in options.patterns)]
    part, parts = map(int, options.part.split("/"))
    names = names[part - 1 :: parts]
    began = time.time()
    results = sweep(names, options.jobs)
    known = {k: why for k, why in table.known().items() if k[0] in set(names)}
    failed = {k: r for k, r in results.items() if r.startswith("FAIL")}
    console = Console(width=180)
    for key, outcome in failed.items():
        console.print(
            " ".join(key),
            "(known)" if key in known else "[red]NEW[/]",
            outcome,
            markup=key not in known,
            soft_wrap=True,
        )
    gone = [k for k in known if k not in failed]
    for key in gone:
        console.print(" ".join(key), "[red]is listed as failing and passes[/]")
    head = ["dtype", "composition", "pass", "fail", "no reference", "of compared"]
    rows = summary(results)
    shown = Table(*head, title=f"{len(names)} ops in {time.time() - began:.0f} s")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    if options.update:
        kept = {k: why for k, why in table.known().items() if k[0] not in set(names)}
        kept |= {k: r.removeprefix("FAIL: ").split(" (at ")[0][:140] for k, r in failed.items()}
        lines = [f"{' '.join(k)}  {' '.join(r.split())}" for k, r in sorted(kept.items())]
        table.KNOWN.write_text(HEADER + "\n".join(lines) + ("\n" if lines else ""))
    if options.write:
        text = ["# Ops under every composition", "", "`python -m tests.ops.sweep`: aotfunc against torch.autograd,"]
        text += ['forward AD and loops on OpInfo samples; "no reference": PyTorch has no answer to compare with.', ""]
        text += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)] + [
            "| " + " | ".join(r) + " |" for r in rows
        ]
        Path("docs/ops.md").write_text("\n".join(text) + "\n")
    return 0 if options.update else int(bool(gone or set(failed) - set(known)))


if __name__ == "__main__":
    sys.exit(main())

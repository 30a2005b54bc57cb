"""Capture speed: make_fx(grad(f)) beside torch's make_fx(torch.func.grad(f)) and
jax.make_jaxpr(jax.grad(f)).

python -m benchmarks.capture [--quick] [--write]. All peers in one process and run, medians; the
first capture of a fresh process in subprocesses, import time apart. Ours includes
functionalisation, tidying and metadata; "with code" adds the generated Python."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.measure import Report, arguments, growth, median, ms, ratio


def ours(f, args):
    import aotfunc

    return aotfunc.make_fx(aotfunc.grad(f))(*args)


def torchs(f, args):
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(torch.func.grad(f), tracing_mode="fake")(*args)


def have_jax() -> bool:
    try:
        import jax  # noqa: F401
    except ImportError:
        return False
    return True


def calls(gm) -> int:
    """Aten ops of a graph: call_function nodes without getitem."""
    return sum(n.op == "call_function" and "getitem" not in str(n.target) for n in gm.graph.nodes)


# the first capture of a fresh process
# --------------------------------------------------------------------------------


def first(peer: str, name: str) -> None:
    """Print import and first-capture seconds of one peer; run in a process of its own."""
    start = time.perf_counter()
    if peer == "jax":
        from benchmarks import jax_programs as programs

        capture = programs.capture
    else:
        import torch

        from benchmarks import programs  # type: ignore[no-redef]

        torch.set_num_threads(1)
        if peer == "ours":
            import aotfunc  # noqa: F401

            capture = ours
        else:
            capture = torchs
    imported = time.perf_counter()
    f, args = programs.CAPTURED[name]()
    built = time.perf_counter()
    capture(f, args)
    print(imported - start, time.perf_counter() - built)


def fresh(peer: str, name: str, repeat: int) -> tuple[float, float]:
    """Medians of (import, first capture) over fresh processes."""
    pairs = []
    for _ in range(repeat):
        command = [sys.executable, "-m", "benchmarks.capture", "--first", peer, name]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{out.stderr[-2000:]}")
        pairs.append([float(word) for word in out.stdout.split()[-2:]])
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


# the tables
# -------------------------------------------------------------------------------------------------


def warm(name: str, quick: bool, jax: bool) -> tuple[int, dict[str, float | None]]:
    """Graph ops and median seconds by peer of one program."""
    from benchmarks import programs

    repeat, budget, rest = (1, 0.0, 0) if quick else (5, 12.0, 1)
    f, args = programs.CAPTURED[name]()
    gm = ours(f, args)
    seconds: dict[str, float | None] = {
        "ours": median(lambda: ours(f, args), repeat=1 if quick else 11, budget_s=budget),
        "code": median(lambda: ours(f, args).code, repeat=repeat, budget_s=budget, warmup=0),
        "torch": median(lambda: torchs(f, args), repeat=repeat, budget_s=budget, warmup=rest),
        "jax": None,
    }
    if jax:
        from benchmarks import jax_programs

        g, jargs = jax_programs.CAPTURED[name]()
        seconds["jax"] = median(
            lambda: jax_programs.capture(g, jargs), repeat=repeat, budget_s=budget
        )
    return calls(gm), seconds


def warm_table(report: Report, names: list[str], quick: bool, jax: bool) -> None:
    measured = {name: warm(name, quick, jax) for name in names}
    rows = []
    for name, (ops, t) in measured.items():
        per_op = f"{t['ours'] / max(ops, 1) * 1e6:.0f}"
        ratios = [ratio(t[peer], t["ours"]) for peer in ("torch", "jax")]
        rows.append(
            [
                name,
                str(ops),
                ms(t["ours"]),
                per_op,
                ms(t["code"]),
                ms(t["torch"]),
                ms(t["jax"]),
                *ratios,
            ]
        )
    head = [
        "program",
        "graph ops",
        "ours",
        "µs/op",
        "with code",
        "torch",
        "JAX",
        "torch/ours",
        "JAX/ours",
    ]
    report.table("Capture of the gradient, warm", head, rows)
    chains = {
        int(name.split("_")[1]): t for name, (_, t) in measured.items() if name.startswith("chain")
    }
    peers = ["ours", "torch", *(["jax"] if jax else [])]
    fits = [
        f"{peer} {growth(list(chains), [t[peer] for t in chains.values()]):.2f}" for peer in peers
    ]
    report.note(f"Growth exponent over the chains: {', '.join(fits)}.")


def fresh_table(report: Report, names: list[str], quick: bool, jax: bool) -> None:
    rows = []
    for name in names:
        results = {
            p: fresh(p, name, 1 if quick else 3)
            for p in (["ours", "torch", "jax"] if jax else ["ours", "torch"])
        }
        mine, theirs, other = results["ours"], results["torch"], results.get("jax")
        rows.append(
            [
                name,
                ms(mine[1]),
                ms(theirs[1]),
                ms(other[1]) if other else "-",
                ratio(theirs[1], mine[1]),
                " / ".join(ms(r[0]) for r in results.values()),
            ]
        )
    head = ["program", "ours", "torch", "JAX", "torch/ours", "import: ours / torch / JAX"]
    report.table("First capture of a fresh process (imports apart)", head, rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--first",
        nargs=2,
        metavar=("PEER", "PROGRAM"),
        help="one cold capture (used by the benchmark)",
    )
    parser.add_argument("--only", choices=["warm", "fresh"], help="one of the two tables")
    options = parser.parse_args()
    if options.first:
        first(*options.first)
        return
    import torch

    from benchmarks import programs

    torch.set_num_threads(options.threads)
    report = Report("capture", "Capture speed", "python -m benchmarks.capture")
    names = ["chain_100", "chain_300"] if options.quick else list(programs.CAPTURED)
    jax = have_jax()
    if options.only != "fresh":
        warm_table(report, names, options.quick, jax)
    if options.only != "warm":
        cold = names[:1] if options.quick else ["chain_100", "transformer_12", "resnet_50_like"]
        fresh_table(report, cold, options.quick, jax)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()

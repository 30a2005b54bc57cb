"""Draw the tables of docs/ as plots, and link them there: nothing is measured.

python -m benchmarks.plots. A table that has changed needs its plot drawn again; a test says so."""

from __future__ import annotations

import hashlib
import io
import re
from typing import NamedTuple

from benchmarks.measure import DOCS
from benchmarks.tables import Table, tables

PLOTS_DIR = DOCS / "plots"


class Plot(NamedTuple):
    """A plot of the columns that match, of the tables of a page that match, under the first of
    these. ``of``: what the numbers are; in units of the column ``one``, if there is one."""

    name: str
    page: str
    captions: str
    columns: str
    of: str
    one: str = ""
    named: int = 1


PEERS = r"torch.func / autograd|torch.compile|AOTAutograd, Inductor|jax.jit"
GROUPS = r"(Fused|Norms|Per-sample|DP-SGD of|Ensembles|Blocks|Tiny).*"
PLOTS = [
    Plot("times", "performance", GROUPS, f"{PEERS}|ours, .*", "time of a call", "ours, cpp"),
    Plot("first_calls", "performance", "First calls", "(?!workload).*", "s"),
    Plot("memory", "performance", "Peak.*", f"{PEERS}|ours, .*", "peak memory", "ours, cpp"),
    Plot("partitions", "partition", "Beside PyTorch's", "ours: bytes|time", "share", named=2),
    Plot("capture", "bench_capture", "Capture of.*", "ours|torch|JAX", "s"),
    Plot("clients", "bench_clients", "Tests.*", "time, .*", "time"),
    Plot("clipping", "bench_clipping", "Time", "(?!network).*", "s"),
    Plot("clipping_memory", "bench_clipping", "Peak.*", "(?!network).*", "B"),
    Plot("loops", "bench_control_flow", "A step of the gradient.*", ".*steps", "s"),
    Plot("eager", "bench_eager", "Time per call.*", "torch.func|ours: .*", "s"),
    Plot("first_use", "bench_first_use", "Processor time.*", "torch.func|aotfunc", "s"),
    Plot("graphs", "bench_graphs", "Ops", "aotfunc|torch.*|JAX", "ops", "aotfunc"),
    Plot("derivatives", "bench_higher_order", "k-th.*", ".*: ops", "ops"),
    Plot("models", "bench_models", "Training steps", "eager|aot_module, .*", "time", "eager"),
    Plot("first_steps", "bench_models", "First steps", "eager|aot_module, .*", "s"),
    Plot(
        "training_steps",
        "bench_training_steps",
        "Processor time.*",
        "eager|aot_module|jit|torch.compile",
        "s",
    ),
    Plot("overhead", "bench_overhead", "Time per call.*", "plain|torch.func|jit", "s"),
]


def of_page(plot: Plot, text: str) -> list[Table]:
    """Return the tables that a plot shows."""
    return [t for t in tables(text, plot.named) if re.fullmatch(plot.captions, t.caption)]


def points(plot: Plot, found: list[Table]) -> dict[str, dict[str, float]]:
    """Return the numbers of each column by row, zeros left out: the axis is logarithmic."""
    series: dict[str, dict[str, float]] = {}
    for table in found:
        one = table.values(plot.one) if plot.one else {}
        for column in table.columns(plot.columns):
            numbers = {row: v for row, v in table.values(column).items() if v}
            if plot.one:
                numbers = {row: v / one[row] for row, v in numbers.items() if row in one}
            series.setdefault(column, {}).update(numbers)
    return series


def digest(shown: object) -> str:
    """Return what tells one content of a plot from another."""
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


def svg(plot: Plot, text: str) -> str:
    """Return the plot of a page with this text: a row for each of the table, a dot for each column
    on a logarithmic axis. The same text gives the same file."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter

    series = points(plot, of_page(plot, text))
    rows = list(dict.fromkeys(row for numbers in series.values() for row in numbers))
    with matplotlib.rc_context({"svg.hashsalt": plot.name, "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 1.1 + 0.21 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for i, row in enumerate(rows):
            here = [numbers[row] for numbers in series.values() if row in numbers]
            axes.plot([min(here), max(here)], [i, i], color="#d5dbe3", linewidth=1, zorder=1)
        for (column, numbers), marker in zip(series.items(), "osDv^P*X"):
            places = [rows.index(row) for row in numbers]
            axes.scatter([*numbers.values()], places, s=22, marker=marker, label=column, zorder=2)
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        plain = FuncFormatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_major_formatter(EngFormatter(plot.of) if plot.of in ("s", "B") else plain)
        axes.xaxis.set_minor_formatter("")
        axes.grid(axis="x", color="#eef1f5")
        unit = f"{plot.one}: 1; " if plot.one else ""
        axes.set_xlabel(f"{AXES.get(plot.of, plot.of)} ({unit}logarithmic)", fontsize=9)
        figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
        file = io.StringIO()
        about = {"Date": None, "Creator": None, "Description": digest((plot, series))}
        figure.savefig(file, format="svg", metadata=about)
    return re.sub("(?m) +$", "", file.getvalue())


AXES = {"s": "seconds", "B": "bytes"}


def linked(text: str, page: str) -> str:
    """Return the page's text with a link to each of its plots under the heading that it shows."""
    for plot in PLOTS:
        link = f"![{plot.name.replace('_', ' ')}](plots/{plot.name}.svg)"
        found = of_page(plot, text) if plot.page == page else []
        if found and link not in text:
            heading = f"# {found[0].caption}\n\n"
            text = text.replace(heading, f"{heading}{link}\n\n", 1)
    return text


def main() -> None:
    PLOTS_DIR.mkdir(exist_ok=True)
    for plot in PLOTS:
        page = DOCS / f"{plot.page}.md"
        page.write_text(linked(page.read_text(), plot.page))
        (PLOTS_DIR / f"{plot.name}.svg").write_text(svg(plot, page.read_text()))
        print(f"docs/plots/{plot.name}.svg")


if __name__ == "__main__":
    main()

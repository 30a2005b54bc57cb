"""The history of the published tables: what each commit changed in them.

python -m benchmarks.history. Appends a line to docs/history.jsonl for each commit that is not in
there and changed a page of tables: its date, versions, processor and rows. Then docs/history.md
and its plot are made of that file."""

from __future__ import annotations

import io
import json
import re
import statistics
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.measure import DOCS
from benchmarks.plots import GROUPS, PEERS, PLOTS_DIR, digest
from benchmarks.tables import tables

FILE = DOCS / "history.jsonl"
PAGES = ["performance", "partition", *sorted(p.stem for p in DOCS.glob("bench_*.md"))]


class Series(NamedTuple):
    """A number of each record of a page: the geometric mean, over the rows of the tables that
    match, of the best peer over ours."""

    name: str
    page: str
    captions: str
    ours: str
    peers: str


SERIES = [
    Series("compiled by cpp / fastest peer", "performance", GROUPS, "ours, cpp", PEERS),
    Series("compiled by eager / fastest peer", "performance", GROUPS, "ours, eager", PEERS),
    Series("capture / torch's", "bench_capture", "Capture of.*", "ours", "torch"),
    Series("un-jitted call / torch.func's", "bench_eager", ".*", "ours: again", "torch.func"),
    Series("jitted call / torch.func's", "bench_eager", ".*", "ours: jit", "torch.func"),
    Series("ops / torch's", "bench_graphs", "Ops", "aotfunc", "torch.func, make_fx"),
    Series("DP-SGD / fastest peer", "bench_clipping", "Time", "ours, cpp", f"{PEERS}|ghost.*"),
    Series("networks / eager's", "bench_models", "Training steps", "aot_module, cpp", "eager"),
]


def record(page: str, text: str, commit: str, day: str) -> dict[str, Any]:
    """Return what the history keeps of a page: numbers in seconds, bytes, or as they are."""
    machine = re.search(r"on (torch \S+), (Python \S+?), (.*?)(?:, \d+ thread\(s\))?\.", text)
    named = re.search(r", commit .*?, (AMD|Intel)(.*?);", text)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for table in tables(text, named=2 if page == "partition" else 1):
        for column in table.head[1:]:
            for row, v in table.values(column).items():
                rows.setdefault(table.caption, {}).setdefault(row, {})[column] = float(f"{v:.4g}")
    return {
        "date": day,
        "commit": commit,
        "page": page,
        "versions": [machine[1], machine[2]] if machine else [],
        "processor": named[1] + named[2] if named else machine[3] if machine else "",
        "rows": rows,
    }


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=DOCS, capture_output=True, text=True, check=True)
    return done.stdout


def unrecorded(known: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the records that are not known by page and commit, the oldest first."""
    for page in PAGES:
        last = None
        log = git("log", "--reverse", "--format=%h %cI", "--abbrev=9", "--", f"{page}.md")
        for commit, day in map(str.split, log.splitlines()):
            found = record(page, git("show", f"{commit}:./{page}.md"), commit, day[:16])
            if found["rows"] not in (last, {}) and (page, commit) not in known:
                yield found
            last = found["rows"]


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def factor(series: Series, found: dict[str, Any]) -> tuple[float, int] | None:
    """Return how many times as long the best peer takes, and of how many rows that is the
    geometric mean."""
    ratios = []
    for caption, rows in found["rows"].items():
        if found["page"] != series.page or not re.fullmatch(series.captions, caption):
            continue
        for columns in rows.values():
            peers = [v for c, v in columns.items() if re.fullmatch(series.peers, c)]
            if peers and columns.get(series.ours):
                ratios.append(min(peers) / columns[series.ours])
    return (statistics.geometric_mean(ratios), len(ratios)) if ratios else None


def numbers(records: list[dict[str, Any]]) -> dict[str, list[tuple[dict, float, int]]]:
    """Return the records that each series has a number of, and that number."""
    each = {s.name: [(r, factor(s, r)) for r in records] for s in SERIES}
    return {name: [(r, *f) for r, f in found if f] for name, found in each.items()}


def page_of(records: list[dict[str, Any]]) -> str:
    """Return the text of docs/history.md."""
    text = [
        "# History",
        "",
        "`python -m benchmarks.history` appends to `docs/history.jsonl` what each commit changed "
        "in the tables of these pages, and makes this page of it.",
        "",
        "A number is the geometric mean, over the rows of a table, of the best peer's over ours: "
        "more than 1 is faster, or smaller. Tables have got rows and columns in time, and "
        "machines were busy: read the large steps.",
        "",
        "![history](plots/history.svg)",
        "",
        "| number | date | commit | versions, processor | rows | peer / ours |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for name, found in numbers(records).items():
        for r, mean, count in found:
            where = ", ".join([*r["versions"], r["processor"]])
            text.append(
                f"| {name} | {r['date']} | {r['commit']} | {where} | {count} | {mean:.2f} |"
            )
    return "\n".join([*text, ""])


def svg(records: list[dict[str, Any]]) -> str:
    """Return the plot: a line for each series over the commits that changed a table."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    commits = list(dict.fromkeys(r["commit"] for r in records))
    with matplotlib.rc_context({"svg.hashsalt": "history", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        for (name, found), marker in zip(numbers(records).items(), "osDv^P*X"):
            at = [commits.index(r["commit"]) for r, *_ in found]
            axes.plot(at, [mean for _, mean, _ in found], marker=marker, markersize=4, label=name)
        axes.axhline(1, color="#8a97a8", linewidth=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_xticks(range(len(commits)), commits, rotation=90, fontsize=7)
        axes.set_ylabel("best peer / ours", fontsize=9)
        axes.grid(axis="y", color="#eef1f5")
        figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
        file = io.StringIO()
        about = {"Date": None, "Creator": None, "Description": digest(page_of(records))}
        figure.savefig(file, format="svg", metadata=about)
    return re.sub("(?m) +$", "", file.getvalue())


def main() -> None:
    records = recorded()
    new = list(unrecorded({(r["page"], r["commit"]) for r in records}))
    new.sort(key=lambda r: r["date"])
    with FILE.open("a") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in new)
    (DOCS / "history.md").write_text(page_of([*records, *new]))
    (PLOTS_DIR / "history.svg").write_text(svg([*records, *new]))
    print(f"{len(new)} records appended to docs/{FILE.name}, {len(records)} were there")


if __name__ == "__main__":
    main()

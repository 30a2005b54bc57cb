"""The plots in docs/ show the tables that are there now, and the history what was there before."""

import json
import re
import subprocess

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import history, plots
from benchmarks.measure import DOCS
from benchmarks.tables import tables, value

PAGE = """
# Two tables

## Times

| f | ours | torch |
| --- | ---: | ---: |
| sin | 12 µs (0.50x) | **6 µsᵃ** |
| cos | 1.5 s → 2 s | - |
| tan | 0 | wrong |

## Shares

| f | how | ours |
| --- | --- | ---: |
| sin | a | 0.5 |
|  | b | 25% |
"""


def description(name):
    return re.search("<dc:description>(.*)<", (DOCS / "plots" / f"{name}.svg").read_text())[1]


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda p: p.name)
def test_a_plot_fits_its_table(plot):
    """If not: ``python -m benchmarks.plots``."""
    text = (DOCS / f"{plot.page}.md").read_text()
    series = plots.points(plot, plots.of_page(plot, text))
    assert len(series) > 1 and all(series.values())
    assert description(plot.name) == plots.digest((plot, series))
    assert plots.linked(text, plot.page) == text and f"(plots/{plot.name}.svg)" in text


@pytest.mark.parametrize(
    "cell, number",
    [("12 µs (0.5x)", 12e-6), ("**3 msʰ**", 3e-3), ("9.5 s → 1 s", 9.5), ("1e+03 KiB", 1024e3)]
    + [("0.43x", 0.43), ("25%", 0.25), ("3.0.1", None), ("wrong", None), ("", None), ("-", None)],
)
def test_the_number_of_a_cell(cell, number):
    assert value(cell) == pytest.approx(number)


def test_the_same_table_gives_the_same_plot():
    plot = plots.Plot("example", "page", "Times", "ours|torch", "s")
    drawn = plots.svg(plot, PAGE)
    assert drawn == plots.svg(plot, PAGE)
    assert drawn.count("<use") >= 3 and all(
        f">{name}<" in drawn for name in ("sin", "cos", "ours")
    )
    assert ">tan<" not in drawn  # it has no number that a logarithmic axis could show
    times, shares = tables(PAGE, named=2)
    assert shares.values("ours") == {"sin, a": 0.5, "sin, b": 0.25}
    relative = plots.Plot("example", "page", "Times", "ours|torch", "time", "torch")
    assert plots.points(relative, [*tables(PAGE)][:1])["ours"] == {"sin": 2.0}


def test_the_history_is_that_of_its_file():
    """If not: ``python -m benchmarks.history``."""
    records = history.recorded()
    assert (DOCS / "history.md").read_text() == history.page_of(records)
    assert description("history") == plots.digest(history.page_of(records))
    assert all(r["versions"] or r["page"] == "partition" for r in records)


def test_the_history_grows_by_what_commits_change(tmp_path, monkeypatch):
    docs, file = tmp_path / "docs", tmp_path / "docs" / "history.jsonl"
    (docs / "plots").mkdir(parents=True)
    monkeypatch.setattr(history, "DOCS", docs)
    monkeypatch.setattr(history, "FILE", file)
    monkeypatch.setattr(history, "PLOTS_DIR", docs / "plots")
    monkeypatch.setattr(history, "PAGES", ["bench_eager"])
    identity = ("-c", "user.name=name", "-c", "user.email=mail")
    git = lambda *words: subprocess.run(["git", *identity, *words], cwd=docs, check=True)
    git("init", "--quiet")
    for ours in ("2 ms", "2 ms", "1 ms"):
        text = "# Page\n\n`command` on torch 2.13.0+cpu, Python 3.11.7, a chip, 1 thread(s).\n\n"
        text += "| case | torch.func | ours: jit |\n| --- | ---: | ---: |\n"
        (docs / "bench_eager.md").write_text(f"{text}| grad | 4 ms | {ours} |\n")
        git("add", "--all")
        git("commit", "--quiet", "--allow-empty", "--message", "a table")
        history.main()
    first, last = map(json.loads, file.read_text().splitlines())
    assert first["versions"] == ["torch 2.13.0+cpu", "Python 3.11.7"]
    assert first["processor"] == "a chip" and first["commit"] != last["commit"]
    assert last["rows"] == {"Page": {"grad": {"torch.func": 0.004, "ours: jit": 0.001}}}
    (numbers,) = filter(None, history.numbers([first, last]).values())
    assert [(mean, count) for _, mean, count in numbers] == [(2.0, 1), (4.0, 1)]

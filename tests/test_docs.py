"""The examples in docstrings and on pages run and say what they show."""

import ast
import builtins
import doctest
import html
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aotfunc
from aotfunc import backends

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = sorted(m.name for m in pkgutil.walk_packages(aotfunc.__path__, "aotfunc."))
PUBLIC = [
    name for name in vars(aotfunc) if not name.startswith("_") and callable(getattr(aotfunc, name))
]


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    monkeypatch.delenv("AOTFUNC_BACKEND")
    monkeypatch.setitem(backends.REGISTRY, "eager", backends.EAGER)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name):
    module = importlib.import_module(name)
    names = {"torch": torch, **{n: getattr(aotfunc, n) for n in PUBLIC}, **vars(module)}
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=names):
        torch.manual_seed(0)
        runner.run(test)
    assert not runner.summarize(verbose=False).failed


API, TOUR = ROOT / "docs" / "api.md", ROOT / "docs" / "index.md"
ALL_PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
PAGES = [p for p in ALL_PAGES if ">>> " in p.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_examples_of_a_page(page, monkeypatch):
    monkeypatch.setattr(backends, "REGISTRY", dict(backends.REGISTRY))
    text = re.sub("^ *```.*$", "", page.read_text(), flags=re.M)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0))
    assert not runner.summarize(verbose=False).failed


def text_of(page):
    """Return the text that a page shows: that of another file, if its head names one."""
    source = re.match(r"---\nfrom: (\S+)\n", page.read_text())
    return (ROOT / source[1] if source else page).read_text()


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: p.name)
def test_the_links_of_a_page_lead_somewhere(page):
    titles = lambda p: [
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text_of(p).splitlines()
        if line.startswith("#")
    ]
    prose = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", page.read_text())
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        path, _, title = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not title or title in titles(there), target


def test_the_site_is_built(tmp_path):
    """Strictly: a broken link or reference is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert '"made_by": "backward"' in (tmp_path / "show.html").read_text()
    assert 'src="show.html"' in (tmp_path / "index.html").read_text()
    copied = examples_of(tmp_path / "index.html")
    examples = doctest.DocTestParser().get_examples(re.sub("(?m)^```.*$", "", TOUR.read_text()))
    assert len(copied) > 5 and "".join(copied) == "".join(e.source for e in examples)
    named = re.findall(r"(?:^::: aotfunc\.|`)(\w+)", API.read_text(), re.M)
    assert not {*PUBLIC}.difference(named)
    examples = examples_of(tmp_path / "api.html")
    assert len(examples) > 50
    for code in examples:  # each runs by itself, as far as names say
        nodes = [*ast.walk(ast.parse(code))]
        names = [n for n in nodes if isinstance(n, ast.Name)]
        bound = {n.id for n in names if not isinstance(n.ctx, ast.Load)}
        bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
        bound |= {
            n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.alias)
        }
        assert not {n.id for n in names} - bound - {*dir(builtins)}, code


def examples_of(page):
    """The code that the copy buttons of a page of the site copy."""
    found = re.findall('data-copy="(.*?)"', page.read_text(), re.DOTALL)
    return [html.unescape(code) for code in found]


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_an_example(name):
    f = getattr(aotfunc, name)
    assert ">>> " in f.__doc__ or f.__module__.startswith("torch.")


@pytest.mark.parametrize("name", MODULES)
def test_what_a_docstring_points_to_is_there(name):
    """Names with a module in them: ``aotfunc.x.y`` or, from the file's own package, ``.x.y``."""
    module = importlib.import_module(name)
    package = module.__package__
    for kind, target in re.findall(
        r":(mod|class|func|data):`~?(\.?\w+(?:\.\w+)+|\.\w+)`", Path(module.__file__).read_text()
    ):
        full = f"{package}{target}" if target.startswith(".") else target
        if kind == "mod":
            importlib.import_module(full)
        elif full.startswith("aotfunc."):
            owner, _, attribute = full.rpartition(".")
            assert hasattr(importlib.import_module(owner), attribute), full

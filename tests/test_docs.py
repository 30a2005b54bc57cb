"""The examples in docstrings and on pages run and say what they show."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import aotfunc
from aotfunc import backends

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = sorted(m.name for m in pkgutil.walk_packages(aotfunc.__path__, "aotfunc."))
PUBLIC = [name for name in vars(aotfunc) if not name.startswith("_") and callable(getattr(aotfunc, name))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name):
    module = importlib.import_module(name)
    names = {"torch": torch, **{n: getattr(aotfunc, n) for n in PUBLIC}, **vars(module)}
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=names):
        torch.manual_seed(0)
        runner.run(test)
    assert not runner.summarize(verbose=False).failed


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/walk.md"])
def test_the_examples_of_a_page(page, monkeypatch):
    monkeypatch.setattr(backends, "REGISTRY", dict(backends.REGISTRY))
    assert not doctest.testfile(str(ROOT / page), module_relative=False, optionflags=OPTIONS).failed


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_a_docstring(name):
    assert getattr(aotfunc, name).__doc__

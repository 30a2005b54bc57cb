"""The examples in docstrings run and say what they show."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import aotfunc

MODULES = sorted(m.name for m in pkgutil.walk_packages(aotfunc.__path__, "aotfunc."))
PUBLIC = [name for name in vars(aotfunc) if not name.startswith("_") and callable(getattr(aotfunc, name))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name):
    module = importlib.import_module(name)
    names = {"torch": torch, **{n: getattr(aotfunc, n) for n in PUBLIC}, **vars(module)}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=names):
        torch.manual_seed(0)
        runner.run(test)
    assert not runner.summarize(verbose=False).failed


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_a_docstring(name):
    assert getattr(aotfunc, name).__doc__

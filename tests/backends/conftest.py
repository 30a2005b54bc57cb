"""Compiled kernels of the tests go where the tests' other files go."""

import pytest
import torch

from aotfunc.backends.loops import native
from aotfunc.native import store


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty disk cache, and a process that has loaded nothing."""
    monkeypatch.setenv("AOTFUNC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native, "LOADED", {})
    native.threads.cache_clear()
    store.temporary.cache_clear()
    yield tmp_path / "kernels"
    native.threads.cache_clear()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

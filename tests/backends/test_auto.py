"""Where no backend is named: C++ on the CPU where there is a compiler, or what one has left."""

import errno
import inspect
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from aotfunc import aot_function, backends, jit
from aotfunc.backends import auto
from aotfunc.backends.loops import native
from aotfunc.errors import BackendError, BackendWarning
from aotfunc.native import store


@pytest.fixture
def automatic(cache, monkeypatch):
    """An empty disk cache, and a process in which no compiler has failed."""
    monkeypatch.setenv("AOTFUNC_BACKEND", "auto")
    monkeypatch.setitem(backends.REGISTRY, "eager", backends.EAGER)
    monkeypatch.setattr(auto, "_failed", set())
    return cache


def f(x):
    return (x.sin() * 2).tanh().sum()


X = torch.linspace(-1, 1, 7)


def run(compiled, x=X):
    """The value and the gradient."""
    x = x.clone().requires_grad_()
    out = compiled(x)
    out.backward()
    return out.detach(), x.grad


def kernels(compiled):
    """Whether kernels ran in the place of all ops: what is run eagerly is said."""
    return "run eagerly" not in str(compiled.explain())


def quietly(compiled, x=X):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run(compiled, x)


@pytest.fixture
def without(monkeypatch):
    """Take the compiler away."""
    return lambda: monkeypatch.setenv("PATH", "")


def test_it_is_the_default():
    for compiles in (jit, aot_function):
        parameters = inspect.signature(compiles).parameters
        assert (parameters.get("fw_compiler") or parameters["backend"]).default == "auto"


def test_with_a_compiler(automatic):
    compiled = jit(f)
    torch.testing.assert_close(quietly(compiled), run(f))
    assert kernels(compiled) and list(automatic.glob("*.so"))


def test_without_a_compiler_eager_and_silent(automatic, without):
    without()
    compiled = jit(f)
    torch.testing.assert_close(quietly(compiled), run(f), rtol=0, atol=0)
    assert "forward: the whole graph: there is no C++ compiler" in str(compiled.explain())
    assert not list(automatic.iterdir())


def test_without_a_compiler_what_is_on_disk_is_used(automatic, without, monkeypatch):
    right = run(jit(f))
    before = sorted(automatic.iterdir())
    without()
    native.LOADED.clear()
    monkeypatch.setattr(subprocess, "Popen", None)
    compiled = jit(f)
    torch.testing.assert_close(quietly(compiled), right, rtol=0, atol=0)
    assert kernels(compiled) and sorted(automatic.iterdir()) == before
    other = jit(lambda x: f(x.cos()))
    torch.testing.assert_close(quietly(other), run(lambda x: f(x.cos())), rtol=0, atol=0)
    assert not kernels(other)


def test_damaged_files_are_not_used(automatic, without):
    run(jit(f))
    for path in automatic.glob("*.so"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:-1])
    without()
    native.LOADED.clear()
    compiled = jit(f)
    torch.testing.assert_close(quietly(compiled), run(f))
    assert not kernels(compiled)


def test_a_compiler_that_fails_is_named_once(automatic, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no room for vectors\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(BackendWarning) as found:
        for g in (f, lambda x: f(x * 3)):
            compiled = jit(g)
            torch.testing.assert_close(run(compiled), run(g), rtol=0, atol=0)
            assert "the C++ compiler failed" in str(compiled.explain())
    (message,) = [str(w.message) for w in found if w.category is BackendWarning]
    assert "runs graphs op by op" in message and "no room for vectors" in message
    kept = message.rpartition("The source is kept in ")[2]
    assert "extern" in Path(kept).read_text()


def test_no_place_for_kernels(automatic, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(store, "build_in", full)
    compiled = jit(f)
    with pytest.warns(BackendWarning) as found:
        torch.testing.assert_close(run(compiled), run(f), rtol=0, atol=0)
    assert any("runs graphs op by op: there is no place" in str(w.message) for w in found)


def test_elsewhere_than_on_the_cpu(automatic):
    compiled = jit(f)
    assert compiled(torch.ones(3, device="meta")).device.type == "meta"
    assert not list(automatic.glob("*.so")) and kernels(compiled)


def test_named_by_the_environment(automatic, monkeypatch):
    monkeypatch.setenv("AOTFUNC_BACKEND", "eager")
    torch.testing.assert_close(run(jit(f)), run(f), rtol=0, atol=0)
    assert not automatic.exists()
    monkeypatch.setenv("AOTFUNC_BACKEND", "none such")
    with pytest.raises(BackendError, match="no backend 'none such'"):
        jit(f)

"""Nodes of autograd in C++ take the place of Python's once a compiler has run in the background.
(What they do is tested beside Python's, in test_repeated_backward.)"""

import os
import select
import subprocess
import sys
import threading

import pytest
import torch

from aotfunc import jit
from aotfunc.errors import BackendWarning
from aotfunc.runtime import native_node, repeated_node
from aotfunc.runtime.native_node import Nodes

pytestmark = pytest.mark.limit(300)  # a compiler may run


def f(x, w):
    return torch.tanh(x * w).sum(-1) * x[:, 0]


class Waiting:
    """An extension whose compiler runs until it is told that it is done."""

    def __init__(self, extension):
        self.extension, self.done = extension, threading.Event()

    def find(self):
        return self.extension.find()

    def compile(self, last):
        assert last and self.done.wait(60)


def test_native_nodes_after_many_calls(monkeypatch, node_library):
    """The compiler runs beside the calls; nodes are Python's until it is done."""
    own = Nodes()
    own.library, own.extension = None, Waiting(own.extension)
    for module in (repeated_node, native_node):
        monkeypatch.setattr(module, "nodes", lambda: own)
    monkeypatch.setattr(repeated_node, "MANY", 5)
    compiled, kinds = jit(f), set()
    args = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    expected = torch.autograd.grad(f(*args).sum(), args)
    for k in range(30):
        y = compiled(*args)
        kinds.add(type(y.grad_fn))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), args), expected)
        if k == 15:
            assert len(kinds) == 1 and own.library is None
            own.extension.done.set()
            own.thread.join()
    assert len(kinds) == 2 and own.library is not None


def test_a_failing_compiler(monkeypatch, node_library, tmp_path):
    monkeypatch.setenv("AOTFUNC_CACHE_DIR", str(tmp_path))
    own = Nodes()
    assert own.library is None
    own.extension.source = "#error no"
    with pytest.warns(BackendWarning, match=r"nodes of autograd are Python's(.|\n)*kept in"):
        own.compile()
    assert own.library is None


def test_they_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("AOTFUNC_NATIVE_NODES", "0")
    own = Nodes()
    own.compile()
    assert own.library is None


COMPILER = """#!/bin/sh
case " $* " in
*" -x c++ "*) touch "$TMPDIR/own"; sleep 50 > "$RUNS" & wait ;;
*) exec c++ "$@" ;;
esac
"""
ENDING = """
import os, pathlib, sys, threading, time
from aotfunc.native.extension import Extension

extension, cache = Extension(""), pathlib.Path(os.environ["AOTFUNC_CACHE_DIR"])
threading.Thread(target=extension.compile, daemon=True).start()
while not (there := [*cache.rglob("own")]):
    time.sleep(0.01)
if not (pid := os.fork()):
    sys.exit()
os.waitpid(pid, 0)
print(there[0].exists())
"""


def test_a_process_that_ends_stops_its_compiler(tmp_path, node_library):
    """It ends with what it has started and its files, but not where a forked child ends."""
    compiler, runs, cache = tmp_path / "compiler", tmp_path / "runs", tmp_path / "cache"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    os.mkfifo(runs)
    places = {"CXX": str(compiler), "RUNS": str(runs), "AOTFUNC_CACHE_DIR": str(cache)}
    with open(os.open(runs, os.O_RDONLY | os.O_NONBLOCK)) as reader:
        done = subprocess.run(
            [sys.executable, "-c", ENDING],
            env={**os.environ, **places},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
        assert select.select([reader], [], [], 10)[0]
    assert not [p for p in cache.rglob("*") if p.is_file()]

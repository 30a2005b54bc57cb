"""Nodes of autograd in C++ take the place of Python's once a compiler has run in the background.
(What they do is tested beside Python's, in test_repeated_backward.)"""

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

"""Results of kernels in the memory of values that nothing reads any more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aotfunc import jit, make_fx, vmap
from aotfunc.backends.loops import backend, launch
from tests.backends.test_cpp import floats
from tests.kernels import every_kernel

pytestmark = pytest.mark.usefixtures("cache")


def taken(f, *args: Tensor) -> int:
    """Return how many results take a value's memory; they are what they are without, bit by
    bit, with the same strides and as much memory."""
    first, found = len(every_kernel.made), []
    for reuse in (backend.reuse, lambda *_: None):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(backend, "reuse", reuse)
            compiled = jit(f, backend=every_kernel)
            outs = [compiled(*args) for _ in range(2)]
        found += [[o] if isinstance(o, Tensor) else list(o) for o in outs]
    for outs in found[1:]:
        for a, b in zip(found[0], outs, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
            assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
    return sum(len(k.taken) for k in every_kernel.made[first:])


def twice_read(x: Tensor) -> Tensor:
    y = x @ x
    return y.sin() + y.flip(0)


def alive(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ x
    return y.sin() @ x, y * 2 + (y.sin() @ x)


def one_of_two_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    y = (x @ x).sum(0, keepdim=True)
    return y * 2, (y * x).sum()


#: what is computed, and how many results take the memory of another value
CASES = {
    "of a product": (lambda x: (x @ x).sin(), 1),
    "of a product, seen otherwise": (lambda x: (x @ x).view(4, 64, 1).sin(), 1),
    "transposed": (lambda x: (x @ x).t().contiguous().sin() @ x, 0),
    "softmax": (lambda x: (x @ x).softmax(-1), 1),
    "layer norm": (lambda x: F.layer_norm(x @ x, (16,)), 1),
    "one for two": (lambda x: (x @ x).sin() * (x @ x.t()).cos(), 1),
    "two for two": (lambda x: (lambda y, z: (y + z, y - z))(x @ x, x @ x.t()), 2),
    "an argument": (lambda x: x.sin(), 0),
    "a returned value": (lambda x: (lambda y: (y, y.sin()))(x @ x), 0),
    "a returned view": (lambda x: (lambda y: (y.t(), y.sin()))(x @ x), 0),
    "read at two places": (twice_read, 0),
    "read again later": (alive, 1),
    "a part": (lambda x: (x @ x)[:4].sin(), 0),
    "another dtype": (lambda x: (x @ x).sin() > 0, 0),
    "a row for all": (one_of_two_axes, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_taken(case):
    f, count = CASES[case]
    x = floats(16, 16)
    before = x.clone()
    assert taken(f, x) == count
    assert torch.equal(x, before)


def test_values_of_a_module_and_constants_stay():
    w, c = floats(16, 16), torch.arange(256.0).view(16, 16)

    def f(x: Tensor) -> Tensor:
        return (w * 2).sin() @ x + (c @ c).tanh() * (torch.ones(16, 16) @ torch.ones(16, 16)).cos()

    taken(f, floats(16, 16))
    assert torch.equal(c, torch.arange(256.0).view(16, 16))


def test_a_graph_that_is_retained():
    compiled = jit(lambda x, w: torch.tanh(x @ w).softmax(-1), backend="cpp")
    x, w = floats(16, 16), floats(16, 16).requires_grad_()
    loss = compiled(x, w).square().sum()
    first = torch.autograd.grad(loss, w, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, w)[0])


def test_batched():
    assert taken(vmap(lambda x: torch.tanh(x @ x).softmax(0)), floats(3, 16, 16))


def test_the_plain_form_makes_new_results(monkeypatch):
    monkeypatch.setattr(launch, "native_form", lambda: None)
    assert taken(lambda x: (x @ x).sin(), floats(16, 16)) == 1


def test_what_frees_memory_runs_first():
    def f(x: Tensor, u: Tensor) -> Tensor:
        y, z = x @ u, u @ u
        return z.sin() + y @ x[:, :1]

    graph, _ = backend.with_kernels(make_fx(f)(floats(64, 64), floats(64, 64)))
    assert [n.name for n in graph.nodes if "mm" in n.name] == ["mm", "mm_2", "mm_1"]

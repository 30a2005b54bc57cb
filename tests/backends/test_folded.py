"""What does not depend on the arguments is computed once, and neither returned nor written."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from aotfunc import grad, jit

pytestmark = pytest.mark.usefixtures("cache")


class Called(TorchDispatchMode):
    """The names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def upper(x):
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1])
    return x[..., i, j] * 2


def compiled(f):
    return jit(f, backend="cpp")


def called(f, *args):
    with Called() as mode:
        f(*args)
    return mode.names


def test_indices_are_computed_once():
    x = torch.randn(4, 5, 5)
    for f in (upper, grad(lambda x: upper(x).square().sum())):
        g = compiled(f)
        for _ in range(3):
            assert_close(g(x), f(x))
        assert not {"triu_indices", "aminmax", "unbind", "full"} & {*called(g, x)}


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (torch.linspace(0, 1, 5) @ x, torch.linspace(0, 1, 5)),
        lambda x: (torch.linspace(0, 1, 5) @ x, torch.linspace(0, 1, 5)[1:]),
        lambda x: (lambda t: (t @ x, t, t.view(5, 1), t[:, None]))(torch.linspace(0, 1, 5)),
        lambda x: (lambda t: (x[t[0], t[1]], t[0], t))(torch.tril_indices(5, 5)),
        lambda x: (lambda t: (t.conj_physical(), t @ x))(torch.eye(5).cumsum(0)),
        lambda x: torch.ones(5, 5).cumsum(1).split(2),
    ],
)
def test_results_are_the_callers(f):
    g, x = compiled(f), torch.randn(5, 5)
    for _ in range(3):
        got, want = g(x), f(x)
        assert_close(tuple(got), tuple(want))
        for t in got:
            t.zero_()


def test_random_numbers_are_drawn_at_each_call():
    g = compiled(lambda x: x @ torch.randn(5, 5).cumsum(0))
    x = torch.eye(5)
    assert not g(x).equal(g(x))


def test_indices_out_of_range_are_an_error_of_each_call():
    f = lambda x: x[torch.linspace(0, 9, 10).long()] * 2
    g = compiled(f)
    for _ in range(2):
        with pytest.raises(
            IndexError, match="index 9 is out of bounds for dimension 0 with size 4"
        ):
            g(torch.randn(4, 5))


def test_compiled_in_inference_mode():
    f = lambda x: torch.linspace(0, 1, 5).cumsum(0) @ x
    g, x = compiled(f), torch.randn(5, 5)
    with torch.inference_mode():
        assert_close(g(x), f(x))
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(g(leaf).sum(), leaf)
    assert_close(got, torch.linspace(0, 1, 5).cumsum(0)[:, None].expand(5, 5))


def test_large_values_take_no_memory_between_calls():
    g = compiled(lambda x: torch.linspace(0, 1, 1 << 20).cumsum(0) @ x)
    x = torch.ones(1 << 20)
    g(x)
    assert "cumsum" in called(g, x)

"""Values that a kernel computes once more instead of reading them from memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aotfunc import grad
from tests import test_nested
from tests.backends.test_cpp import agree, floats
from tests.kernels import every_kernel

pytestmark = pytest.mark.usefixtures("cache")
T = torch.randint(19, (9,))
A, B, C = floats(9, 19), floats(9, 19), floats(9, 19)


def after_all(x: Tensor, f) -> Tensor:
    """The second kernel needs a sum over all that the first one computes."""
    return after(x, f(x - x.amax(1, keepdim=True)))


def after(x: Tensor, rows: Tensor) -> Tensor:
    return x * 0.5 - rows * (rows.sum(1) * 2).sum()


#: what is computed, and how many results of kernels are as large as its argument
CASES = {
    "cross entropy": (grad(lambda x: F.cross_entropy(x, T)), 1),
    "quick": (lambda x: after_all(x, lambda x: x * x + 1), 1),
    "slow": (lambda x: after_all(x, torch.exp), 2),
    "through a view": (lambda x: after_all(x, lambda x: (x.view(9, 1, 19) * 2).view(9, 19)), 1),
    "also returned": (lambda x: (lambda y: (y, x - y * (y.sum(1) * 2).sum()))(x * 2), 2),
    "of what is returned": (lambda x: (lambda y: (y, after(x, y * C)))(x * A + B), 2),
    "of other memory": (lambda x: after_all(x, lambda y: y * x.cos().flip(0)), None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_stored(case):
    f, count = CASES[case]
    first = len(every_kernel.made)
    agree(f, floats(9, 19), kernels=None, rtol=1e-4, atol=1e-4)
    shapes = [tuple(shape) for k in every_kernel.made[first:] for shape, *_ in k.plain.args[3]]
    assert count is None or shapes.count((9, 19)) == count


def read_in_another_order(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * x + 1
    return y.amax(0, keepdim=True), torch.where(x.unsqueeze(2) > y[::2], 1.0, y[::2] * 0.3)


@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (1, 3)])
def test_what_the_reader_cannot_compute(shape):
    agree(read_in_another_order, floats(*shape), kernels=None)


@pytest.mark.parametrize("seed", [1, 4])
def test_programs_with_shared_views(monkeypatch, seed):
    monkeypatch.setenv("AOTFUNC_BACKEND", "cpp")
    test_nested.test_a_random_nest(seed)

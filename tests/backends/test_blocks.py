"""Sums over rows in the kernel that sums along them: one kernel for both and one for the blocks,
values as without, the same for any number of threads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aotfunc import grad, jit
from aotfunc.backends.loops.blocks import block_sums
from tests.backends.test_cpp import against_the_interpreter, agree, floats, kernels_of
from tests.kernels import every_kernel, with_threads

pytestmark = pytest.mark.usefixtures("cache")

SHAPES = [(1, 5), (31, 19), (32, 16), (33, 17), (100, 1), (3, 50, 19), (5, 7, 3, 20)]


def both(x, y):
    """Sums along rows and over them, of the same values and of others."""
    leading = list(range(x.dim() - 1))
    e = (x * y).exp()
    return e / e.sum(-1, keepdim=True), e.sum(leading), (x - e).sum(leading), x + 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_both_ways(shape, dtype):
    x, y = floats(*shape, dtype=dtype), floats(shape[-1], dtype=dtype)
    agree(both, x, y, kernels=None)
    for kernel in kernels_of(both, x, y):
        against_the_interpreter(kernel)


def test_one_kernel_reads_the_rows():
    agree(both, floats(100, 19), floats(19), kernels=3)
    assert sum(kernel.blocks for kernel in kernels_of(both, floats(100, 19), floats(19))) == 1


@pytest.mark.parametrize(
    "x",
    [
        floats(19, 70).t(),
        floats(140, 38)[::2, ::2],
        floats(70, 1).expand(70, 19),
        floats(1, 19).expand(70, 19),
    ],
)
def test_other_layouts(x):
    agree(both, x, floats(19), kernels=None)


def test_special_values():
    x = floats(70, 19)
    x[3, 4], x[50, 5], x[60, 6], x[:, 7] = math.nan, math.inf, -math.inf, -0.0
    f = lambda x: (x.amax(1), x.sum(0), (x * 0 + 1).sum(0))
    agree(f, x, kernels=None)


NORMS = {
    "layer_norm": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
    "rms_norm": lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, 0.1) + b,
    "softmax": lambda x, w, b: torch.softmax(x * w + b, -1),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_norms(name, shape):
    """Of float32 against plain autograd in float64."""
    args = floats(*shape), 1 + floats(shape[-1]) / 9, floats(shape[-1])
    weight = floats(*shape)
    loss = lambda *a: (NORMS[name](*a) * weight.to(a[0].dtype)).sum()
    got = jit(grad(loss, argnums=(0, 1, 2)), backend=every_kernel)(*args)
    leaves = [a.double().requires_grad_() for a in args]
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_any_number_of_threads():
    x, y = floats(1000, 190), floats(190)
    f = jit(both, backend="cpp")
    for one, *others in zip(*with_threads(f, x, y), strict=True):
        assert all([torch.equal(one, other) for other in others])


def test_the_op_alone():
    x = floats(5, 13, 3)
    assert_close(block_sums(x, 2), torch.stack([b.sum(0) for b in x.flatten(0, 1).split(32)]))
    assert block_sums(x.to("meta"), 1).shape == block_sums(x, 1).shape == (1, 13, 3)


def test_large_results():
    """Memory in huge pages is as good as any: at its ends, of several results, at odd sizes."""
    for n in (1 << 20, (1 << 21) + 77):
        x = floats(n)
        plus, twice = jit(lambda x: (x + 1, x * 2), backend="cpp")(x)
        assert torch.equal(plus, x + 1) and torch.equal(twice, x * 2)

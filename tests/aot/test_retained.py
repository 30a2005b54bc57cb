"""``retain_grad`` inside a compiled function: arguments and results keep their gradient as in
eager."""

import pytest
import torch

from aotfunc import aot_function, jit
from tests.reference import assert_same


def argument(x, y):
    x.retain_grad()
    return (x * x * y).sum(), x.retains_grad, y.retains_grad


def argument_and_result(x, y):
    x.retain_grad()
    z = x * y
    z.retain_grad()
    return (z * z).sum(), z


def view(x, y):
    v = x[1:]
    v.retain_grad()
    return (v * v).sum(), v


def inside(x, y):
    z = x * y
    z.retain_grad()
    w = z.sin()
    w.retain_grad()
    return ((z * w).sum(),)


def before_a_write(x, y):
    x.retain_grad()
    x.mul_(2)
    return ((x * y).sum(),)


def after_a_write(x, y):
    x.mul_(2)
    x.retain_grad()
    return ((x * y).sum(),)


def before_a_reshape(x, y):
    x.retain_grad()
    x.unsqueeze_(0)
    return ((x * x * y).sum(),)


def leaf(x, y):
    y.retain_grad()
    return (x * y).sum(), y.retains_grad


def constant(x, y):
    y.detach().retain_grad()
    return ((x * y).sum(),)


PROGRAMS = (
    argument,
    argument_and_result,
    view,
    inside,
    before_a_write,
    after_a_write,
    before_a_reshape,
)
PROGRAMS += (leaf, constant)
WAYS = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager"),
    "jit in jit": lambda f: jit(lambda x, y: jit(f)(x, y)),
}


def outcome(f):
    """The gradients that a backward leaves, twice; what was said inside; the error."""
    found = []
    start, y = torch.arange(3.0, requires_grad=True), torch.arange(1.0, 4.0, requires_grad=True)
    for _ in range(2):
        x = start * 2
        try:
            results = f(x, y)
        except RuntimeError as e:
            return type(e), str(e)
        tensors = [t for t in results if isinstance(t, torch.Tensor)]
        sum(t.sum() for t in tensors).backward()
        found.append([r for r in results if not isinstance(r, torch.Tensor)])
        found += [(t.retains_grad, t.grad.clone()) for t in (x, *tensors) if t.retains_grad]
        found += [None if t.grad is None else t.grad.clone() for t in (start, y)]
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
def test_as_in_eager(f, way):
    assert_same(outcome(WAYS[way](f)), outcome(f), rtol=0, atol=0)

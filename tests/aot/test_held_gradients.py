"""A ``.grad`` that a captured function holds, or has given, is what the next ``.backward()`` adds
to, in its memory as in eager mode."""

import itertools

import pytest
import torch

from aotfunc import aot_function, jit, vmap
from tests.reference import assert_same


def leaf(x):
    return x.detach().clone().requires_grad_()


def held(x):
    w = leaf(x)
    y = w.sin()
    y.sum().backward(retain_graph=True)
    first = w.grad
    y.sum().backward()
    return first, w.grad


def view_of_it(x):
    w = leaf(x)
    w.square().sum().backward()
    part = w.grad[1:]
    w.sin().sum().backward()
    return part * 1, w.grad


def each_step(x):
    w, seen = leaf(x), []
    for k in range(3):
        (w**k).sum().backward()
        seen.append(w.grad)
    return seen


def set_to_zero(x):
    w = leaf(x)
    w.exp().sum().backward()
    first = w.grad
    w.grad.zero_()
    w.sin().sum().backward()
    return first


def given(x):
    w, buffer = leaf(x), torch.zeros_like(x)
    w.grad = buffer
    w.exp().sum().backward()
    return buffer, w.grad


def of_chosen_leaves(x):
    v, w = leaf(x), leaf(x)
    (v * w).sum().backward(inputs=[w])
    first = w.grad
    (v * w.exp()).sum().backward(inputs=[v, w])
    return first, v.grad, w.grad


def with_a_graph(x):
    """This one is added up in new memory."""
    w = leaf(x)
    w.square().sum().backward()
    first = w.grad
    (w**3).sum().backward(create_graph=True)
    return first, w.grad.detach()


def of_sums(x):
    """The first gradients are one value, expanded."""
    v, w = leaf(x), leaf(x)
    y = (v + w).sum()
    y.backward(retain_graph=True)
    first = v.grad, w.grad
    y.backward()
    w.sum().backward()
    return *first, v.grad, w.grad


PROGRAMS = [
    held,
    of_sums,
    view_of_it,
    each_step,
    set_to_zero,
    given,
    of_chosen_leaves,
    with_a_graph,
]


@pytest.mark.parametrize("how", [jit, aot_function])
@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("f", PROGRAMS)
def test_held_gradients(f, how):
    x = torch.randn(3, dtype=torch.float64)
    compiled = how(f, "eager")
    for _ in range(2):
        want, got = f(x), compiled(x)
        assert_same(got, want)
        if isinstance(want, tuple | list):
            for j, k in itertools.combinations(range(len(want)), 2):
                assert (got[k] is got[j]) is (want[k] is want[j])


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("f", PROGRAMS)
def test_held_gradients_of_a_batch(f):
    xs = torch.randn(2, 3, dtype=torch.float64)
    rows = [f(x) for x in xs]
    if isinstance(rows[0], torch.Tensor):
        want = torch.stack(rows)
    else:
        want = type(rows[0])(map(torch.stack, zip(*rows, strict=True)))
    assert_same(vmap(f)(xs), want)

"""Hooks in bodies of control flow belong to the innermost transform that takes a gradient."""

import functools

import pytest
import torch

from aotfunc import cond, grad, hessian, jacrev, jit, scan, vmap, while_loop
from tests.reference import assert_same

X = torch.tensor([0.7, -0.4], dtype=torch.float64)


def step(c, x):
    y = c * x
    y.register_hook(lambda g: g * 2)
    return y.sin()


def by_loop(x):
    return functools.reduce(lambda c, _: step(c, x), range(3), x).sum()


def scanned(x, **options):
    return scan(lambda c, _: (step(c, x), None), x, length=3, **options)[0].sum()


def repeated(x):
    body = lambda c: (step(c[0], x), c[1] + 1)
    return while_loop(lambda c: c[1] < 3, body, (x, torch.tensor(0)), max_steps=4)[0].sum()


FORMS = {
    "scan": scanned,
    "unrolled": functools.partial(scanned, unroll=3),
    "every carry": functools.partial(scanned, checkpoint=1),
    "policy": functools.partial(scanned, checkpoint=lambda n: 1),
    "while_loop": repeated,
    "cond": lambda x: cond(x[0] > 0, by_loop, torch.sum, x),
    "nested": lambda x: cond(x[0] > 0, scanned, torch.sum, x),
    "call": lambda x: jit(scanned)(x),
}
SECOND = {
    "reverse": lambda f: jacrev(grad(f)),
    "forward": hessian,
    "compiled": lambda f: jit(jacrev(grad(f))),
}


@pytest.mark.parametrize("name", FORMS)
def test_second_derivatives(name):
    f, expected = FORMS[name], torch.func.jacrev(torch.func.grad(by_loop))(X)
    assert_same(grad(f)(X), torch.func.grad(by_loop)(X))
    for second in SECOND.values():
        assert_same(second(f)(X), expected, rtol=1e-10, atol=1e-12)
    if name in ("scan", "while_loop"):
        batch = torch.stack([X, X + 0.1])
        both = torch.stack([torch.func.jacrev(torch.func.grad(by_loop))(x) for x in batch])
        assert_same(vmap(jacrev(grad(f)))(batch), both, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["scan", "every carry", "policy", "while_loop", "cond", "call"])
def test_autograd_calls_them_again(name):
    """A second derivative by autograd passes through them, as through eager's."""
    found = []
    for f in (FORMS[name], by_loop):
        leaf = X.clone().requires_grad_()
        [first] = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.sum(), leaf))
    assert_same(*found, rtol=1e-10, atol=1e-12)

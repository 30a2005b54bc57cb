"""Weights that samples share, in control flow inside of control flow: kept for the backward they
have rows of their own, in bodies that were recorded for an expanded layout."""

import functools

import pytest
import torch

from aotfunc import cond, grad, jit, scan, vmap, while_loop
from tests.reference import assert_same

torch.manual_seed(0)
W, XS = torch.randn(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
WAYS = {"bound": {"max_steps": 3}, "revolve": {"checkpoint": "revolve", "slots": 2}}


def repeat(body, x, **options):
    step = lambda c: (body(c[0]), c[1] + 1)
    return while_loop(lambda c: c[1] < 3, step, (x, torch.tensor(0)), **options)[0]


def scanned(body, x, **options):
    return scan(lambda c, _: (body(c), None), x, length=3)[0]


def chosen(body, x, **options):
    return cond(x.sum() > -9, body, torch.sin, x)


def by_loop(body, x):
    return functools.reduce(lambda c, _: body(c), range(3), x)


STEPS = {
    "elementwise": lambda w, x: x * w.sin(),
    "views": lambda w, x: x * w.view(3, 1).sin().view(-1) * w.unsqueeze(-1).squeeze(-1),
    "matrix": lambda w, x: torch.outer(w, w).sin() @ x,
}
NESTS = {
    "loop in loop": (repeat, repeat),
    "loop in branch": (chosen, repeat),
    "branch in loop": (repeat, chosen),
    "loop in scan": (scanned, repeat),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nest", NESTS)
def test_gradients_of_samples(nest, way):
    outer, inner = (functools.partial(loop, **WAYS[way]) for loop in NESTS[nest])
    plain = [(lambda f, x: f(x)) if loop is chosen else by_loop for loop in NESTS[nest]]
    for step in STEPS.values() if nest == "loop in branch" else [STEPS["elementwise"]]:
        f, g = (
            lambda w, x, a=a, b=b, step=step: a(lambda y: b(lambda z: step(w, z), y), x).sum()
            for a, b in ((outer, inner), plain)
        )
        expected = torch.func.vmap(torch.func.grad(g, (0, 1)), (None, 0))(W, XS)
        for run in (f, jit(f)):
            assert_same(
                vmap(grad(run, (0, 1)), (None, 0))(W, XS), expected, rtol=1e-10, atol=1e-12
            )
            each = vmap(grad(run, (0, 1)))(W.expand(4, 3), XS)
            assert_same(each, expected, rtol=1e-10, atol=1e-12)

"""Compiled functions of parametrized modules keep computed parameters where
``torch.nn.utils.parametrize.cached()`` does, and as long."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from aotfunc import aot_module, jit
from tests.reference import assert_same


class Counted(nn.Module):
    """Symmetric, and scaled by the number of times that it was computed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, w):
        self.count.add_(1)
        return (w + w.mT) * self.count.clone()


def step(f, m, x):
    with torch.no_grad():
        m.parametrizations.weight.original.mul_(0.5)
    return f(x)


#: programs with a compiled module ``f``, and ``m``, the module itself
PROGRAMS = {
    "a loop of steps": lambda f, m, x: [within(step, f, m, x) for _ in range(3)],
    "chained": lambda f, m, x: within(lambda: f(f(x))),
    "twice": lambda f, m, x: within(lambda: f(x) + f(x[:1])),
    "eager before": lambda f, m, x: [within(lambda: m(x) + f(x)), step(f, m, x), f(x)],
    "eager afterwards": lambda f, m, x: [within(lambda: f(x) + m(x)), m(x)],
    "some within": lambda f, m, x: [f(x), within(f, x), f(x), within(f, x)],
    "nested": lambda f, m, x: within(lambda: within(f, x) + f(x)),
}


def within(f, *args):
    with parametrize.cached():
        return f(*args)


@pytest.mark.parametrize("program", PROGRAMS)
def test_cached_parameters(program):
    m = nn.Linear(2, 2)
    parametrize.register_parametrization(m, "weight", Counted(), unsafe=True)
    twin, x = copy.deepcopy(m), torch.randn(3, 2)
    results = []
    for f, module in ((aot_module(m, "eager"), m), (twin, twin)):
        outs = PROGRAMS[program](f, module, x)
        last = outs if isinstance(outs, torch.Tensor) else outs[-1]
        last.sum().backward()
        results.append([outs, [*module.buffers()], [p.grad for p in module.parameters()]])
    assert_same(*results)


def test_cached_inside():
    m = nn.Linear(2, 2)
    parametrize.register_parametrization(m, "weight", Counted(), unsafe=True)
    twin, x = copy.deepcopy(m), torch.randn(3, 2)
    f, g = (lambda x, m=m: within(lambda: m(m(x))) for m in (m, twin))
    compiled = jit(f, backend="eager")
    for _ in range(3):
        assert_same(step(compiled, m, x), step(g, twin, x))
        assert not parametrize._cache


def test_cached_parameters_of_two_modules():
    modules = [nn.Linear(2, 2) for _ in range(2)]
    for m in modules:
        parametrize.register_parametrization(m, "weight", Counted(), unsafe=True)
    f, x = jit(lambda m, x: m(x), backend="eager"), torch.randn(3, 2)
    for a, b in (modules, modules[::-1]):
        with parametrize.cached():
            outs = [f(a, x), f(b, x)]
            assert_same(outs, [a(x), b(x)])

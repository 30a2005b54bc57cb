"""How large graphs are: no larger than docs/bench_graphs.md says, and so below torch's; and their
values are right."""

import math
import re
from pathlib import Path

import pytest
import torch

import aotfunc
from aotfunc import grad, hessian, jacfwd, jacrev, make_fx
from aotfunc.graph import n_ops
from benchmarks.graph_programs import PROGRAMS
from tests.reference import assert_same

TABLE = (Path(__file__).parents[2] / "docs/bench_graphs.md").read_text()
#: program -> (ours, torch's)
WRITTEN = {
    m[1].strip(): (int(m[2]), int(m[3]))
    for m in re.finditer(r"^\| ([^|]+) \| (\d+) \| (\d+) \|", TABLE, re.M)
}

#: ops of the first to fifth derivative of ``f``; JAX's jaxprs have 20, 58, 155, 406 and 1070 that
# are not dead
SIZES = (18, 39, 92, 201, 423)


def f(x):
    return torch.sin(x) * torch.exp(x) / (1 + x * x)


def derivative(order, grad=grad):
    g = f
    for _ in range(order):
        g = grad(g)
    return g


@pytest.mark.parametrize("order", range(1, 6))
def test_derivatives_are_as_small_as_they_were(order):
    gm = make_fx(derivative(order))(torch.tensor(0.7))
    assert n_ops(gm.graph) <= SIZES[order - 1]


def taylor(x, order):
    """The derivative of ``f`` at ``x`` by power series, in Python floats: no tensor, no
    autograd."""
    n = order + 1
    sin = [math.sin(x + k * math.pi / 2) / math.factorial(k) for k in range(n)]
    exp = [math.exp(x) / math.factorial(k) for k in range(n)]
    top = [sum(sin[i] * exp[k - i] for i in range(k + 1)) for k in range(n)]
    bottom = [1 + x * x, 2 * x, 1.0, *[0.0] * n]
    series: list[float] = []
    for k in range(n):
        series.append(
            (top[k] - sum(bottom[i] * series[k - i] for i in range(1, k + 1))) / bottom[0]
        )
    return series[order] * math.factorial(order)


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize("at", [-1.3, 0.0, 0.7, 2.5])
def test_values(order, at):
    x = torch.tensor(at, dtype=torch.float64)
    expected = torch.tensor(taylor(at, order), dtype=torch.float64)
    graph = make_fx(derivative(order))(x)
    for value in (derivative(order)(x), graph(x)):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    if order < 4:
        torch.testing.assert_close(
            expected, derivative(order, torch.func.grad)(x), rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_as_small_as_they_were(name):
    ours, theirs = WRITTEN[name]
    assert ours <= theirs
    program, make = PROGRAMS[name]
    gm = make_fx(program(aotfunc))(*make())
    assert_same(gm(*make()), program(torch.func)(*make()), rtol=1e-3, atol=1e-3)
    if f"torch {torch.__version__}".startswith(re.search(r"torch \d+\.\d+", TABLE)[0]):
        assert n_ops(gm.graph) <= ours


def test_forward_mode_is_no_larger_than_reverse_on_a_diagonal_function():
    x = torch.linspace(0, 1, 4)
    assert n_ops(make_fx(jacfwd(f))(x).graph) <= n_ops(make_fx(jacrev(f))(x).graph) + 1


def test_growth_with_depth_is_linear():
    def chain(n):
        def g(x):
            for _ in range(n):
                x = torch.sin(x) * 1.5
            return x.sum()

        return n_ops(make_fx(grad(g))(torch.ones(3)).graph)

    assert chain(40) - chain(20) == 2 * (chain(20) - chain(10))


def test_a_repeated_call_of_hessian_has_the_same_graph():
    g = lambda x: (x.sin() * x).sum()
    x = torch.ones(3)
    assert make_fx(hessian(g))(x).code == make_fx(hessian(g))(x).code


def nested(values, made=(), product=lambda xs: torch.stack(xs).prod()):
    """The derivative of a product by one factor after another."""
    if len(made) == len(values):
        return product(list(made))
    return grad(lambda x: nested(values, (*made, x), product))(values[len(made)])


@pytest.mark.limit(120)
def test_nested_gradients_of_a_product():
    values = [torch.tensor(1 + k / 8, dtype=torch.float64) for k in range(7)]
    g = make_fx(lambda x: nested([x, *values[1:]]))(values[0])
    assert n_ops(g.graph) <= 800
    assert_same(g(values[0]), torch.tensor(1.0, dtype=torch.float64))
    values[3] = torch.tensor(
        0.0, dtype=torch.float64
    )  # products of all but one of three factors, and squared
    squared = lambda xs: torch.stack(xs).prod() ** 2
    want = 2**6 * math.prod(v.item() for v in values[:6])
    assert_same(nested(values[:6], product=squared), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 17])
def test_the_gradient_of_a_product_at_zeros(n, dtype):
    for zeros in range(min(n, 3) + 1):
        x = torch.linspace(0.5, 2, n, dtype=torch.float64).to(dtype)
        x[:zeros] = 0
        value = lambda x: torch.real(x.prod() * (1 + 2j if dtype.is_complex else 1))
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
        assert_same(grad(value)(x), want)
        if not dtype.is_complex:
            (second,) = (
                torch.autograd.grad(want.square().sum(), leaf)
                if want.requires_grad
                else (torch.zeros(n),)
            )
            assert_same(grad(lambda x: grad(torch.prod)(x).square().sum())(x), second)

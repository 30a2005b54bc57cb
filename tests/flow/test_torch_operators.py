"""torch's operators on functions, met inside a captured function, are captured as ours; outside
they stay torch's."""

import pytest
import torch
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_op
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import aotfunc
from aotfunc import grad, hessian, jit, jvp, make_fx, vmap
from tests.reference import assert_same

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scanned(x):
    return scan(lambda c, y: (c + y, c * y.sin()), x[:, 0] * 0, x, dim=1, reverse=True)[1]


def scanned_in_python(x):
    c, found = x[:, 0] * 0, []
    for y in x.flip(1).unbind(1):
        c, y = c + y, c * y.sin()
        found.append(y)
    return torch.stack(found[::-1], 1)


def doubled(x):
    return while_loop(lambda x, n: n < 3, lambda x, n: (x.sin() + x, n + 1), (x, torch.tensor(0)))[
        0
    ]


def doubled_in_python(x):
    for _ in range(3):
        x = x.sin() + x
    return x


OPERATORS = {
    "cond": (
        lambda x: torch.cond(x.sum() > 0, lambda x: x.sin() * 2, lambda x: x * x, (x,)),
        lambda x: x.sin() * 2 if x.sum() > 0 else x * x,
    ),
    "cond of a bool": (
        lambda x: torch.cond(x.shape[0] > 2, torch.sin, torch.cos, (x,)),
        torch.sin,
    ),
    "scan": (scanned, scanned_in_python),
    "map": (lambda x: map_op(lambda y, a: y.sin() * a, x, x[0]), lambda x: x.sin() * x[0]),
    "associative_scan": (
        lambda x: associative_scan(lambda a, b: a * b, x, 1, combine_mode="generic"),
        lambda x: x.cumprod(1),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_captured(name):
    f, plain = OPERATORS[name]
    tight = {"rtol": 1e-10, "atol": 1e-12}
    total = lambda f: lambda x: (f(x) * x.cos()).sum()
    expected = torch.func.grad(total(plain))(X)
    assert_same(make_fx(f)(X)(X), plain(X), **tight)
    assert_same(jit(f)(X), plain(X), **tight)
    assert_same(grad(total(f))(X), expected, **tight)
    assert_same(jit(grad(total(f)))(X), expected, **tight)
    assert_same(hessian(total(f))(X), torch.func.hessian(total(plain))(X), **tight)
    assert_same(jvp(f, (X,), (X,)), torch.func.jvp(plain, (X,), (X,)), **tight)
    batch = torch.stack([X, -X])
    assert_same(vmap(f)(batch), torch.stack([plain(x) for x in batch]), **tight)
    assert_same(aotfunc.aot_function(f, "eager")(X), plain(X), **tight)


def test_a_loop():
    tight = {"rtol": 1e-10, "atol": 1e-12}
    assert_same(jit(doubled)(X), doubled_in_python(X), **tight)
    assert_same(
        grad(lambda x: doubled(x).sum())(X),
        torch.func.grad(lambda x: doubled_in_python(x).sum())(X),
        **tight,
    )


@pytest.mark.limit(300)
def test_outside_they_stay_torchs():
    grad(torch.sin)(X[0, 0])  # the first capture exchanges their code
    f = OPERATORS["cond"][0]
    assert_same(torch.compile(f, backend="eager", fullgraph=True)(X), OPERATORS["cond"][1](X))

"""Taylor mode of loops and branches, against that of Python loops and against nested forward
mode."""

import pytest
import torch

from aotfunc import backends, diag_hessian, grad, jet, jit, laplacian, make_fx, scan, vmap
from aotfunc.errors import RuleError
from tests.flow.test_compositions import PROGRAMS, revolved
from tests.reference import assert_same
from tests.sweeps import every

X = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
V = torch.tensor([0.5, 0.2, -0.7], dtype=torch.float64)
TIGHT = {"rtol": 1e-9, "atol": 1e-10}
BACKENDS = ["eager", *["cpp"] * backends.auto.possible()]


@pytest.mark.parametrize("program", PROGRAMS)
def test_jet(program):
    ours, plain = PROGRAMS[program]
    for series in ([V], [None, X, V], [V, X.cos(), None, V]):
        along = lambda f, series=series: lambda x: jet(f, (x,), (series,))
        assert_same(along(ours)(X), along(plain)(X), **TIGHT)
    for backend in every(2, BACKENDS[::-1]):
        assert_same(jit(along(ours), backend=backend)(X), along(plain)(X), **TIGHT)
    nested, expected = lambda t: plain(X + t * V), []
    for _ in range(3):
        nested = derivative(nested)
        expected.append(nested(torch.zeros((), dtype=torch.float64)))
    assert_same(jet(ours, (X,), ([V, None, None],))[1], expected, **TIGHT)
    second = lambda f: lambda x: jet(f, (x,), ([V, None],))[1][1]
    batch = torch.stack([X, X * 0.9])
    assert_same(vmap(second(ours))(batch), torch.stack(list(map(second(plain), batch))), **TIGHT)
    total = lambda f: lambda x: second(f)(x).sin().sum()
    assert_same(grad(total(ours))(X), grad(total(plain))(X), **TIGHT)


def derivative(f):
    return lambda t: torch.func.jvp(f, (t,), (torch.ones_like(t),))[1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_diagonals(program):
    ours, plain = PROGRAMS[program]
    diagonals = torch.func.hessian(plain)(X).diagonal(dim1=1, dim2=2)
    assert_same(laplacian(ours)(X), diagonals.sum(1), **TIGHT)
    assert_same(jit(laplacian(ours))(X), diagonals.sum(1), **TIGHT)
    assert_same(diag_hessian(ours)(X), diagonals.t().contiguous(), **TIGHT)


def test_a_loop_stays_a_loop():
    """Graphs grow with the order, not with the number of steps."""

    def nodes(length, order):
        f = lambda x: scan(lambda h, _: (torch.sin(h * x), None), x, length=length)[0]
        series = [V, *[None] * (order - 1)]
        gm = make_fx(lambda x: jet(f, (x,), (series,))[1])(X)
        return len(gm.graph.nodes) + len(gm.scan_body.graph.nodes)

    assert nodes(3, 4) == nodes(300, 4) < nodes(3, 8)


def test_what_goes_back_has_no_series():
    with pytest.raises(RuleError, match=r"jet: unwind has no series.*nest jvp"):
        laplacian(lambda x: grad(lambda x: revolved(x).sum())(x))(X)

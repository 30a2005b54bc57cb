"""Control flow under all ordered pairs of transforms, against Python loops and branches under
double backward."""

import itertools

import pytest
import torch

import aotfunc
from aotfunc import cond, scan, switch, while_loop
from aotfunc.errors import RuleError
from tests.func.test_compositions import MATRIX, TRANSFORMS, check
from tests.reference import assert_same
from tests.sweeps import every


def step(x):
    """A step that closes over ``x``, counts, and writes to what it makes."""

    def run(carry, row):
        h, count = carry
        new = torch.tanh(MATRIX @ h + row * x)
        y = new * row
        y[0] += count * x[1]
        return (new, count + 1), {"y": y}

    return run


def looped(x):
    rows = torch.stack([x.sin(), x * 2])
    (h, _), ys = scan(step(x), (x, torch.tensor(0)), rows, reverse=True)
    return h + (ys["y"] * rows).sum(0)


def unrolled(x):
    rows = torch.stack([x.sin(), x * 2])
    carry, ys = (x, torch.tensor(0)), [None] * 2
    for t in (1, 0):
        carry, y = step(x)(carry, rows[t])
        ys[t] = y["y"]
    return carry[0] + (torch.stack(ys) * rows).sum(0)


def grown(x):
    return lambda c: (c[0] * 1.4 + 0.1 * torch.tanh(MATRIX @ x), c[1] + 1)


def branched(x):
    a = cond(x[0] > 0, lambda x: MATRIX @ x.sin() * x, lambda x: x.tanh() * x.sum(), x)
    b = switch((x[1] > -1).long() + (x[2] > 1), [torch.sin, torch.tanh, lambda y: a * y], x)
    y, _ = while_loop(lambda c: (c[0] ** 2).sum() < 6, grown(x), (x, torch.tensor(0)), 9)
    return b + y * x


def branched_in_python(x):
    a = MATRIX @ x.sin() * x if x[0] > 0 else x.tanh() * x.sum()
    b = [torch.sin, torch.tanh, lambda y: a * y][int(x[1] > -1) + int(x[2] > 1)](x)
    c = x, torch.tensor(0)
    while (c[0] ** 2).sum() < 6:
        c = grown(x)(c)
    return b + c[0] * x


def row_of(x):
    return lambda h, row: ((MATRIX @ h * row).sin(), h * x)


def revolved(x):
    """A loop of unknown length whose backward keeps two of its carries, and one that keeps one."""
    test = lambda c: (c[0] ** 2).sum() < 60
    y, _ = while_loop(test, grown(x), (x, torch.tensor(0)), checkpoint="revolve", slots=2)
    rows = torch.stack([x, x.cos(), x * 2])
    return y * x + scan(row_of(x), x, rows, checkpoint="revolve", slots=1)[1].sum(0)


def revolved_in_python(x):
    c = x, torch.tensor(0)
    while (c[0] ** 2).sum() < 60:
        c = grown(x)(c)
    h, total = x, 0
    for row in (x, x.cos(), x * 2):
        h, y = row_of(x)(h, row)
        total = total + y
    return c[0] * x + total


PROGRAMS = {
    "scan": (looped, unrolled),
    "branches": (branched, branched_in_python),
    "revolve": (revolved, revolved_in_python),
}
PAIRS = [*itertools.product(TRANSFORMS, TRANSFORMS)]
CASES = [(program, pair) for program in ("scan", "branches") for pair in PAIRS]
CASES += [("revolve", pair) for pair in every(30, PAIRS)]


@pytest.mark.parametrize(
    ("program", "pair"), CASES, ids=lambda p: p if isinstance(p, str) else "-".join(p)
)
def test_pair(program, pair):
    check(pair, ours=PROGRAMS[program][0], reference=PROGRAMS[program][1])


@pytest.mark.parametrize("triple", ["grad grad grad", "vmap jacrev jacfwd", "jit vmap grad"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_triple(program, triple):
    check(triple.split(), ours=PROGRAMS[program][0], reference=PROGRAMS[program][1])


#: transforms of torch.func, or of ours in their places: nested, some with a level that
#: differentiates beneath one that batches
NESTED = {
    "grad": lambda t, f: t.grad(f),
    "hessian": lambda t, f: t.hessian(f),
    "forward twice": lambda t, f: t.jacfwd(t.jacfwd(f)),
    "reverse over forward": lambda t, f: t.jacrev(t.jacfwd(f)),
    "vmap of grad": lambda t, f: lambda x: t.vmap(t.grad(f))(torch.stack([x, -x])),
    "grad of vmap": lambda t, f: t.grad(lambda x: t.vmap(f)(torch.stack([x, -x])).sum()),
    "grad of vmap of vmap": lambda t, f: t.grad(
        lambda x: t.vmap(t.vmap(f))(torch.stack([x, -x, x.sin(), x * 2]).view(2, 2, 3)).sum()
    ),
    "grad of vmap of grad": lambda t, f: t.grad(
        lambda x: t.vmap(t.grad(f))(torch.stack([x, -x])).sin().sum()
    ),
    "vmap of hessian": lambda t, f: lambda x: t.vmap(t.hessian(f))(torch.stack([x, -x])),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("nest", every(4, NESTED))
def test_torch_func_around(nest, program):
    """The numbers of our transforms, which other tests compare with Python."""
    f = lambda x: PROGRAMS[program][0](x).sin().sum()
    x = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64)
    assert_same(NESTED[nest](torch.func, f)(x), NESTED[nest](aotfunc, f)(x), rtol=1e-9, atol=1e-11)


def test_draws_under_torchs_vmap():
    """Samples share what a loop draws, where torch.func.vmap says so; else it is refused."""
    f = lambda x: scan(lambda h, row: (h * row + torch.rand(()), None), x.sum(), x)[0]
    xs = torch.ones(2, 3)
    first, second = torch.func.vmap(f, randomness="same")(xs)
    assert first == second
    for given in ({}, {"randomness": "different"}):
        for g in (f, torch.func.grad(f)):
            with pytest.raises(RuleError, match=r"draws random numbers, in torch\.func\.vmap"):
                torch.func.vmap(g, **given)(xs)

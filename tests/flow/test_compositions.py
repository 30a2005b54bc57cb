"""Control flow under all ordered pairs of transforms, against Python loops and branches under
double backward."""

import itertools

import pytest
import torch

from aotfunc import cond, scan, switch, while_loop
from tests.func.test_compositions import MATRIX, TRANSFORMS, check
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


def revolved(x):
    """A loop of unknown length whose backward keeps two of its carries."""
    test = lambda c: (c[0] ** 2).sum() < 60
    y, _ = while_loop(test, grown(x), (x, torch.tensor(0)), checkpoint="revolve", slots=2)
    return y * x


def revolved_in_python(x):
    c = x, torch.tensor(0)
    while (c[0] ** 2).sum() < 60:
        c = grown(x)(c)
    return c[0] * x


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

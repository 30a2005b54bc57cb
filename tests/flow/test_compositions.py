"""Control flow under all ordered pairs of transforms, against Python loops and branches under
double backward."""

import itertools

import pytest
import torch

from aotfunc import scan
from tests.func.test_compositions import MATRIX, TRANSFORMS, check


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
    rows = torch.stack([x.sin(), x * 2, x + 1])
    (h, _), ys = scan(step(x), (x, torch.tensor(0)), rows, reverse=True)
    return h + (ys["y"] * rows).sum(0)


def unrolled(x):
    rows = torch.stack([x.sin(), x * 2, x + 1])
    carry, ys = (x, torch.tensor(0)), [None] * 3
    for t in (2, 1, 0):
        carry, y = step(x)(carry, rows[t])
        ys[t] = y["y"]
    return carry[0] + (torch.stack(ys) * rows).sum(0)


PROGRAMS = {"scan": (looped, unrolled)}


@pytest.mark.parametrize(
    "pair", [*itertools.product(TRANSFORMS, TRANSFORMS)], ids=lambda p: "-".join(p)
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_pair(program, pair):
    check(pair, ours=PROGRAMS[program][0], reference=PROGRAMS[program][1])


@pytest.mark.parametrize("triple", ["grad grad grad", "vmap jacrev jacfwd", "jit vmap grad"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_triple(program, triple):
    check(triple.split(), ours=PROGRAMS[program][0], reference=PROGRAMS[program][1])

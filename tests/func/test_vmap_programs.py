"""Random programs of reads and writes (masks, indices, views, in place) under vmap, against a
Python loop."""

import random

import pytest
import torch

from aotfunc import grad, vmap
from tests.reference import assert_same, grads, loop
from tests.sweeps import seeds

B = 3


def taken(values, matrices, u, v, one, other, m, i, k, j, row):
    """What a step may do. ``values`` hold vectors of 4 or more; the first 4 elements are used; all
    lists may grow."""
    return [
        lambda: values.append(u.clone() * v.sin()),
        lambda: values.append(torch.where(m, u, v)),
        lambda: values.append(u.masked_scatter(m, v * 2)),
        lambda: values.append(u.index_put((i,), v[:2], accumulate=True)),
        lambda: values.append(u.scatter_add(0, i, v[:2])),
        lambda: values.append(u.index_select(0, i).repeat(2)),
        lambda: values.append(u[k].clone() * v),
        lambda: values.append(one[row]),  # a view
        lambda: values.append(one.take_along_dim(i[None], 1).sum(0).repeat(2)),
        lambda: matrices.append(torch.cat([one, other])[i]),
        lambda: matrices.append(torch.stack([u, v])),
        lambda: u.__setitem__(m, v.sum()),
        lambda: u.__setitem__(m, 1.5),
        lambda: u.__setitem__(i, v[i] * 2),
        lambda: u.__setitem__(i, u[i] + v[:2]),
        lambda: u.__setitem__(j, v[k]),
        lambda: u.__setitem__(k, v[j]),
        lambda: u.masked_fill_(m, 0.5),
        lambda: u.view(2, 2)[row].copy_(v[1:3]),
        lambda: u.copy_(v.flip(0)),
        lambda: u.index_add_(0, i, v[2:]),
        lambda: values.append(torch.zeros(4, dtype=u.dtype).index_copy_(0, i, u[:2])),
        lambda: one.__setitem__((slice(None), m), v.mean()),
        lambda: one.__setitem__((row, i), v[:2].cos()),
        lambda: one.__setitem__((row, k), v[j]),
        lambda: one.__setitem__(row, v),
        lambda: one[:, j].mul_(2),
        lambda: one.t()[j].add_(v[:2]),
    ]


def program(seed):
    """A function of (x [4], y [2, 4], a mask [4], two positions, a position, w [4]) of three to
    eight steps."""
    rng = random.Random(seed)
    steps = [[rng.randrange(2520) for _ in range(4)] for _ in range(rng.randint(3, 8))]

    def f(x, y, m, i, k, w):
        values, matrices = [x * 1.0, w * 1.0, x + w], [y * 1.0, torch.stack([x, w])]
        for step, a, b, c in steps:
            u, v = values[a % len(values)], values[b % len(values)].clone()
            one, other = matrices[a % len(matrices)], matrices[b % len(matrices)]
            choices = taken(values, matrices, u, v, one, other, m, i, k, c % 4, c % 2)
            choices[step % len(choices)]()
        return torch.cat([*values, *(t.flatten() for t in matrices)])

    return f, rng


@pytest.mark.parametrize("seed", seeds(40))
def test_a_program_equals_its_loop(seed):
    f, rng = program(seed)
    torch.manual_seed(seed)
    x, y, w = (torch.randn(*shape, dtype=torch.float64) for shape in ((B, 4), (B, 2, 4), (4,)))
    positions = torch.stack([torch.randperm(4)[:2] for _ in range(B)])
    full = [x, y, torch.rand(B, 4) > 0.5, positions, torch.randint(4, (B,)), w]
    dims = (0, *(rng.choice([0, 0, None]) for _ in range(4)), None)
    args = [t if d == 0 or n == 5 else t[0] for n, (t, d) in enumerate(zip(full, dims))]
    expected = loop(f, dims)(*args)
    assert_same(vmap(f, dims)(*args), expected)
    twice = [torch.stack([t, t]) if d == 0 else t for t, d in zip(args, dims)]
    assert_same(vmap(vmap(f, dims), dims)(*twice), torch.stack([expected, expected]))

    def scalar(*a):
        out = f(*a)
        return (out * torch.arange(1.0, out.numel() + 1, dtype=out.dtype).cos()).sum()

    wrt = (0, 1, 5)
    try:
        inside = loop(grads(scalar, wrt), dims)(*args)
        outside = grads(lambda *a: loop(scalar, dims)(*a).sin().sum(), wrt)(*args)
    except RuntimeError:
        return  # autograd itself does not get over what the program overwrites
    assert_same(vmap(grad(scalar, wrt), dims)(*args), inside)
    assert_same(grad(lambda *a: vmap(scalar, dims)(*a).sin().sum(), wrt)(*args), outside)

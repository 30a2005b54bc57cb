"""``vmap`` called with batches of one size after another: the code of one size runs for the
others, where it may."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

from aotfunc import clear_caches, grad, hessian, jacfwd, jacrev, jvp, make_fx, vjp, vmap
from aotfunc.api import vmap as batching
from tests.inputs import f64
from tests.reference import assert_same, loop
from tests.sweeps import seeds

SIZES = (5, 3, 7, 2, 9, 4, 6, 8, 1, 0, 12)


@pytest.fixture
def made(monkeypatch):
    """The sizes for which the batching pass runs meanwhile."""
    clear_caches()
    found = []
    run = batching.vmap_pass
    monkeypatch.setattr(
        batching, "vmap_pass", lambda base, *how: found.append(how[2].size) or run(base, *how)
    )
    return found


links = torch.linspace(-1, 1, 72, dtype=torch.float64).view(8, 3, 3).sin()
weight, bias = links.view(9, 8)[:6], links.view(-1)[:6]
kernel = links.view(-1)[: 2 * 9].view(2, 1, 3, 3)


def chain(angles):
    pose = torch.eye(3, dtype=angles.dtype)
    for link, a in zip(links, angles):
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        turn = torch.stack(
            [a.cos(), -a.sin(), zero, a.sin(), a.cos(), zero, zero, zero, one]
        ).view(3, 3)
        pose = pose @ (link @ turn)
    return pose[:, 2]


def mlp(x):
    return F.layer_norm(torch.tanh(weight @ x + bias), (6,)).softmax(0) @ bias


def picked(x):
    table = x.view(4, 2)
    return (table[torch.tensor([1, 3, 1])].sum(0) * x[2:4].flip(0)).cumsum(0) / x.abs().amax()


def image(x):
    return F.max_pool2d(F.conv2d(x.view(1, 1, 8, 1) * x, kernel, padding=1).relu(), 2).mean(
        (0, 2, 3)
    )


def solved(x):
    a = x.view(2, 2, 2)[0] @ x.view(2, 2, 2)[1].T + 3 * torch.eye(2, dtype=x.dtype)
    return (
        torch.linalg.solve(a @ a.T, x[:2])
        + torch.linalg.cholesky(a @ a.T + 1).sum(1)
        + torch.linalg.det(a)
    )


def ordered(x):
    values, places = x.sort(descending=True)
    return torch.cat([values[:3], values.gather(0, places)[2:5]]) * torch.where(x > 0, x, -x)[
        :6
    ].roll(1, 0)


#: functions of one vector of 8 numbers
FUNCTIONS = {
    "chain": chain,
    "mlp": mlp,
    "picked": picked,
    "image": image,
    "solved": solved,
    "ordered": ordered,
    "inner batch": lambda x: vmap(lambda r, s: (r * s).sum() + s, in_dims=(0, None))(
        x.view(4, 2), x[0]
    ),
    "wide": lambda x: x.expand(5, 8) + torch.ones(5, 1, dtype=x.dtype) * x.sum(),
    "unbatched result": lambda x: (
        x * 2,
        links[0] @ links[1],
        torch.zeros(5, dtype=x.dtype) + x[0],
    ),
}

scalar = lambda f: (
    lambda x: sum(
        (y * y.detach().cos()).sum() for y in (f(x) if isinstance(f(x), tuple) else [f(x)])
    )
)

TRANSFORMS = {
    "f": lambda f: f,
    "grad": lambda f: grad(scalar(f)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(scalar(f)),
    "vjp": lambda f: lambda x: vjp(scalar(f), x)[1](x[0])[0],
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_those_of_a_loop(name, transform):
    f = TRANSFORMS[transform](FUNCTIONS[name])
    batched = vmap(f)
    for n in SIZES:
        x = f64(n, 8)
        if n:
            assert_same(batched(x), loop(f)(x))
        else:
            assert all(y.shape[0] == 0 for y in tree_leaves(batched(x)))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["chain", "mlp", "picked", "ordered", "inner batch"])
def test_one_pass_for_all_sizes(name, transform, made):
    batched = vmap(TRANSFORMS[transform](FUNCTIONS[name]))
    for n in (11, 13, 17, 23, 64, 11):
        batched(f64(n, 8))
    assert made.count(11) == 1 and not {17, 23, 64} & set(made)


LAYOUTS = {
    "in_dims": (lambda x: (x.t() * 2).sum(0), 1, 0, lambda n: f64(8, n, 3)),
    "in_dims, last": (chain, -1, 0, lambda n: f64(8, n)),
    "out_dims": (jacrev(chain), 0, 2, lambda n: f64(n, 8)),
    "out_dims, negative": (chain, 0, -1, lambda n: f64(n, 8)),
    "both": (mlp, 1, 0, lambda n: f64(8, n)),
    "turned": (chain, 0, 0, lambda n: f64(8, n).t()),
    "turned, in_dims": (chain, 1, 1, lambda n: f64(n, 8).t()),
    "sliced": (chain, 0, 0, lambda n: f64(n + 4, 8)[2:-2]),
    "columns": (chain, 0, 0, lambda n: f64(n, 16)[:, ::2]),
    "every other": (chain, 0, 0, lambda n: f64(2 * n, 8)[::2]),
    "spread": (chain, 0, 0, lambda n: f64(8).expand(n, 8)),
    "view": (lambda x: x.view(3, 2), 0, 0, lambda n: f64(n, 2, 3)),
    "reshaped": (lambda x: x.reshape(6).view(3, 2).t().reshape(-1), 2, 0, lambda n: f64(3, 2, n)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    f, in_dim, out_dim, make = LAYOUTS[name]
    for n in (5, 2, 3, 6, 8, 9, 1, 16):
        x = make(n)
        want = torch.stack([f(s.clone()) for s in x.unbind(in_dim)], out_dim)
        assert_same(vmap(f, in_dim, out_dim)(x), want)


def test_arguments_of_several_kinds(made):
    f = lambda p, x, k, s: {"y": (p["w"] @ x + p["b"])[k] * s, "z": (x[k], p["b"].sum() + x)}
    p = {"w": f64(4, 3), "b": f64(4)}
    for n in SIZES:
        x, k = f64(n, 3), torch.randint(3, (n,))
        got = vmap(f, in_dims=({"w": None, "b": None}, 0, 0, None))(p, x, k, 0.5)
        want = [f(p, *pair, 0.5) for pair in zip(x, k)]
        for key in ("y", "z") if n else ():
            assert_same(
                got[key], tree_map(lambda *rows: torch.stack(rows), *(w[key] for w in want))
            )
    each = {key: torch.stack([v * k for k in range(1, 7)]) for key, v in p.items()}
    for n in (6, 4, 3, 5):
        part = {key: v[:n] for key, v in each.items()}
        got = vmap(f, in_dims=(0, None, None, None))(part, f64(3), torch.tensor(2), 0.5)
        assert got["y"].shape == (n,)


def test_a_size_that_is_another_dimension_too():
    for first in range(2, 10):
        f = lambda x, first=first: (
            torch.full((first, 3), 0.5) @ x + torch.arange(first).unsqueeze(1) * x.sum()
        )
        for n in (first, 3, first + 1, 4, first, 11):
            x = torch.randn(n, 3, 2)
            assert_same(vmap(f)(x), torch.stack([f(s) for s in x]))


def test_draws_writes_and_loops_have_a_program_for_each_size(made):
    drawn = vmap(lambda x: x * torch.rand(3, dtype=x.dtype), randomness="different")
    written = vmap(lambda x: x.mul_(2))
    for n in (5, 6, 7):
        x = torch.ones(n, 3, dtype=torch.float64)
        assert drawn(x).unique().numel() == 3 * n
        assert_same(written(x), torch.full_like(x, 2.0))
        assert_same(x, torch.full_like(x, 2.0))
    assert made == [5, 5, 6, 6, 7, 7]


def test_values_that_are_asked_for():
    f = lambda x: x * 2 if x.sum() > 0 else x - 1
    for n in (5, 6, 7):
        for sign in (1, -1):
            x = f64(n, 3).abs() * sign
            assert_same(vmap(f)(x), x * 2 if sign > 0 else x - 1)


def test_errors_are_those_of_the_first_size():
    f = lambda x: torch.linalg.cholesky(x)
    for n in (5, 6, 7):
        vmap(f)(torch.eye(3).expand(n, 3, 3).clone())
        with pytest.raises(RuntimeError, match="positive-definite"):
            vmap(f)(-torch.eye(3).expand(n, 3, 3).clone())


@pytest.mark.parametrize("outer", ["backward", "grad", "make_fx", "vmap"])
def test_what_shares_code_is_a_program_all_the_same(outer):
    """Its graph is made when it is differentiated, captured or batched again."""
    f = vmap(jacrev(mlp))
    for n in (11, 13, 17):
        f(f64(n, 8))
    x = f64(17, 8)
    want = torch.stack(
        [torch.autograd.functional.jacobian(lambda s: jacrev(mlp)(s).square().sum(), s) for s in x]
    )
    if outer == "backward":
        leaf = x.clone().requires_grad_()
        f(leaf).square().sum().backward()
        got = leaf.grad
    elif outer == "grad":
        got = grad(lambda x: f(x).square().sum())(x)
    elif outer == "make_fx":
        got, want = make_fx(f)(x)(x), f(x)
    else:
        got, want = vmap(f)(x[None])[0], f(x)
    assert_same(got, want)


def test_chunks(made):
    batched = vmap(jacrev(chain), chunk_size=16)
    for n in (40, 57, 35):
        x = f64(n, 8)
        assert_same(batched(x), loop(jacrev(chain))(x))
    assert set(made) == {16}


# random programs
# -------------------------------------------------------------------------------------------------

#: steps from a list of values (vectors of 6, matrices of 3 x 2 and 2 x 2) to another one
STEPS = [
    lambda p, v: v("6").sin() * v("6"),
    lambda p, v: (v("6") + v("6") / 2).tanh(),
    lambda p, v: v("6").view(3, 2),
    lambda p, v: v("3x2").reshape(6),
    lambda p, v: v("3x2").t().reshape(6),
    lambda p, v: v("3x2").t() @ v("3x2"),
    lambda p, v: v("3x2") @ v("2x2"),
    lambda p, v: v("2x2") @ p[:4].view(2, 2),
    lambda p, v: v("2x2").exp().cumsum(1).t() / 9,
    lambda p, v: torch.cat([v("2x2"), v("2x2")[:1]]),
    lambda p, v: torch.stack([v("6")[:2], v("6")[2:4], v("6")[::3]]),
    lambda p, v: v("6").softmax(0),
    lambda p, v: v("3x2").log_softmax(1),
    lambda p, v: v("6").unflatten(0, (2, 3)).sum(1, keepdim=True).expand(2, 2),
    lambda p, v: v("3x2")[[2, 0, 1]],
    lambda p, v: v("6").flip(0).roll(2),
    lambda p, v: torch.where(v("6") > 0, v("6"), p),
    lambda p, v: v("6").sort()[0],
    lambda p, v: v("3x2").mean(0).outer(v("6")[1:3]),
    lambda p, v: v("2x2").diagonal().expand(3, 2),
    lambda p, v: torch.zeros(3, 2, dtype=p.dtype) + v("6")[4],
    lambda p, v: F.pad(v("6")[1:4], (2, 1)),
    lambda p, v: v("3x2").amax(1).repeat(2),
    lambda p, v: v("3x2").clone().index_fill(0, torch.tensor([1]), 0.5),
    lambda p, v: torch.einsum("ij,kj->ki", v("2x2"), v("3x2")),
    lambda p, v: v("6").clone().index_add(0, torch.tensor([0, 3]), v("6")[:2]),
]


def random_function(rng):
    steps = [rng.choice(STEPS) for _ in range(8)]
    picks = [rng.random() for _ in range(40)]

    def f(p, x):
        values = {"6": [x, p], "3x2": [x.view(3, 2)], "2x2": [p[2:].view(2, 2), x[:4].view(2, 2)]}
        chosen = iter(picks)
        take = lambda kind: values[kind][int(next(chosen) * len(values[kind]))]
        for step in steps:
            y = step(p, take)
            values["x".join(map(str, y.shape))].append(y)
        return torch.cat([v[-1].reshape(-1) for v in values.values()])

    return f


@pytest.mark.parametrize("seed", seeds(16))
def test_random_programs(seed, made):
    rng = random.Random(seed)
    of = random_function(rng)
    total = lambda p, x: of(p, x).sin().sum()
    f = rng.choice(
        [
            of,
            grad(total),
            grad(total, argnums=1),
            jacrev(of, argnums=1),
            jacfwd(of),
            hessian(total, argnums=1),
        ]
        + [lambda p, x: vmap(total, in_dims=(None, 0))(p, torch.stack([x, x.sin(), x - p]))]
    )
    in_dims = rng.choice([(None, 0), (0, 0), (0, 1), (1, 0), (0, None)])
    out_dims = rng.choice([0, -1])
    for n in rng.sample(range(2, 10), 8) + [1]:
        p, x = (f64(6) if d is None else f64(n, 6) if d == 0 else f64(6, n) for d in in_dims)
        rows = [
            [a if d is None else a.select(d, k) for a, d in zip((p, x), in_dims)] for k in range(n)
        ]
        want = torch.stack([f(*row) for row in rows], out_dims)
        assert_same(vmap(f, in_dims, out_dims)(p, x), want)

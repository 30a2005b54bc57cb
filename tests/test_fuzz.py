"""Random programs with views, writes and regions without gradients: every transform against
autograd and loops.

A program is drawn from a seed and is a list of steps on a growing pool of values. AOTFUNC_FUZZ=N
runs N seeds."""

from __future__ import annotations

import random

import pytest
import torch

import aotfunc
from tests.sweeps import seeds

CLOSE = {"rtol": 1e-8, "atol": 1e-9}

UNARY = [
    torch.sin,
    torch.tanh,
    torch.sigmoid,
    torch.square,
    torch.relu,
    torch.neg,
    lambda x: x * 0.5,
    lambda x: 1 / (2 + x * x),
]
UNARY += [
    lambda x: x.exp().clamp(max=3.0),
    lambda x: torch.nn.functional.softplus(x),
    lambda x: (x * x + 0.3).sqrt().clamp(min=0.6),
]
BINARY = [torch.add, torch.sub, torch.mul, torch.maximum, lambda a, b: a / (1.5 + b * b)]
BINARY += [
    lambda a, b: torch.where(a > b, a, b * 0.3),
    lambda a, b: torch.lerp(a, b, 0.25),
    lambda a, b: torch.atan2(a, b * b + 0.4),
]
REDUCE = [
    lambda x, d: x.sum(d, keepdim=True),
    lambda x, d: x.mean(d, keepdim=True),
    lambda x, d: x.amax(d, keepdim=True),
]
REDUCE += [
    lambda x, d: x.logsumexp(d, keepdim=True),
    lambda x, d: x.softmax(d),
    lambda x, d: x.cumsum(d),
    lambda x, d: x.var(d, keepdim=True),
]
WRITES = [
    lambda x, y: x.add_(y),
    lambda x, y: x.mul_(y),
    lambda x, y: x.copy_(y),
    lambda x, y: x.sub_(y, alpha=0.5),
    lambda x, y: x.fill_(0.7),
    lambda x, y: x.tanh_(),
    lambda x, y: x.clamp_(-1, 1),
    lambda x, y: x.lerp_(y, 0.3),
    lambda x, y: x.addcmul_(y, y, value=0.1),
]

COMPLEX = {
    "unary": [
        torch.sin,
        torch.neg,
        torch.conj,
        lambda x: x * (0.5 + 0.3j),
        lambda x: torch.complex(x.real, 0.3 * x.imag),
        lambda x: x / (2 + x.abs() ** 2),
        lambda x: torch.view_as_complex(torch.view_as_real(x.resolve_conj()).tanh()),
        lambda x: torch.polar(torch.sigmoid(x.real), x.imag),
        lambda x: (x.abs() + 0.5).log() * (1 + 0j),
        lambda x: torch.where(x.real > 0, x, x.conj() * 0.5),
    ],
    "binary": [
        torch.add,
        torch.sub,
        torch.mul,
        lambda a, b: a / (1.5 + b.abs() ** 2),
        lambda a, b: a * b.conj(),
    ],
    "reduce": [
        lambda x, d: x.sum(d, keepdim=True),
        lambda x, d: x.mean(d, keepdim=True),
        lambda x, d: x.cumsum(d),
        lambda x, d: torch.linalg.vector_norm(x + 0.4j, dim=d, keepdim=True) + 1j,
    ],
    "writes": [
        lambda x, y: x.add_(y),
        lambda x, y: x.mul_(y),
        lambda x, y: x.copy_(y.real),
        lambda x, y: x.real.mul_(0.5),
        lambda x, y: x.imag.copy_(y.real),
        lambda x, y: x.conj().mul_(y),
        lambda x, y: x.fill_(0.7 - 0.1j),
    ],
}
REAL = {"unary": UNARY, "binary": BINARY, "reduce": REDUCE, "writes": WRITES}


def part(draw, x):
    """A view of ``x``, drawn."""
    kind = draw.randrange(8)
    if x.dim() == 0:
        return lambda t: t.view(1) if kind < 4 else t[None]
    d = draw.randrange(x.dim())
    n = x.shape[d]
    if kind == 0 and n > 1:
        a = draw.randrange(n - 1)
        b = draw.randrange(a + 1, n)
        return lambda t: t.narrow(d, a, b - a)
    if kind == 1 and n > 1:
        return lambda t: t[(slice(None),) * d + (slice(None, None, 2),)]
    if kind == 2:
        i = draw.randrange(n)
        return lambda t: t.select(d, i)
    if kind == 3 and x.dim() > 1:
        e = draw.randrange(x.dim())
        return lambda t: t.transpose(d, e)
    if kind == 4:
        return lambda t: t.unsqueeze(d)
    if kind == 5 and x.dim() > 1 and x.is_contiguous():
        return lambda t: t.view(-1)
    if kind == 6 and x.dim() == 2:
        return lambda t: t.diagonal()
    if kind == 7:
        return lambda t: t.unbind(d)[0]
    return lambda t: t[...]


def fits(x, y):
    """Whether ``y`` broadcasts to the shape of ``x``."""
    try:
        return torch.broadcast_shapes(x.shape, y.shape) == x.shape
    except RuntimeError:
        return False


def program(seed: int, dtype: torch.dtype = torch.float64):
    """``(f, inputs)``: drawn while it runs once; afterwards ``f`` repeats the same steps, writing
    to its arguments."""
    draw = random.Random(seed)
    ops = COMPLEX if dtype.is_complex else REAL
    torch.manual_seed(seed)
    shapes = [(3,), (2, 3), (3, 2), (2, 3, 2), ()]
    inputs = [torch.randn(draw.choice(shapes), dtype=dtype) for _ in range(draw.choice((1, 2, 3)))]
    steps = []

    def choose(pool):
        i = (
            draw.randrange(len(pool))
            if draw.random() < 0.5
            else max(0, len(pool) - 1 - draw.randrange(3))
        )
        return i % len(pool)

    pool = [x.clone() for x in inputs]
    with torch.no_grad():
        for _ in range(draw.randrange(4, 16)):
            kind = draw.random()
            i, j = choose(pool), choose(pool)
            if kind < 0.25:
                op = draw.choice(ops["unary"])
                step = lambda p, i=i, op=op: p.append(op(p[i]))
            elif kind < 0.45:
                op = draw.choice(ops["binary"])
                try:
                    torch.broadcast_shapes(pool[i].shape, pool[j].shape)
                except RuntimeError:
                    j = i
                step = lambda p, i=i, j=j, op=op: p.append(op(p[i], p[j]))
            elif kind < 0.6:
                view = part(draw, pool[i])
                step = lambda p, i=i, view=view: p.append(view(p[i]))
            elif kind < 0.7 and pool[i].dim():
                op, d = draw.choice(ops["reduce"]), draw.randrange(pool[i].dim())
                step = lambda p, i=i, op=op, d=d: p.append(op(p[i], d))
            elif kind < 0.75:
                step = lambda p, i=i: p.append(p[i].detach() if i % 2 else p[i].clone())
            elif kind < 0.8:
                op = draw.choice(ops["unary"])

                def step(p, i=i, op=op):
                    with torch.no_grad():
                        y = op(p[i])
                    p.append(y)

            elif kind < 0.85:
                same = [k for k in range(len(pool)) if pool[k].shape == pool[i].shape]
                d = draw.randrange(pool[i].dim() + 1)
                step = lambda p, same=tuple(same[:3]), d=d: p.append(
                    torch.stack([p[k] for k in same], d)
                )
            else:
                op = draw.choice(ops["writes"])
                j = j if fits(pool[i], pool[j]) else i
                hidden = draw.random() < 0.15

                def step(p, i=i, j=j, op=op, hidden=hidden):
                    value = p[j] * 1.0
                    if hidden:
                        with torch.no_grad():
                            op(p[i], value)
                    else:
                        op(p[i], value)

            step(pool)
            if not all(t.isfinite().all() for t in pool):
                break
            steps.append(step)
    if not all(t.isfinite().all() for t in pool):
        return program(seed + 10_000, dtype)
    kept = sorted(draw.sample(range(len(pool)), min(3, len(pool))))

    def pool_of(xs):
        p = list(xs)
        for step in steps:
            step(p)
        return p

    def f(*xs):
        p = pool_of(xs)
        total = sum((p[k] * (k + 1)).sin().sum() for k in kept)
        return total.real * 0.5 + total.imag if dtype.is_complex else total

    f.values = lambda *xs: [p for k, p in enumerate(pool_of(xs)) if k in kept]
    return f, inputs


def pure(f):
    return lambda *xs: f(*[x.clone() for x in xs])


def autograd(f, xs, create_graph=False):
    y = f(*xs)
    if not y.requires_grad:
        return [torch.zeros_like(x) for x in xs]
    found = torch.autograd.grad(y, xs, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, xs)]


def leaves(xs):
    return [x.clone().requires_grad_() for x in xs]


def valid(f, inputs):
    """Whether autograd itself takes the program (it refuses some writes)."""
    try:
        autograd(f, leaves(inputs))
    except RuntimeError:
        return False
    return True


def all_of(f, inputs):
    every = tuple(range(len(inputs)))
    grad = aotfunc.grad(f, every)
    want = autograd(f, leaves(inputs))
    value = f(*inputs)
    yield "value", aotfunc.make_fx(f)(*inputs)(*inputs), value
    yield "grad", grad(*inputs), want
    yield "graph of grad", aotfunc.make_fx(grad)(*inputs)(*inputs), want
    tangents = [torch.randn_like(x) for x in inputs]
    along = sum(
        ((g.conj() * t).sum().real for g, t in zip(want, tangents)),
        torch.zeros((), dtype=torch.float64),
    )
    yield "jvp", aotfunc.jvp(f, tuple(inputs), tuple(tangents))[1], along
    jitted = aotfunc.jit(f)
    for _ in range(2):
        yield "jit", jitted(*inputs), value
        yield "backward of jit", autograd(jitted, leaves(inputs)), want
    yield "grad of jit", aotfunc.grad(jitted, every)(*inputs), want
    batch = [torch.stack([x, x * 0.9, x + 0.1]) for x in inputs]
    rows = list(zip(*batch))
    yield "vmap", aotfunc.vmap(f)(*batch), torch.stack([f(*row) for row in rows])
    each = [autograd(f, leaves(row)) for row in rows]
    per_sample = [torch.stack(column) for column in zip(*each)]
    yield "vmap of grad", aotfunc.vmap(grad)(*batch), per_sample
    yield (
        "grad of vmap",
        aotfunc.grad(lambda *b: aotfunc.vmap(f)(*b).sum(), every)(*batch),
        per_sample,
    )
    dims = tuple(-1 if x.dim() else 0 for x in inputs)
    moved = [b.movedim(0, d) for b, d in zip(batch, dims)]
    yield (
        "vmap of jit, other dims",
        aotfunc.vmap(jitted, in_dims=dims)(*moved),
        aotfunc.vmap(f)(*batch),
    )
    if len(inputs) > 1:
        one = (0, *[None] * (len(inputs) - 1))
        rest = inputs[1:]
        yield (
            "vmap over one",
            aotfunc.vmap(f, in_dims=one)(batch[0], *rest),
            torch.stack([f(x, *rest) for x in batch[0]]),
        )
    xs = leaves(inputs)
    gs = autograd(f, xs, create_graph=True)
    product = sum((g.conj() * t).sum().real for g, t in zip(gs, tangents))
    seconds = (
        torch.autograd.grad(product, xs, allow_unused=True)
        if product.requires_grad
        else [None] * len(xs)
    )
    seconds = [torch.zeros_like(x) if g is None else g for g, x in zip(seconds, xs)]
    dot = lambda *xs: sum((g.conj() * t).sum().real for g, t in zip(grad(*xs), tangents))
    yield "grad of grad", aotfunc.grad(dot, every)(*inputs), seconds
    if (
        tangents[0].is_complex()
    ):  # the Hessian of a real function of complex numbers is symmetric as a real map only
        others = [torch.randn_like(x) for x in inputs]
        pairing = lambda us, vs: sum((u.conj() * v).sum().real for u, v in zip(us, vs))
        pushed = aotfunc.jvp(grad, tuple(inputs), tuple(others))[1]
        yield "jvp of grad", pairing(tangents, pushed), pairing(seconds, others)
        return
    yield "jvp of grad", aotfunc.jvp(grad, tuple(inputs), tuple(tangents))[1], seconds
    yield "linearized grad", aotfunc.linearize(grad, *inputs)[1](*tangents), seconds


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("seed", seeds(25))
def test_a_random_program(seed, dtype):
    f, inputs = program(seed, dtype)
    f = pure(f)
    if not valid(f, inputs):
        pytest.skip("autograd refuses this program")
    for what, got, want in all_of(f, inputs):
        got, want = (list(t) if isinstance(t, tuple | list) else [t] for t in (got, want))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(
                g, w.detach(), equal_nan=True, msg=lambda m, what=what: f"{what}: {m}", **CLOSE
            )


WAYS = {
    "make_fx": lambda f: lambda *xs: aotfunc.make_fx(f)(*xs)(*xs),
    "jit": lambda f: aotfunc.jit(f),
    "vjp": lambda f: lambda *xs: aotfunc.vjp(f, *xs)[0],
    "jvp": lambda f: lambda *xs: aotfunc.jvp(f, xs, tuple(x.clone() for x in xs))[0],
    "vjp of jit": lambda f: lambda *xs: aotfunc.vjp(aotfunc.jit(f), *xs)[0],
}


@pytest.mark.parametrize("seed", seeds(40, 100_000))
def test_a_random_program_that_writes_to_its_arguments(seed):
    f, inputs = program(seed)
    theirs = [x.clone() for x in inputs]
    want = f(*theirs)
    for way, transformed in WAYS.items():
        mine = [x.clone() for x in inputs]
        got = transformed(f)(*mine)
        for g, w in zip([got, *mine], [want, *theirs], strict=True):
            torch.testing.assert_close(g, w, msg=lambda m, way=way: f"{way}: {m}", **CLOSE)
    batch = [torch.stack([x, x * 0.9]) for x in inputs]
    theirs = [b.clone() for b in batch]
    rows = torch.stack([f(*row) for row in zip(*theirs)])
    got = aotfunc.vmap(f)(*batch)
    for g, w in zip([got, *batch], [rows, *theirs], strict=True):
        torch.testing.assert_close(g, w, msg=lambda m: f"vmap: {m}", **CLOSE)


@pytest.mark.parametrize("seed", seeds(40, 200_000))
def test_what_a_random_program_returns_shares_memory_as_in_eager(seed):
    f, inputs = program(seed)
    f = f.values
    transformed = {"make_fx": lambda *xs: aotfunc.make_fx(f)(*xs)(*xs), "jit": aotfunc.jit(f)}
    transformed["jit of jit"] = aotfunc.jit(lambda *xs: aotfunc.jit(f)(*xs))
    for way, g in transformed.items():
        mine = [x.clone() for x in inputs]
        got = g(*mine)
        theirs = [x.clone() for x in inputs]
        want = f(*theirs)
        for _ in range(2):  # the second time after a write to each result
            for a, b in zip([*got, *mine], [*want, *theirs], strict=True):
                torch.testing.assert_close(a, b, msg=lambda m, way=way: f"{way}: {m}", **CLOSE)
            for t in (*got, *want) if way != "make_fx" else ():
                t += 1

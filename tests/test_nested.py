"""Random nests of transforms whose functions close over the variables of outer ones, against
autograd and loops.

The same nest is built twice, from aotfunc's transforms and from a reference of each: reverse mode
with create_graph, a loop for vmap, reverse mode twice for forward mode."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import aotfunc
from tests.functions import Cube
from tests.sweeps import seeds

N = 3


class Reference:
    """The transforms by autograd and loops, differentiable in all that the functions close
    over."""

    @staticmethod
    def vjp(f, x):
        with torch.enable_grad():
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            y = f(x)

        def back(g):
            if not y.requires_grad:
                return torch.zeros_like(x)
            found = torch.autograd.grad(y, x, g, create_graph=True, allow_unused=True)[0]
            return torch.zeros_like(x) if found is None else found

        return y, back

    def grad(self, f):
        return lambda x: self.vjp(f, x)[1](torch.ones((), dtype=x.dtype))

    def jvp(self, f, x, t):
        y, back = self.vjp(f, x)
        u = torch.zeros_like(y).requires_grad_()
        return y, self.vjp(back, u)[1](t) if back(u).requires_grad else torch.zeros_like(y)

    @staticmethod
    def vmap(f):
        return lambda xs: torch.stack([f(x) for x in xs])

    def jacobian(self, f, reverse):
        def jac(x):
            _, back = self.vjp(f, x)
            rows = [back(e) for e in torch.eye(N, dtype=x.dtype)]
            return torch.stack(rows)

        return jac

    @staticmethod
    def jit(f):
        return f


class Ours:
    """aotfunc's transforms under the same names."""

    grad, vmap, jit = (
        staticmethod(aotfunc.grad),
        staticmethod(aotfunc.vmap),
        staticmethod(aotfunc.jit),
    )

    @staticmethod
    def vjp(f, x):
        y, back = aotfunc.vjp(f, x)
        return y, lambda g: back(g)[0]

    @staticmethod
    def jvp(f, x, t):
        return aotfunc.jvp(f, (x,), (t,))

    @staticmethod
    def jacobian(f, reverse):
        return aotfunc.jacrev(f) if reverse else aotfunc.jacfwd(f)


class Linearized(Ours):
    """With ``linearize`` in the place of ``jvp``."""

    @staticmethod
    def jvp(f, x, t):
        y, push = aotfunc.linearize(f, x)
        return y, push(t)


def smooth(draw, count):
    """A smooth function of ``count`` vectors to a vector."""
    i, j, k = (draw.randrange(count) for _ in range(3))
    a, kind = draw.uniform(0.3, 1.1), draw.randrange(6)
    return lambda env: (
        torch.sin(a * env[i]) * env[j] + torch.tanh(env[k])
        if kind == 0
        else torch.softmax(env[i] * a, 0) * env[j].sum() + env[k]
        if kind == 1
        else (env[i].flip(0) * env[j]).cumsum(0) * 0.5 + a * env[k] ** 2
        if kind == 2
        else torch.outer(env[i], env[j]).exp().clamp(max=20).mean(1) * 0.3 - env[k]
        if kind == 3
        else torch.stack([env[i][0] * env[j][1], env[k][2].sin(), a * env[j].sum()])
        if kind == 4
        else torch.cat([env[i][1:], env[j][:1]]) * torch.sigmoid(env[k])
    )


def nest(draw, depth, count):
    """``(transforms, env) -> vector``, with ``depth`` transforms inside each other."""
    last = smooth(draw, count)
    if not depth:
        return lambda m, env: last(env)
    sub = nest(draw, depth - 1, count + 1)
    i, j = draw.randrange(count), draw.randrange(count)
    kind = draw.choice(
        [
            "grad",
            "vjp",
            "jvp",
            "vmap",
            "jac",
            "jit",
            "checkpoint",
            "write",
            "cube",
            "no_grad",
            "inner",
        ]
    )
    reverse = draw.random() < 0.5

    def call(m, env):
        inside = lambda z: sub(m, [*env, z])
        scalar = lambda z: inside(z).sin().sum()
        if kind == "grad":
            y = m.grad(scalar)(env[i])
        elif kind == "vjp":
            y = m.vjp(inside, env[i])[1](env[j])
        elif kind == "jvp":
            y = m.jvp(inside, env[i], env[j])[1]
        elif kind == "vmap":
            y = m.vmap(inside)(torch.stack([env[i], env[j] * 0.5])).sum(0)
        elif kind == "jac":
            y = m.jacobian(inside, reverse)(env[i]).tanh().sum(0 if reverse else 1)
        elif kind == "jit":
            y = m.jit(inside)(env[i])
        elif kind == "checkpoint":
            y = checkpoint(inside, env[i], use_reentrant=False) + env[j]
        elif kind == "write":
            y = env[i].clone()
            y[1:].mul_(env[j][:2])
            y = inside(y)
        elif kind == "cube":
            y = Cube.apply(inside(env[i]).tanh())
        elif kind == "no_grad":
            with torch.no_grad():
                held = inside(env[i]).tanh()
            y = held * env[j]
        else:  # autograd's own gradient inside of the function
            with torch.enable_grad():
                z = env[i] * 1.0
                z = z if z.requires_grad else z.requires_grad_()
                y = torch.autograd.grad(scalar(z) + 0 * z.sum(), z, create_graph=True)[0]
        return last([*env[:-1], y.tanh()])

    return call


@pytest.mark.parametrize("seed", seeds(30))
def test_a_random_nest(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    count = 2
    f = nest(draw, draw.choice((1, 2, 2, 3)), count)
    xs = [torch.randn(N, dtype=torch.float64) * 0.7 for _ in range(count)]
    leaves = [x.clone().requires_grad_() for x in xs]
    value = f(Reference(), leaves)
    want = [torch.zeros_like(x) for x in xs]
    if value.requires_grad:
        found = torch.autograd.grad(value.sin().sum(), leaves, allow_unused=True)
        want = [w if g is None else g for g, w in zip(found, want, strict=True)]
    for m in (Ours(), Linearized()):
        mine = lambda *env, m=m: f(m, list(env))
        loss = lambda *env, mine=mine: mine(*env).sin().sum()
        close(mine(*xs), value)
        close(aotfunc.grad(loss, (0, 1))(*xs), want)
        close(aotfunc.make_fx(aotfunc.grad(loss, (0, 1)))(*xs)(*xs), want)
        close(aotfunc.jit(aotfunc.grad(loss, (0, 1)))(*xs), want)
        batch = [torch.stack([x, x]) for x in xs]
        close(
            aotfunc.vmap(aotfunc.grad(loss, (0, 1)))(*batch), [torch.stack([w, w]) for w in want]
        )
        tangents = [torch.randn_like(x) for x in xs]
        along = sum((w * t).sum() for w, t in zip(want, tangents, strict=True))
        close(aotfunc.jvp(loss, tuple(xs), tuple(tangents))[1], along)
        theirs = [x.clone().requires_grad_() for x in xs]
        result = aotfunc.jit(loss)(*theirs)
        if value.requires_grad:
            result.backward()
        close([torch.zeros_like(t) if t.grad is None else t.grad for t in theirs], want)


def close(got, want):
    got, want = (list(t) if isinstance(t, tuple | list) else [t] for t in (got, want))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.detach(), rtol=1e-7, atol=1e-8)

"""Python numbers that a compiled function hands on: where it only computes with them it is not
captured for another one, whatever it does, its results are eager's, bit for bit."""

import collections
import copy
import decimal
import fractions
import functools
import json
import math
import operator
import pickle
import random
import statistics
import struct
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_function, grad, hessian, jit, jvp, vjp, vmap
from tests.reference import assert_same, grads

VALUES = (0.3, 0.7, 0.31, 0.9, 1.7, 0.123, -2.2, 1e-3)
#: 0.5 and 1.0 are literals of a program, those after them not
SPECIAL = (0.3, 0.7, 0.5, 0.31, -0.0, 1.0, 0.9, 0.0, math.inf, 0.123, math.nan, 1.7, 1e-30, 5e-324)


def drawn(dtype):
    return torch.linspace(0.3, 2, 12, dtype=torch.float64).view(3, 4).to(dtype)


def step(p, g, lr):
    return p - lr * g


def in_place(x, t):
    x = x * 1
    x *= t
    x += t
    return x


def decaying(x, t):
    for _ in range(3):
        x = x - t * x
        t = t * 0.9
    return x


def squared(x, t):
    for _ in range(40):  # an expression of 2 ** 40 parts, were it written out
        t = t * t
    return x * t


def through_autograd(x, t):
    y = x.detach().requires_grad_()
    return torch.autograd.grad((t * y.sin()).sum(), y)[0]


#: functions of a tensor and a number that only compute with it, and what is right, where that is
#: another function
COMPUTING = {
    "between numbers": lambda x, t: t * x + (1 - t) * x.sin(),
    "a helper": lambda x, t: step(x, x.cos(), t),
    "helpers": lambda x, t: step(x, x.sin(), t * 0.7) + step(x, x, -t),
    "in place": in_place,
    "bound anew": decaying,
    "many steps": squared,
    "a closure": lambda x, t: (lambda y: y * t)(x),
    "signs": lambda x, t: -t * x + abs(t) * x + (+t),
    "powers": lambda x, t: x * t**2 + x * 0.9**t,
    "functions": lambda x, t: torch.mul(x, t) + torch.add(x, t) + torch.sub(x, t),
    "methods": lambda x, t: x.mul(t).add(t).sub_(t).div_(t).mul_(t),
    "on the left": lambda x, t: t / x + t - x + (t * t) ** x.abs(),
    "compared": lambda x, t: torch.where(x > t, x * t, x % t),
    "in a list": lambda x, t: [y * t for y in [x, x * 2]],
    "a copy": lambda x, t: x * copy.deepcopy(t) * copy.copy(t),
    "what it is": lambda x, t: x * t if isinstance(t, float) and t is not None else x,
    "not used": lambda x, t: x * 2,
    "an outside tensor": lambda x, t: (torch.ones(4) * t).sin() * x,
    "recomputed": lambda x, t: checkpoint(lambda y: (y * t).sin(), x, use_reentrant=False),
    "autograd": (through_autograd, lambda x, t: torch.ones_like(x) * t * x.cos()),
    "grad": (
        lambda x, t: grad(lambda y: (t * y * y).sum())(x),
        lambda x, t: grads(lambda y: (t * y * y).sum())(x),
    ),
    "grad of an argument": (
        lambda x, t: grad(lambda y, s: ((1 - s) * y * y).sum())(x, t),
        lambda x, t: grads(lambda y: ((1 - t) * y * y).sum())(x),
    ),
    "vmap": (lambda x, t: vmap(lambda r: r * t - r / t)(x), lambda x, t: x * t - x / t),
    "vmap of an argument": (
        lambda x, t: vmap(lambda r, s: r * s, (0, None))(x, t),
        lambda x, t: x * t,
    ),
    "jvp": (
        lambda x, t: jvp(lambda y: (1 - t * t) * y * y, (x,), (x * t,))[0],
        lambda x, t: (1 - t * t) * x * x,
    ),
    "vjp": (lambda x, t: vjp(lambda y: t * y, x)[1](x)[0], lambda x, t: x * t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", COMPUTING)
def test_it_is_captured_twice(name, dtype):
    f, right = COMPUTING[name] if isinstance(COMPUTING[name], tuple) else [COMPUTING[name]] * 2
    for way in (jit, aot_function):
        compiled, x = way(f), drawn(dtype)
        for t in VALUES:
            assert_same(compiled(x, t), right(x, t), rtol=0, atol=0)
        assert compiled.captures == 2 or name == "many steps"  # it is 0 at once
        for t in SPECIAL:
            assert_same(compiled(x, t), right(x, t), rtol=0, atol=0)


@pytest.mark.parametrize("name", COMPUTING)
def test_gradients(name):
    f = COMPUTING[name][0] if isinstance(COMPUTING[name], tuple) else COMPUTING[name]
    compiled = jit(f)
    total = lambda r: sum(map(torch.sum, r)) if isinstance(r, list) else r.sum()
    for t in VALUES:
        x, y = drawn(torch.float64).requires_grad_(), drawn(torch.float64).requires_grad_()
        got, want = total(compiled(x, t)), total(f(y, t))
        assert got.requires_grad == want.requires_grad
        if got.requires_grad:
            assert_same(torch.autograd.grad(got, x), torch.autograd.grad(want, y))


@dataclass
class Settings:
    bias: torch.Tensor
    rate: float
    scale: tuple[float, dict]


def adam(x, rate, n):
    g = x.sin()
    m, v = (1 - 0.9) * g, (1 - 0.999) * g * g
    return x - rate * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)


CONTAINERS = {
    "list": (lambda x, c: x * c[0] + c[1], lambda t: [t, 1 - t]),
    "dictionary": (lambda x, c: x * c["a"] + c["b"] * x, lambda t: {"a": t, "b": 0.1}),
    "tuples": (lambda x, c: x * c[0][1]["a"], lambda t: ((1, {"a": t}),)),
    "dataclass": (
        lambda x, c: x * c.rate + c.bias * (1 - c.scale[1]["s"]),
        lambda t: Settings(torch.ones(4), t, (0.5, {"s": t / 3})),
    ),
    "a count": (lambda x, c: adam(x, *c), lambda t: (t, 1 + abs(int(t * 100)))),
    "beside a shape": (lambda x, c: (x * c[0]).view(c[1], -1), lambda t: (t, 2)),
    "one list twice": (lambda x, c: x * c[0][0] + c[1][0], lambda t: [[t]] * 2),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name):
    f, made = CONTAINERS[name]
    compiled, x = jit(f), drawn(torch.float32)
    for t in VALUES:
        assert_same(compiled(x, made(t)), f(x, made(t)), rtol=0, atol=0)
    assert compiled.captures == 2
    by_name = jit(lambda *, x, c: f(x, c))
    for t in VALUES:
        assert_same(by_name(x=x, c=made(t)), f(x, made(t)), rtol=0, atol=0)
    assert by_name.captures == 2


def test_some_are_free():
    def f(x, free, shape, asked):
        return (x * free + asked).reshape(shape, -1) if asked > 0.5 else x / free

    compiled, x = jit(f), drawn(torch.float64)
    for asked in (0.3, 0.7, 0.9):
        for shape in (2, 3, 4):
            for t in VALUES:
                assert_same(compiled(x, t, shape, asked), f(x, t, shape, asked), rtol=0, atol=0)
    assert compiled.captures <= 3 * 3 + 4


# ----- what asks ---------------------------------------------------------------------------------


class Scaling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t):
        ctx.t = t
        return x * t

    @staticmethod
    def backward(ctx, g):
        return g * ctx.t, None


@torch.library.custom_op("followed::scale", mutates_args=())
def scale(x: torch.Tensor, t: float) -> torch.Tensor:
    return x * t


@scale.register_fake
def _(x, t):
    return torch.empty_like(x)


@functools.lru_cache
def cached(t):
    return t * 2


class Kept:
    last = 0.0
    items: list = []


log: list = []


def stored(x, t):
    Kept.last = t
    return x * t


def logged(x, t):
    log.append(t)
    return x * t


def logged_beside(x, t):
    Kept.items.append((1, t * 2))
    return x * t


def assigned(x, index, t):
    x = x.clone()
    x[index] = t
    return x


def matched(x, t):
    match t:
        case float():
            return x * t
        case int():
            return x + t


def caught(x, t):
    try:
        json.dumps(t)
    except TypeError:
        return x * 7
    return x * t


def counted(x, t):
    count = collections.Counter([t, 0.3])
    return x * count[0.3]


ASKING = {
    "full": lambda x, t: torch.full((3, 4), t) + x,
    "full_like": lambda x, t: torch.full_like(x, t) + x,
    "fill_": lambda x, t: x.clone().fill_(t) + x,
    "x[0] = t": lambda x, t: assigned(x, 0, t),
    "x[mask] = t": lambda x, t: assigned(x, x > 1, t),
    "where": lambda x, t: torch.where(x > 1, x, t),
    "where of two": lambda x, t: torch.where(x > 1, t, t * 2) * x,
    "clamp": lambda x, t: x.clamp(t, t + 1),
    "pad": lambda x, t: F.pad(x, (1, 0), value=t),
    "linspace": lambda x, t: torch.linspace(0, t, 4) + x,
    "arange": lambda x, t: torch.arange(0, t, t / 4)[:4].sum() + x,
    "masked_fill": lambda x, t: x.masked_fill(x > 1, t),
    "lerp": lambda x, t: x.lerp(x * 2, t),
    "alpha": lambda x, t: x.add(x, alpha=t),
    "addcmul": lambda x, t: x.addcmul(x, x, value=t),
    "addmm": lambda x, t: torch.addmm(x[:, :3], x, x.t(), beta=t, alpha=t),
    "leaky_relu": lambda x, t: F.leaky_relu(-x, t),
    "softplus": lambda x, t: F.softplus(x, t),
    "layer_norm": lambda x, t: F.layer_norm(x, (4,), eps=t),
    "batch_norm": lambda x, t: F.batch_norm(x, torch.zeros(4), torch.ones(4), None, None, True, t),
    "norm": lambda x, t: x.norm(t),
    "pow": lambda x, t: x**t,
    "floor_divide": lambda x, t: x // t + t // x,
    "rmod": lambda x, t: t % x,
    "tensor": lambda x, t: x * torch.tensor(t),
    "tensors": lambda x, t: x * torch.tensor([t, 1.0, t, 2]),
    "as_tensor": lambda x, t: x * torch.as_tensor(t),
    "new_tensor": lambda x, t: x * x.new_tensor([t]),
    "Tensor": lambda x, t: x * torch.Tensor([t]),
    "scalar_tensor": lambda x, t: x * torch.scalar_tensor(t),
    "dropout": lambda x, t: F.dropout(x, t / 100, training=False),
    "attention": lambda x, t: F.scaled_dot_product_attention(x[None], x[None], x[None], scale=t),
    "Function": lambda x, t: Scaling.apply(x, t),
    "custom op": lambda x, t: scale(x, t),
    "recomputed": lambda x, t: checkpoint(lambda y, s: y * s, x, t, use_reentrant=False),
    "math": lambda x, t: x * math.exp(t) + math.floor(t),
    "format": lambda x, t: (x, f"{t:.3f}", str(t), repr(t), f"{t}"),
    "percent": lambda x, t: (x, "%.2f" % t),  # noqa: UP031
    "json": lambda x, t: (x, json.dumps({"t": t})),
    "pickle": lambda x, t: x * pickle.loads(pickle.dumps(t)),
    "lru_cache": lambda x, t: x * cached(t),
    "logged": logged,
    "logged beside": logged_beside,
    "stored": stored,
    "match": matched,
    "caught": caught,
    "counted": counted,
    "mean": lambda x, t: x * statistics.mean([t, t + 1]),
    "returned": lambda x, t: (x * t, t, [1 - t, {"a": t}]),
    "its type": lambda x, t: x * t if type(t) is float else x,
    "if": lambda x, t: x * t if t > 0.5 else x / t,
    "truth": lambda x, t: (x * t if t else x) * (t and 2.0) * (not t),
    "in": lambda x, t: x * t if t in (0.3, 4) else x,
    "key": lambda x, t: x * {0.3: 1, t: 2}[t] * len({t, 0.3}) * (hash(t) % 7),
    "max": lambda x, t: x * max(t, 0.5) * sorted([t, 0.5, 0.2])[0],
    "round": lambda x, t: x * round(t, 1) * int(t * 10) * float(t) * divmod(t, 0.2)[0],
    "complex": lambda x, t: (x * complex(t, 1)).real,
    "sum": lambda x, t: x * sum([t, t, 0.1, t]) * sum([0.1, t, t, 0.7]),
    "fsum": lambda x, t: x * math.fsum([t, t, 0.1]),
    "reduce": lambda x, t: x * functools.reduce(operator.add, [t, t, 0.1]),
    "fraction": lambda x, t: x * float(fractions.Fraction(t)) * float(decimal.Decimal(t)),
    "numpy": lambda x, t: x * float(np.sin(t)) * float(np.float64(2) * t),
    "array": lambda x, t: (x * float(np.array([t, t]).sum()), str(np.array([t]).dtype)),
    "computed with an array": lambda x, t: x * torch.from_numpy(np.ones(4) * t),
    "struct": lambda x, t: x * struct.unpack("d", struct.pack("d", t))[0],
    "parts": lambda x, t: x * float.fromhex(t.hex()) * t.real * t.is_integer(),
    "random": lambda x, t: x * random.Random(t).random(),
    "grad": lambda x, t: grad(lambda y: (y * t).sum() if t > 0.5 else (y / t).sum())(x),
    "jit": lambda x, t: jit(lambda y, s: y * s)(x, t) + jit(lambda y: y * t)(x),
    "special": lambda x, t: x * (t / t) + x * (t - t) + x * (t * 1e300 * 1e300),
}
COUNTS = {
    "view": lambda x, n: x.view(n, -1),
    "x[n]": lambda x, n: x[n - 3],
    "x[:n]": lambda x, n: x[: n - 2],
    "times": lambda x, n: x * n + torch.mul(x, n) + n / x,
    "alpha": lambda x, n: x.add(x, alpha=n),
    "pow": lambda x, n: x**n + n**x,
    "range": lambda x, n: x + sum(1 for _ in range(n)),
    "whole": lambda x, n: (x.long() * n, x.long() + n, x.long() / n, x.long() // n, n - x.long()),
    "bytes": lambda x, n: (x.to(torch.uint8) * n, x.to(torch.int8) + n, (x > 1) * n),
    "tensor": lambda x, n: (torch.tensor(n) + x.long(), torch.tensor([n, 1]), torch.full((2,), n)),
    "where": lambda x, n: torch.where(x > 1, x.long(), n),
    "bits": lambda x, n: ((1 << n) * x, (n & 3) * x, x.long() ^ n, n & x.long()),
    "moved": lambda x, n: (x.roll(n), x[None].expand(n, 3, 4), x.repeat(n, 1), x.chunk(n)[0]),
    "element": lambda x, n: x * [1, 2, 3, 4, 5, 6, 7, 8, 9, 10][n],
    "powers of numbers": lambda x, n: (x * 0.9**n, x * n**-1, x * (1 / n), x * (n % 3)),
    "one_hot": lambda x, n: F.one_hot(torch.tensor([1]), n) + x.sum().long(),
    "text": lambda x, n: (x, "a" * n, n == 4),
    "arange": lambda x, n: torch.arange(n).sum() + x,
}
CASES = [(f, name, (*VALUES[:5], 0.5, 1.0, 0.13, 0.3)) for name, f in ASKING.items()]
CASES += [(f, name, (3, 4, 5, 4, 6, 7, 3)) for name, f in COUNTS.items()]


def outcome(f, *args):
    try:
        return f(*args), None
    except Exception as e:
        return None, type(e)


@pytest.mark.parametrize(("f", "name", "values"), CASES, ids=[name for _, name, _ in CASES])
def test_what_asks_gets_its_own_answer(f, name, values):
    compiled = jit(f)
    for i, t in enumerate(values):
        x = drawn(torch.float32).requires_grad_(i % 3 == 1)
        (got, error), (want, due) = outcome(compiled, x, t), outcome(f, x, t)
        if "logged" not in name and name != "lru_cache":
            assert (error is None) == (due is None)
        assert_same(got, want, rtol=0, atol=0)
        if isinstance(want, tuple):
            assert [*map(type, got)] == [*map(type, want)]
    kept = [Kept.last, *log, *(t for _, t in Kept.items)]
    assert {*map(type, kept)} == {float}


def test_an_error_of_the_functions_own():
    """It is what eager raises, the function runs as often as it would, and nothing is kept."""
    seen = []

    def f(x, t):
        seen.append(t)
        if t == 0.31:
            raise ValueError("not this one")
        return x * t

    compiled, x = jit(f), drawn(torch.float32)
    for t in VALUES:
        if t == 0.31:
            with pytest.raises(ValueError, match="not this one"):
                compiled(x, t)
        else:
            assert_same(compiled(x, t), x * t, rtol=0, atol=0)
    assert {*map(type, seen)} == {float}


def test_generators_of_python_go_on():
    def f(x, t):
        if t > 0.5:
            random.random()
        return x * math.sin(t) * len({t})

    compiled, x = jit(f), drawn(torch.float32)
    for t in VALUES:
        random.seed(0)
        compiled(x, t)
        got = random.random()
        random.seed(0)
        f(x, t)
        assert got == random.random()


def test_hessian_under_jit():
    f = jit(lambda x, t: hessian(lambda y: ((1 - t) * y**3).sum())(x))
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for t in VALUES:
        assert_same(f(x, t), torch.diag((1 - t) * 6 * x))
    assert f.captures == 2

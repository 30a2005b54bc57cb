"""A Python number that is another one at each call: no program each, and what eager computes with
the number."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from aotfunc import functionalize, grad, hessian, jacfwd, jit, jvp, linearize, make_fx, vjp, vmap
from aotfunc.capture import captured


@pytest.fixture
def made(monkeypatch):
    """The programs that are made meanwhile."""
    found = []
    build = captured.Captured._build
    monkeypatch.setattr(
        captured.Captured, "_build", lambda self, memory: found.append(1) or build(self, memory)
    )
    return found


NUMBERS = (0.3, 0.77, 10.1, 1e-3, 4.0, 123.456)
#: numbers that are equal at first, and then are not
PAIRS = ((0.3, 0.3), (0.4, 0.4), (0.4, 0.7), (0.6, 0.6), (0.6, 0.3), (0.3, 0.3), (0.9, 0.8))

#: functions of a tensor and a number that may be an input
LIFTED = {
    "add": lambda x, t: x + t,
    "radd": lambda x, t: t + x,
    "sub": lambda x, t: x - t,
    "rsub": lambda x, t: t - x,
    "mul": lambda x, t: x * t,
    "div": lambda x, t: x / t,
    "rdiv": lambda x, t: t / x,
    "rpow": lambda x, t: t**x,
    "in place": lambda x, t: x.clone().mul_(t).add_(t).sub_(t).div_(t),
    "several": lambda x, t: (x * t + t).tanh() - (1.1 - t) * x.sin(),
}
#: … that stays a literal where it would be rounded
SCALED = {
    "alpha": lambda x, t: x.add(x.sin(), alpha=t).sub(x, alpha=t) - torch.rsub(x, x * x, alpha=t),
    "value": lambda x, t: x.addcmul(x, x.sin(), value=t).addcdiv(x, x.exp(), value=-t),
    "weight": lambda x, t: torch.lerp(x, x.sin(), t),
    "scaled in place": lambda x, t: (
        x.clone().add_(x, alpha=t).sub_(x, alpha=t).lerp_(x, t).addcmul_(x, x, value=t)
    ),
}
REAL = {
    "compared": lambda x, t: torch.where(x > t, x * t, x) + (x <= t) * (t > x) * (x != t),
    "remainder": lambda x, t: x % t,
}

low = (torch.float16, torch.bfloat16)
float_dtypes = (torch.float32, torch.float64, *low)
CASES = [
    *((name, d) for name in LIFTED | SCALED for d in (*float_dtypes, torch.complex64)),
    *((name, d) for name in REAL for d in float_dtypes),
]


def drawn(shape, dtype):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
def test_values_are_those_of_eager(name, dtype, shape, made):
    f = (LIFTED | SCALED | REAL)[name]
    x = drawn(shape, dtype)
    for t in (*NUMBERS, 7, -11):
        got, want = functionalize(f)(x, t), f(x, t)
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    if shape and not (name in SCALED and dtype in low):
        assert len(made) <= 4  # the first and the changing one, of floats and of integers


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(5,), ()])
def test_integer_tensors(dtype, shape):
    x = torch.ones(shape, dtype=dtype)
    for t in (0.3, 0.77, 5, 7, 200):
        got, want = functionalize(lambda x, t=t: x * t + t)(x), x * t + t
        assert got.dtype is want.dtype and torch.equal(got, want)


SPECIAL = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    2.0,
    0.5,
    -0.5,
    3.0,
    math.inf,
    -math.inf,
    math.nan,
    1,
    0,
    2,
    True,
    False,
    1 << 60,
    1e300,
)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "several", "compared", "alpha"])
def test_numbers_that_are_special(name):
    f = (LIFTED | SCALED | REAL)[name]
    x = torch.tensor([0.0, -0.0, 1.5, -2.0, math.inf, math.nan])
    for t in (0.3, *SPECIAL, 0.77, *reversed(SPECIAL)):
        if (t.__class__ is bool and name != "mul") or (t == 1e300 and name == "alpha"):
            continue  # eager refuses them
        torch.testing.assert_close(functionalize(f)(x, t), f(x, t), rtol=0, atol=0, equal_nan=True)
        leaf = x.clone().requires_grad_()
        f(leaf, t).sum().backward()
        torch.testing.assert_close(
            grad(lambda x, t=t: f(x, t).sum())(x), leaf.grad, equal_nan=True
        )


def loss(x, t):
    return ((x * t).tanh() + (t + 0.71) ** x).square().mean() * t


x0 = drawn((3, 3), torch.float64).abs() + 0.1

TRANSFORMS = {
    "grad": lambda x, t: grad(loss)(x, t),
    "keyword": lambda x, t: grad(lambda x, *, t: loss(x, t))(x, t=t),
    "closed over": lambda x, t: grad(lambda x: loss(x, t))(x),
    "grad of grad": lambda x, t: grad(lambda x: grad(loss)(x, t).square().sum())(x),
    "hessian": lambda x, t: hessian(loss)(x[0], t),
    "jacfwd": lambda x, t: jacfwd(lambda x: x * t - x.sum() * t)(x),
    "vjp": lambda x, t: vjp(lambda x: t * x.sin(), x)[1](x)[0],
    "jvp": lambda x, t: jvp(lambda x: t * x.sin(), (x,), (x * t,))[1],
    "linearize": lambda x, t: linearize(lambda x: t * x.sin(), x)[1](x),
    "vmap": lambda x, t: vmap(lambda r: r * t - r.sum() * t)(x),
    "samples of no dimension": lambda x, t: vmap(vmap(lambda r: (r * t).sin() - t))(x),
    "vmap of grad": lambda x, t: vmap(grad(loss), in_dims=(0, None))(x, t),
    "in place": lambda x, t: functionalize(lambda x: x.mul_(t).add_(x, alpha=2).sub_(t))(
        x.clone()
    ),
    "a value is looked at": lambda x, t: grad(
        lambda x: (x * t).sum() if (x * t).sum() > 0 else x.sum()
    )(x),
    "steps of an optimiser": lambda x, t: vmap(
        grad(lambda x, m: x.add(m.lerp(x.sin(), t), alpha=-t).addcdiv(m, x + 2, value=t).sum())
    )(x, x.exp()),
    "values of samples": lambda x, t: vmap(lambda r: r * t if (r * t).sum() > 0 else r)(x),
    "argument written": lambda x, t: written(x.clone(), t),
}


def written(x, t):
    grads = grad(lambda w: (x.mul_(t) * w).sum())(torch.ones_like(x))
    return x, grads


@pytest.mark.parametrize("name", TRANSFORMS)
def test_one_program_for_all_numbers(name, made):
    f = TRANSFORMS[name]
    for t in (0.31, 0.78):
        f(x0, t)
    f(x0, 0.91)
    count = len(made)
    got = [f(x0, t) for t in NUMBERS]
    assert len(made) == count or name == "values of samples"
    for t, mine in zip(NUMBERS, got, strict=True):
        captured._programs.clear()
        torch.testing.assert_close(mine, f(x0, t))


def test_numbers_are_told_apart(made):
    """Equal ones may be one input, as long as they are equal."""
    f = lambda x, s, t: (x * s + t).sin() / s
    for s, t in PAIRS:
        torch.testing.assert_close(functionalize(f)(x0, s, t), f(x0, s, t), rtol=0, atol=0)
    assert len(made) == 3


def test_a_number_that_stays_is_a_literal(made):
    f = lambda x, t: (x * t + 0.123) ** 2
    for t in NUMBERS:
        torch.testing.assert_close(functionalize(f)(x0, t), f(x0, t), rtol=0, atol=0)
    assert len(made) == 2
    rate = [0.123]
    g = lambda x, t: (x * t + rate[0]) ** 2
    for t in NUMBERS:
        rate[0] = t + 1
        torch.testing.assert_close(functionalize(g)(x0, t), g(x0, t), rtol=0, atol=0)


def test_graphs_have_literals():
    for t in NUMBERS:
        assert repr(t) in make_fx(lambda x, t=t: grad(loss)(x, t))(x0).code
        f = jit(lambda x, t=t: grad(loss)(x, t))
        torch.testing.assert_close(f(x0), grad(loss)(x0, t))


def test_inside_of_other_systems():
    want = lambda t: torch.autograd.functional.hessian(lambda x: loss(x, t), x0[0])
    for t in NUMBERS[:4]:
        mine = torch.func.jacrev(lambda x, t=t: grad(loss)(x, t))(x0[0])
        torch.testing.assert_close(mine, want(t))
        theirs = torch.func.vmap(lambda x, t=t: grad(loss)(x, t))(x0)
        torch.testing.assert_close(theirs[0], grad(loss)(x0[0], t))
        leaf = x0[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(grad(loss)(leaf, t).sum(), leaf)
        torch.testing.assert_close(slope, want(t).sum(0))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x0[0], torch.ones(3, dtype=torch.float64))
            tangent = forward_ad.unpack_dual(grad(loss)(dual, t)).tangent
        torch.testing.assert_close(tangent, want(t).sum(1))
    with torch.inference_mode():
        for t in NUMBERS[:3]:
            assert torch.equal(functionalize(LIFTED["mul"])(x0, t), x0 * t)

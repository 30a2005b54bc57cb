"""Operators of traced values are recorded as PyTorch's dispatcher would hand them on."""

import math
import operator

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from aotfunc import functionalize, grad, jit, make_fx, vmap
from aotfunc.capture import captured
from aotfunc.trace import operators
from tests.reference import assert_same

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool)
NUMBERS = (0.3, 0.5, 2.0, 0.0, -0.0, math.inf, math.nan, 1, 2, 7, 0, 1 << 60, True, 1j)
BINARY = [operator.add, operator.sub, operator.mul, operator.truediv]


@pytest.fixture
def records(monkeypatch):
    """What is recorded of ``f``, with the dispatcher or without."""
    found = []
    init = captured.Captured.__init__
    monkeypatch.setattr(
        captured.Captured,
        "__init__",
        lambda self, trace, *more: found.append(trace) or init(self, trace, *more),
    )

    def of(f, *args, asks):
        found.clear()
        with pytest.MonkeyPatch.context() as patch:
            if asks:
                patch.setattr(operators, "direct", lambda *_: None)
            try:
                functionalize(f)(*args)
            except (RuntimeError, TypeError) as e:
                return type(e)
        trace = found[-1]
        return [r[:4] for r in trace.records], list(map(repr, trace.numbers))

    return of


def check(records, f, *args):
    first = records(f, *args, asks=True)  # afterwards its ops are known
    assert records(f, *args, asks=False) == records(f, *args, asks=True) == first


def drawn(dtype, *shape):
    return torch.linspace(0.3, 2.7, 6).reshape(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(records, dtype):
    for shape in ((6,), (2, 3)):
        x = drawn(dtype, *shape)
        for n in NUMBERS:
            for op in BINARY:
                check(records, lambda x, n=n, op=op: op(x, n), x)
                check(records, lambda x, n=n, op=op: op(n, x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors(records, dtype):
    for other in DTYPES:
        x, y = drawn(dtype, 2, 3), drawn(other, 2, 3)
        for a, b in ((x, y), (x[0], y), (x, y[0, 0]), (x.t(), y.t())):
            for op in BINARY:
                check(records, op, a, b)
                check(records, lambda a, b=b, op=op: op(a, b), a)  # one from outside
                check(records, lambda a, b=b, op=op: op(b, a), a)


@pytest.mark.parametrize("name", [*operators.UNARY, *operators.REDUCTIONS])
def test_unary(records, name):
    for dtype in DTYPES:
        check(records, lambda x: getattr(x, name)(), drawn(dtype, 6))


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "another device": lambda: torch.device("cpu"),
    "forward AD": forward_ad.dual_level,
    "no tangents": lambda: forward_ad._set_fwd_grad_enabled(False),
}


def many(x):
    return 0.37 * x * x.sin() - (x + 1.1) / x.exp() + -x


@pytest.mark.parametrize("name", AROUND)
def test_what_lies_between(records, name):
    def f(x):
        with AROUND[name]():
            return many(x)

    check(records, f, drawn(torch.float32, 6))
    f(drawn(torch.float32, 6))


def test_parameters_and_leaves(records):
    w = torch.nn.Parameter(drawn(torch.float32, 6))

    def f(x):
        y = (x * w).sin() * 0.3 + w
        z = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(many(z).sum(), z)
        return y * slope * many(w * x)

    check(records, f, drawn(torch.float32, 6))
    x = drawn(torch.float32, 6).requires_grad_()
    for way in (f, jit(f)):
        assert_same(way(x), f(x))
        assert_same(
            torch.autograd.grad(way(x).sum(), (x, w)), torch.autograd.grad(f(x).sum(), (x, w))
        )


def test_layers_and_values_of_others(records):
    x = drawn(torch.float64, 6)
    kept = []

    def f(x):
        kept.append(x * 2)
        return grad(lambda y: (many(y) * x * vmap(lambda r: r * x * 0.3)(y).sum(0)).sum())(x)

    check(records, f, x)
    assert_same(kept[-1] * x, x * 2 * x)  # a value that leaked
    assert "0.37" in make_fx(many)(x).code


def test_a_mode_of_ones_own():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Doubles(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is torch.ops.aten.mul.Tensor else out

    def f(x):
        with Doubles():
            return x * x + x

    for _ in range(2):
        assert_same(functionalize(f)(torch.tensor([3.0])), torch.tensor([21.0]))


@pytest.mark.parametrize("name", [*operators.UNARY, *operators.BINARY])
def test_an_exchanged_method_is_called(name, monkeypatch):
    f = lambda x: getattr(x, name)(*[0.37] * (name in operators.BINARY))
    x = drawn(torch.float64, 6)
    want = torch.add(f(x), 1)
    functionalize(f)(x)
    old = getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda self, *more: torch.add(old(self, *more), 1))
    assert_same(functionalize(f)(x), want)


def test_a_vector_times_a_matrix_writes_nothing():
    """PyTorch ends it in ``squeeze_``, of a value that nothing else shows."""
    seen = []

    def f(x, w):
        y = x @ w
        seen.append((y.tracer.mutates, tuple(y.shape)))
        return y, y.unsqueeze_(0)

    x, w = torch.randn(3), torch.randn(3, 2)
    one, two = make_fx(f)(x, w)(x, w)
    assert seen == [(False, (2,))]
    assert one.shape == two.shape == (1, 2)
    assert_close(one, (x @ w)[None])
    assert_close(grad(lambda x: (x @ w).square().sum())(x), 2 * w @ (x @ w))
    assert_close(vmap(f, (0, None))(x[None], w)[0][0], one)

"""Zeros that ops with a derivative of zero give are gradients: multiplied as others on their way,
infinities included; they require grad where what they were multiplied by does, and come of the
results that a gradient reaches alone."""

import itertools

import pytest
import torch

from aotfunc import aot_function, grad, jit
from tests.functions import Cube
from tests.reference import assert_same

W, D = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)


def written(write):
    def f(v):
        v = v * 1
        write(v)
        return v

    return f


ZERO = {
    "round": torch.round,
    "sign": torch.sign,
    "angle": torch.angle,
    "copysign": lambda v: torch.copysign(torch.ones(3), v),
    "bernoulli": lambda v: torch.bernoulli(v.sigmoid().nan_to_num()),
    "fill_": written(lambda v: v.fill_(0.5)),
    "zero_": written(lambda v: v.zero_()),
    "normal_": written(lambda v: v.normal_()),
    "copy_": written(lambda v: v.copy_(W[0])),
    "a view": written(lambda v: v[:].view(-1).zero_()),
    "a view, copied": written(lambda v: v[:].copy_(W[0])),
    "copied, then filled": written(lambda v: v.copy_(W[0])[0].zero_()),
    "a row": written(lambda v: v[0].fill_(0.5)),
    "masked_fill": lambda v: v.masked_fill(v > -99, 0.5),
    "clamp": lambda v: v.clamp(5, 6),
    "floor of a sum": lambda v: (v + v.sum(0)).floor(),
}
BEFORE = {
    "by what requires grad": lambda x: x @ W,
    "by what does not": lambda x: x @ D,
    "by itself": lambda x: x * x,
    "by nothing": lambda x: x + x,
    "by infinity": lambda x: x * float("inf"),
    "by its root": lambda x: (x * 0).sqrt(),
    "in a compiled function": lambda x: jit(lambda t: t @ D)(x),
}
HOWS = [jit, lambda f: aot_function(f, "eager")]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("zero", ZERO)
def test_zeros_are_gradients(zero, before, create_graph):
    def f(x):
        v = ZERO[zero](BEFORE[before](x))
        return v.sin(), v * 3 + x, x * 2

    def gradients(f, which):
        torch.manual_seed(0)
        x = torch.randn(2, 3, requires_grad=True)
        loss = sum(o.nan_to_num().sum() for o, yes in zip(f(x), which, strict=True) if yes)
        grads = torch.autograd.grad(loss, [x, W], create_graph=create_graph, allow_unused=True)
        return grads, [g is not None and g.requires_grad for g in grads]

    for how, which in zip(HOWS * 2, [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], strict=True):
        assert_same(gradients(how(f), which), gradients(f, which))


@pytest.mark.parametrize("before", BEFORE)
def test_transforms_multiply_zeros_as_torch_func_does(before):
    def f(x):
        return BEFORE[before](x).round().sin().nan_to_num().sum()

    x = torch.randn(2, 3)
    assert_same(grad(f)(x), torch.func.grad(f)(x))


# ----- arguments that are written over -----------------------------------------------------------


def read_between(first, second):
    """What is read between two writes to an argument."""

    def f(x, w):
        first(x, w)
        v = x * 2
        second(x, w)
        return v

    return f


WRITES = {
    "zeroed": lambda x, w: x.zero_(),
    "copied to": lambda x, w: x.copy_(w),
    "multiplied": lambda x, w: x.mul_(2),
    "a view zeroed": lambda x, w: x.unsqueeze(0).zero_(),
    "a view copied to": lambda x, w: x.unsqueeze(0).copy_(w),
    "a row copied to": lambda x, w: x[0].copy_(w),
    "neither": lambda x, w: None,
}


@pytest.mark.parametrize("compiler", HOWS)
@pytest.mark.parametrize("second", WRITES)
@pytest.mark.parametrize("first", WRITES)
def test_what_is_read_between_writes_to_an_argument(first, second, compiler):
    def gradients(f):
        x0, w = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
        x = x0 * 3
        found = []
        for _ in range(2):
            y = f(x, w).sin().sum()
            grads = torch.autograd.grad(y, [x0, w], create_graph=True, allow_unused=True)
            found += [None if g is None else (g.detach(), g.requires_grad) for g in grads]
        return found

    f = read_between(WRITES[first], WRITES[second])
    got, want = gradients(compiler(f)), gradients(f)
    assert [g and g[1] for g in got] == [g and g[1] for g in want]
    assert_same([g[0] for g in got if g], [g[0] for g in want if g])


# ----- backwards that return None ----------------------------------------------------------------


class Bare(Cube):
    """It gets None where autograd has no cotangent; Cube gets zeros."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return Cube.forward(ctx, x)

    @staticmethod
    def backward(ctx, g):
        return None if g is None else Cube.backward(ctx, g)


class Both(torch.autograd.Function):
    """Each result has a derivative by one of the arguments."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.set_materialize_grads(False)
        return x * 2, y + 1

    @staticmethod
    def backward(ctx, g, h):
        return None if g is None else g * 2, h


def through_a_hook(x):
    h = Cube.apply(x)
    h.register_hook(lambda g: None if g is None else g * 2)
    return h * 1


ON_THE_WAY = {
    "nothing": lambda x: x,
    "an op": lambda x: x * 2,
    "a Function": Cube.apply,
    "ops behind it": lambda x: Cube.apply(x).sin() @ torch.ones(3, 3),
    "ops before it": lambda x: Cube.apply(x.exp()),
    "two": lambda x: Cube.apply(Cube.apply(x)),
    "one that gets None": lambda x: Cube.apply(Bare.apply(x)),
    "it, and one that gets None": lambda x: Bare.apply(Cube.apply(x)),
    "a hook": through_a_hook,
    "a compiled one": jit(lambda x: Cube.apply(x) * 2),
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("compiler", HOWS)
@pytest.mark.parametrize("name", ON_THE_WAY)
def test_a_function_before_one_whose_backward_returns_none(name, compiler, second):
    def run(wrap):
        x, y = (torch.ones(3, requires_grad=True) for _ in range(2))
        f = ON_THE_WAY[name]
        wrap(lambda x, y: Both.apply(f(x), f(y))[second] * 1)(x, y).sum().backward()
        return x.grad, y.grad

    got, want = run(compiler), run(lambda f: f)
    if name == "a hook":  # the call is cut there, and None is no zeros (docs/limits.md)
        want = [g if g is not None and g.any() else None for g in want]
    assert [g is None for g in got] == [g is None for g in want]
    assert_same([g for g in got if g is not None], [g for g in want if g is not None])


def written_twice(a, b, x):
    y = x.clone()
    y[0] = a
    y[0] = b
    return y


TRUE = torch.ones(3, dtype=torch.bool)
#: functions of two vectors and a matrix: of what they do not take autograd has zeros, or None
UNTAKEN = {
    "cat with an empty vector": lambda a, b, x: torch.cat([a[:0], x.clone()]) + b.sum(),
    "where": lambda a, b, x: torch.where(TRUE, a, b * 2) + x,
    "where of nothing else": lambda a, b, x: torch.where(TRUE, a.detach(), b),
    "rows": lambda a, b, x: torch.select_scatter(torch.select_scatter(x, a, 0, 0), b, 0, 0),
    "parts": lambda a, b, x: x.slice_scatter(a[None], 0, 0, 1).slice_scatter(b[None], 0, 0, 1),
    "rows in place": written_twice,
    "a count": lambda a, b, x: torch.linalg.vector_norm(a * 2, 0) + b,
    "counts": lambda a, b, x: torch.norm(x, 0, dim=0) * a,
    "a distance": lambda a, b, x: torch.dist(a, b.detach(), 0) + x,
}


@pytest.mark.parametrize("name", UNTAKEN)
def test_what_is_not_taken(name):
    """A gradient is None, and a result requires grad, where autograd's is and does."""
    for mask in itertools.product((True, False), repeat=3):
        found = []
        for f in (UNTAKEN[name], jit(UNTAKEN[name])):
            xs = [torch.ones(3), 2 * torch.ones(3), torch.ones(2, 3)]
            out = f(*[x.requires_grad_(yes) for x, yes in zip(xs, mask, strict=True)])
            if out.requires_grad:
                out.sum().backward()
            found.append((out, [x.grad for x in xs]))
        assert_same(found[1], found[0])
        assert found[1][0].requires_grad == found[0][0].requires_grad

"""``torch.inference_mode()`` inside a compiled function: its results are inference tensors where
eager's are."""

import pytest
import torch
from torch import nn
from torch.autograd.forward_ad import _set_fwd_grad_enabled

import aotfunc
from aotfunc import aot_function, jit, make_fx
from aotfunc.errors import CaptureError
from tests.reference import assert_same

LINEAR = nn.Linear(3, 3)


def within(f):
    return torch.inference_mode()(f)


def left_again(x):
    with torch.inference_mode():
        y = x * 2
    return y + 1, y.clone()


def switched_off(x):
    with torch.inference_mode(), torch.inference_mode(False):
        y = x * 2
    return y * x


def asks(x):
    with torch.inference_mode():
        y, v = x * 2, x[0]
    return x + sum(2**k for k, t in enumerate((x, y, v, y[0], y + 1)) if t.is_inference())


def copies_of_columns(x):
    """Of a tensor by columns these are copies, and what is written to them stays theirs."""
    y = (x * 2).t()
    with torch.inference_mode():
        copies = [y.flatten(), y.reshape(-1), y.contiguous(), y.to(torch.float64), y.T.T.ravel()]
        for t in copies:
            t.add_(1)
    return y.sum(), *[t.sum() for t in copies]


def views_of_rows(x):
    y = x * 2
    with torch.inference_mode():
        for t in (y.flatten(), y.reshape(-1), y.contiguous(), y.to(y.dtype), y.expand_as(y)):
            t.add_(1)
    return y.sum()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 3


def without_tangents(x):
    with _set_fwd_grad_enabled(False):
        return Doubled.apply(x)


def says(x):
    y = LINEAR(x)
    found = [torch.is_inference_mode_enabled(), torch.is_grad_enabled(), y.requires_grad]
    found += [t.is_inference() for t in (x, x[0], y, y[0], LINEAR.weight, LINEAR.weight[0])]
    with torch.inference_mode(False):
        found += [torch.is_inference_mode_enabled(), (x.clone() * 2).is_inference()]
    return y + sum(2**k for k, yes in enumerate(found) if yes)


FUNCTIONS = {
    "says": says,
    "Function": within(Doubled.apply),
    "Function without tangents": lambda x: without_tangents(x) * x,
    "copies of columns": copies_of_columns,
    "views of rows": views_of_rows,
    "pointwise": within(lambda x: x * 2),
    "module": within(lambda x: LINEAR(x)),
    "view of an argument inside": within(lambda x: x.view(-1)[1:] * 2),
    "view of a result": within(lambda x: (lambda y: (y, y[0]))(x * 2)),
    "made of nothing": within(lambda x: torch.ones(3)),
    "written argument": within(lambda x: (x.add_(1), x * 2)[1]),
    "written and returned": within(lambda x: (x.add_(1), x, x * 2)[1:]),
    "nested": lambda x: jit(within(lambda x: x * 2))(x),
    "in a nested one": within(lambda x: jit(lambda x: x[0] * 2)(x)),
    "left again": left_again,
    "switched off": switched_off,
    "asks": asks,
}


@pytest.mark.parametrize(
    "way", [jit, lambda f: aot_function(f, "eager")], ids=["jit", "aot_function"]
)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_as_in_eager(name, way, active, around):
    f, found = FUNCTIONS[name], []
    compiled = way(f)
    for g in (f, compiled, compiled):
        x = torch.arange(9.0).view(3, 3).requires_grad_(active and "written" not in name)
        with torch.inference_mode(around):
            result = g(x)
        results = [*result, x] if isinstance(result, tuple) else [result, x]
        found.append([(t.is_inference(), t.requires_grad, t.detach().clone()) for t in results])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_tensors_made_inside_and_outside_of_the_mode_are_refused():
    def f(x):
        with torch.inference_mode():
            y = x * 2
        return y, x * 3

    def view(x):
        with torch.inference_mode():
            return x * 2, x[0]

    for g in (f, view):
        with pytest.raises(CaptureError, match="inference_mode"):
            jit(g)(torch.ones(3))
    with torch.inference_mode(), pytest.raises(CaptureError, match="switches inference mode"):
        jit(torch.inference_mode(False)(lambda x: x * 2))(torch.ones(3))


def twice_by_data(x):
    x.data.mul_(2)
    return x + 1


def twice_by_detach(x):
    d = x.detach()
    d.add_(1)
    return d * x


def twice_in_the_mode(x):
    with torch.inference_mode():
        x.mul_(2)
    return x + 1


WAYS = [
    jit,
    lambda f: aot_function(f, "eager"),
    aotfunc.functionalize,
    lambda f: lambda x: aotfunc.vjp(f, x)[0],
    lambda f: lambda x: make_fx(f)(within(torch.clone)(x))(x),
]


@pytest.mark.parametrize("f", [twice_by_data, twice_by_detach, twice_in_the_mode])
@pytest.mark.parametrize("on", [False, True])
def test_writes_to_inference_tensors(f, on):
    found = []
    for way in (lambda f: f, *WAYS):
        x = within(torch.arange)(3.0)
        with torch.inference_mode(on):
            result = way(f)(x)
        found.append((x, result, result.is_inference()))
    for got in found[1:]:
        assert_same(got, found[0])


def test_the_graph_of_a_write_to_the_data_of_a_leaf():
    """``make_fx``'s graph writes as the function does; a leaf itself may not be written to."""
    x, y = (torch.arange(3.0, requires_grad=True) for _ in range(2))
    got, want = make_fx(twice_by_data)(x.detach().clone().requires_grad_())(x), twice_by_data(y)
    assert_same((got, x), (want, y))
    got.sum().backward()
    assert_same(x.grad, torch.ones(3))
    held = torch.ones(3, requires_grad=True)
    make_fx(lambda x: twice_by_data(held) * x)(y)(y)
    assert_same(held, torch.full((3,), 2.0, requires_grad=True))


HELD = within(torch.ones)(3)


def answers(x, y):
    values = [x, x[0], x.detach(), x.data, x + 1, (x + 1)[0], y, y.view(-1)]
    values += [HELD, HELD[0], HELD * 2]
    with torch.inference_mode():
        values += [x[0], y[0], y * 2, HELD.t()]
    return x + y, sum(2**k for k, t in enumerate(values) if t.is_inference())


def test_what_arguments_are():
    """Calls with other kinds of tensors are other captures, in the same compiled function too."""
    plain, made = torch.ones(3), within(torch.ones)(3)
    inner = jit(answers)
    for f in (inner, jit(lambda *xs: inner(*xs)), aotfunc.functionalize(answers)):
        for xs in [(plain, plain), (plain, made), (made, plain), (made, made), (plain, plain)]:
            assert_same(f(*xs), answers(*xs))

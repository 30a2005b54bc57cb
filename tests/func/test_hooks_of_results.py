"""Hooks that a caller registers on what a transform returns act as with eager autograd, at first
and at second derivatives, or the backward is refused."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd import grad as gradient

from aotfunc import (
    aot_function,
    checkpoint,
    cond,
    functionalize,
    grad,
    grad_and_value,
    jacfwd,
    jacrev,
    jit,
    jvp,
    linearize,
    map,
    scan,
    vjp,
    vmap,
    while_loop,
)
from aotfunc.errors import AotfuncError
from tests.reference import assert_same
from tests.sweeps import every

X = torch.tensor([[0.3, 0.5, 0.2], [0.7, 0.25, 0.4], [0.6, 0.9, 0.35]], dtype=torch.float64)
T = X.flip(0) * 0.7


def bent(g):
    return g * g * 0.3 + g


def scalar(f):
    return lambda x: f(x).mean().exp()


def total(f):
    return lambda x: f(x).sum()


def hooked_inside(x):
    y = x.exp()
    y.register_hook(bent)
    return y.sin()


class Hooked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_full_backward_hook(lambda m, gi, go: (bent(gi[0]),))

    def forward(self, x):
        return x.exp()


MODULE = Hooked()
FUNCTIONS = {
    "exp": torch.exp,
    "reciprocal": lambda x: 1 / x,
    "softmax": lambda x: x.softmax(-1),
    "exp of sin": lambda x: x.sin().exp(),
    "product": lambda x: (x @ x.exp()).tanh(),
}


def by_gradient(f):
    return lambda x: gradient(f(x), x, create_graph=True)


def by_gradient_and_value(f):
    return lambda x: (*gradient(y := f(x), x, create_graph=True), y)


def by_pull(f):
    return lambda x: (y := f(x), *gradient(y, x, T, create_graph=True))


def by_push(f):
    def g(x):
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(x, T))))

    return g


def by_rows(f):
    def g(x):
        y = f(x)
        rows = [gradient(v, x, create_graph=True)[0] for v in y.reshape(-1)]
        return (torch.stack(rows).reshape(*y.shape, *x.shape),)

    return g


def twice(f):
    first = lambda x: gradient(f(x), x, create_graph=True)[0].sum()
    return lambda x: gradient(first(x), x, create_graph=True)


def pulled(f, x):
    y, pull = vjp(f, x)
    return y, *pull(T)


def pushed(f, x):
    y, push = linearize(f, x)
    return y, push(T)


#: ``name: (the transform, eager's, how f is made, number of results)``
TRANSFORMS = {
    "grad": (lambda f: lambda x: (grad(f)(x),), by_gradient, total, 1),
    "grad_and_value": (grad_and_value, by_gradient_and_value, scalar, 2),
    "vjp": (lambda f: lambda x: pulled(f, x), by_pull, lambda f: f, 2),
    "jvp": (lambda f: lambda x: jvp(f, (x,), (T,)), by_push, lambda f: f, 2),
    "linearize": (lambda f: lambda x: pushed(f, x), by_push, lambda f: f, 2),
    "jacrev": (lambda f: lambda x: (jacrev(f)(x),), by_rows, lambda f: f, 1),
    "jacfwd": (lambda f: lambda x: (jacfwd(f)(x),), by_rows, lambda f: f, 1),
    "vmap of grad": (lambda f: lambda x: (vmap(grad(f))(x),), by_gradient, total, 1),
    "grad of grad": (lambda f: lambda x: (grad(lambda x: grad(f)(x).sum())(x),), twice, total, 1),
}
WAYS = {
    "plain": lambda transform, f: transform(f),
    "jit": lambda transform, f: jit(transform(f)),
    "of jit": lambda transform, f: transform(jit(f)),
    "aot": lambda transform, f: aot_function(transform(f), "eager"),
}
PLACES = ["input", "all", 0, 1]


def derivatives(f, place, order=2):
    """Return the results of ``f`` and the derivatives of a function of them, with hooks."""
    x = X.clone().requires_grad_()
    z = x * 1
    if place == "input":
        z.register_hook(bent)
    found = results = [*f(z)]
    for k, y in enumerate(results):
        if place in ("all", k):
            y.register_hook(bent)
    g = sum(y.sin().sum() for y in results)
    for k in range(order):
        g = g if k == 0 else (g * (1 + x.detach())).sum()
        (g,) = gradient(g, x, create_graph=k + 1 < order)
        found = [*found, g]
    return found


def agree(f, want, place, refused=False, order=2):
    apart = lambda x: want(x.view_as(x))  # hooks outside do not act in the transform's gradient
    try:
        got = derivatives(f, place, order)
    except AotfuncError as e:
        assert refused, e
        assert "a hook was registered on a result of a branch (cond, switch), loop" in str(e)
    else:
        assert_same(got, derivatives(apart, place, order), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name, way", every(2, [*itertools.product(TRANSFORMS, WAYS)]))
def test_of_a_transform(name, way, function):
    transform, eager, made, count = TRANSFORMS[name]
    if (name, function) == ("vmap of grad", "product"):
        pytest.skip("its rows are no samples")
    if function == "softmax" and eager is by_push:
        pytest.skip("PyTorch's forward mode writes to what autograd has saved")
    f = made(FUNCTIONS[function])
    for place in PLACES[: 2 if count == 1 else 4]:
        # one node of autograd has value and gradient, or a partition computes the value again
        refused = name == "grad_and_value" and place in ("all", 1) and way in ("plain", "of jit")
        refused = refused or (name == "vjp" and place in ("all", 0) and way == "of jit")
        agree(WAYS[way](transform, f), eager(f), place, refused)


@pytest.mark.parametrize("way", ["plain", "jit", "of jit"])
@pytest.mark.parametrize("function", [hooked_inside, MODULE])
def test_hooks_inside_act_in_the_transform(function, way):
    """They act in the gradient that the transform takes, and in none of the gradient."""
    got = WAYS[way](lambda f: lambda x: (grad(f)(x),), total(function))(X)
    x = X.clone().requires_grad_()
    assert_same(got, gradient(function(x * 1).sum(), x))


#: results that are equal to one another or to what others are computed from
TWINS = {
    "product": lambda x: ((x * x).sin(), x * x),
    "saved": lambda x: (x.exp().sin(), x.exp()),
    "two saved": lambda x: (x.exp(), x.exp()),
    "two products": lambda x: (x * x, x * x),
    "read": lambda x: (y := x.exp(), y.sin()),
    "another op": lambda x: (1 / x, (1 / x).sin()),
}
PASSED_ON = {
    "vmap": vmap,
    "functionalize": functionalize,
    "vjp": lambda f: lambda x: vjp(f, x)[0],
    "aux": lambda f: lambda x: grad(lambda x: (x.sum() * 0, f(x)), has_aux=True)(x)[1],
    "cond": lambda f: lambda x: cond(torch.tensor(True), f, f, x),
    "checkpoint": checkpoint,
    "jit of vmap": lambda f: jit(vmap(f)),
    "vmap of jit": lambda f: vmap(jit(f)),
}


@pytest.mark.parametrize("name, way", every(2, [*itertools.product(TWINS, PASSED_ON)]))
def test_of_equal_results(name, way):
    for place in ("all", 0, 1):
        agree(PASSED_ON[way](TWINS[name]), TWINS[name], place, order=3)


STEPS = {
    "tanh": lambda c, x: ((c + x).tanh(), c.exp()),
    "sin": lambda c, x: ((c * x).sin(), c * x),
    "the same": lambda c, x: (y := (c * x).tanh(), y),
    "of the carry": lambda c, x: (y := c * x, y.sin()),
}


def loop(step):
    def f(x):
        c, ys = x.sum(0) * 0.1, []
        for row in x:
            c, y = step(c, row)
            ys.append(y)
        return c, torch.stack(ys)

    return f


def by_while(step):
    body = lambda state: (state[0] + 1, step(state[1], state[1])[0])
    return lambda x: while_loop(lambda state: state[0] < 3, body, (torch.tensor(0), x * 0.1))[1:]


def looped(step):
    def f(x):
        x = x * 0.1
        for _ in range(3):
            x = step(x, x)[0]
        return (x,)

    return f


@pytest.mark.parametrize("way", [lambda f: f, jit])
@pytest.mark.parametrize("name", STEPS)
def test_of_a_loop(name, way):
    step = STEPS[name]
    for place in PLACES:
        refused = place in ("all", 0) and name != "sin"
        agree(way(lambda x: scan(step, x.sum(0) * 0.1, x)), loop(step), place, refused)
    rows = lambda f, over: lambda x: (over(lambda r: f(r, r)[0], x),)
    in_order = lambda f, x: torch.stack([f(r) for r in x])
    agree(way(rows(step, map)), rows(step, in_order), "all")
    if way is not jit:
        agree(by_while(step), looped(step), "all", name in ("tanh", "the same"))


@pytest.mark.parametrize("name", ["grad", "vjp", "grad_and_value"])
@pytest.mark.parametrize("keep", [True, False])
def test_of_retained_gradients(name, keep):
    transform, eager, made, _ = TRANSFORMS[name]

    def kept(f):
        x = X.clone().requires_grad_()
        results = f(x * 1)
        for y in results:
            y.retain_grad()
        handle = results[0].register_hook(bent)
        if not keep:
            handle.remove()
        sum(y.sin().sum() for y in results).backward()
        return x.grad, [y.grad for y in results]

    for f in map_values(made, ("exp", "softmax")):
        for way in (transform, lambda f: jit(transform(f))):
            try:
                got = kept(way(f))
            except AotfuncError as e:
                assert name == "grad_and_value" and "a hook was registered" in str(e)
            else:
                assert_same(got, kept(eager(f)), rtol=1e-7, atol=1e-9)


def map_values(made, names):
    return [made(FUNCTIONS[n]) for n in names]


def test_a_gradient_that_is_written_to():
    """It is a saved value here, and none in eager mode."""

    def second(f, write):
        x = X.clone().requires_grad_()
        (g,) = f(x * 1)
        write(g)
        return gradient(g.sin().sum(), x)

    f = total(torch.exp)
    for write in (lambda g: g.mul_(2), lambda g: g.data.mul_(2), lambda g: g.detach().zero_()):
        want = second(by_gradient(f), write)
        assert_same(second(lambda x: (grad(f)(x),), write), want)
        assert_same(second(jit(lambda x: (grad(f)(x),)), write), want)


@pytest.mark.parametrize("f", [torch.prod, scalar(torch.exp)])
def test_of_a_value_that_eager_saves(f):
    """Eager's derivative reads the product, ours its factors."""

    def second(value_and_gradient, hook, size):
        x = torch.full(size, 0.7, dtype=torch.float64, requires_grad=True)
        value, g = value_and_gradient(x * 1)
        if hook:
            value.register_hook(bent)
        return gradient(g.sin().sum() + value, x)

    ours = (lambda x: vjp_of_one(f, x), lambda x: grad_and_value(f)(x)[::-1])
    for way, hook, size in itertools.product(ours, (False, True), ((), (2,))):
        want = second(lambda x: (y := f(x), *gradient(y, x, create_graph=True)), hook, size)
        try:
            assert_same(second(way, hook, size), want, rtol=1e-7, atol=1e-9)
        except AotfuncError as e:
            assert hook and f is torch.prod and "a hook was registered" in str(e)


def vjp_of_one(f, x):
    y, pull = vjp(f, x)
    return y, *pull(torch.ones_like(y))

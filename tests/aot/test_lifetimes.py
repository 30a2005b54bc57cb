"""What a compiled function keeps alive: nothing of its caller's but what its function holds
now."""

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aotfunc import (
    aot_function,
    aot_module,
    cond,
    grad,
    hessian,
    jit,
    linearize,
    scan,
    vjp,
    vmap,
)
from aotfunc.api.custom import CustomFunction
from aotfunc.errors import CaptureError

COMPILERS = {"jit": jit, "aot_function": lambda f: aot_function(f, "eager")}
X = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def without_the_garbage_collector():
    jit(torch.sin)(
        torch.ones(3, requires_grad=True)
    ).sum().backward()  # imports Dynamo, which keeps frames in cycles
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("compiled", COMPILERS.values(), ids=COMPILERS)
@pytest.mark.parametrize("backward", [False, True])
def test_rebound_closure(compiled, backward):
    w = torch.randn(3, 3, requires_grad=backward)

    def f(x):
        return (x @ w).sum()

    g, old = compiled(f), []
    for _ in range(20):
        torch.testing.assert_close(g(X), f(X))
        if backward:
            g(X).backward()
        old.append(weakref.ref(w))
        w = (w.detach() * 0.9).requires_grad_(backward)
        assert old[-1]() is None
    assert g.captures == 1


@pytest.mark.parametrize("compiled", COMPILERS.values(), ids=COMPILERS)
def test_rebound_attributes_and_elements(compiled):
    m, box = (
        nn.Linear(3, 3),
        SimpleNamespace(ws=[torch.ones(3)], d={"a": torch.ones(3)}, t=(torch.ones(3), 1.0)),
    )

    def f(x):
        return m(x) * box.ws[0] + box.d["a"] * box.t[0]

    g = compiled(f)
    for change in (
        lambda: setattr(m, "weight", nn.Parameter(torch.randn(3, 3))),
        lambda: box.ws.__setitem__(0, torch.randn(3)),
        lambda: setattr(box, "ws", [torch.randn(3)]),
        lambda: setattr(box, "d", {"a": torch.randn(3)}),
        lambda: setattr(box, "t", (torch.randn(3), 1.0)),
    ):
        old = [weakref.ref(t) for t in (m.weight, box.ws[0], box.d["a"], box.t[0])]
        torch.testing.assert_close(g(X), f(X))
        change()
        assert sum(r() is None for r in old) == 1
        torch.testing.assert_close(g(X), f(X))
    assert g.captures == 1


@pytest.mark.parametrize("compiled", COMPILERS.values(), ids=COMPILERS)
def test_modules_and_objects_passed_once(compiled):
    class Box:
        def __init__(self, k, w):
            self.k, self.w = k, w

    g, seen = compiled(lambda x, m, box: m(x) * box.k * box.w), []
    for i in range(6):
        m, box = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)), Box(float(i % 2), torch.randn(3))
        torch.testing.assert_close(g(X, m, box), m(X) * box.k * box.w)
        seen += [weakref.ref(x) for x in (m, m[0], m[0].weight, box, box.w)]
        del m, box
        assert all(r() is None for r in seen)
    assert g.captures == 2  # modules of one architecture are one signature


@pytest.mark.parametrize("compiled", COMPILERS.values(), ids=COMPILERS)
def test_an_entry_goes_with_an_object_that_it_knows_by_identity(compiled):
    class Opaque:
        pass

    first = Opaque()
    g = compiled(lambda x, o: x * 2 if o is first else x * 3)
    torch.testing.assert_close(g(X, first), X * 2)
    for _ in range(50):  # many have the same address
        torch.testing.assert_close(g(X, Opaque()), X * 3)
        assert len(g.entries) == 1
    torch.testing.assert_close(g(X, first), X * 2)


def test_replaced_modules():
    m = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    g = jit(m)
    g(X)
    old = weakref.ref(m[0]), weakref.ref(m[0].weight)
    m[0] = nn.Linear(3, 3)
    assert old[0]() is None and old[1]() is None
    torch.testing.assert_close(g(X), m(X))
    assert g.captures == 1


def test_the_compiled_function_itself():
    def made():
        w = torch.ones(3)
        f = lambda x: x * w
        g = jit(f)
        g(X)
        return weakref.ref(w), weakref.ref(f), weakref.ref(g)

    seen = made()
    gc.collect()  # functools.update_wrapper and its entries
    assert [r() for r in seen] == [None, None, None]


def test_results_and_arguments():
    g = jit(lambda x: (x * 2, x.sum()))
    x = torch.ones(3)
    y, z = g(x)
    seen = weakref.ref(x), weakref.ref(y), weakref.ref(z)
    del x, y, z
    assert [r() for r in seen] == [None, None, None]


def test_aot_module():
    m = aot_module(nn.Linear(3, 3), "eager")
    m(X).sum().backward()
    seen = weakref.ref(m.orig_module.weight)
    m.orig_module.weight = nn.Parameter(torch.ones(3, 3))
    assert seen() is None
    torch.testing.assert_close(m(X), X @ torch.ones(3, 3) + m.orig_module.bias)


def test_constants_made_inside_are_the_entrys_own():
    g = jit(lambda x: x * torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(3):
        torch.testing.assert_close(g(X), X * torch.tensor([1.0, 2.0, 3.0]))


def test_residuals_are_free_when_the_backward_has_read_them():
    alive = []

    def compiler(gm, example_inputs):
        def run(values):
            refs = [weakref.ref(v) for v in values]
            outs = gm(*values)
            values.clear()
            alive.append([r() is not None for r in refs])
            return outs

        run._boxed_call = True
        return run

    w = torch.randn(3, 3, requires_grad=True)
    f = aot_function(lambda x: (x @ w).sin().exp(), "eager", compiler)
    out = f(X)
    out.backward(torch.ones(2, 3), retain_graph=True)
    out.backward(torch.ones(2, 3))
    torch.testing.assert_close(w.grad, 2 * torch.autograd.grad((X @ w).sin().exp().sum(), w)[0])
    *residuals, cotangent = alive.pop()
    assert cotangent and sum(residuals) == 1  # X is the caller's
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(torch.ones(2, 3))


def test_each_part_of_a_call_keeps_what_its_gradients_read():
    counts = []

    def compiler(gm, example_inputs):
        def run(*values):
            counts.append(len(values))
            return gm(*values)

        return run

    w, v = (torch.randn(3, 3, requires_grad=True) for _ in "wv")
    f = lambda w, v: ((X @ w).sin(), (X @ v).exp())
    a, b = aot_function(f, "eager", compiler)(w, v)
    (2 * a).sum().backward()
    (3 * b).sum().backward()
    assert counts == [3, 3]  # X, one value, the cotangent
    a, b = f(w, v)
    expected = torch.autograd.grad((2 * a).sum() + (3 * b).sum(), (w, v))
    torch.testing.assert_close((w.grad, v.grad), expected)


def of_rules(rules, w):
    """A function with these rules, each of which closes over ``w``."""
    f = CustomFunction(lambda x: x.sin() * w, ())
    again = weakref.proxy(f)
    if "vjp" in rules:
        f.defvjp(lambda x: (x.sin() * w, x.cos()), lambda cos, g: (g * cos * w,))
    if "jvp" in rules:
        f.defjvp(lambda p, t: (p[0].sin() * w, t[0] * again(p[0] + math.pi / 2)))
    if "vmap" in rules:
        f.def_vmap(lambda size, in_batched, x: (x.sin() * w, True))
    return f


CALLS = {
    "call": lambda f: f,
    "vmap": vmap,
    "grad": lambda f: grad(lambda x: f(x).sum()),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).sum())),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).sum()),
    "vmap of hessian": lambda f: vmap(hessian(lambda x: f(x).sum())),
    "grad of scan": lambda f: grad(
        lambda x: scan(lambda c, _: (f(c), None), x, None, length=3)[0].sum()
    ),
    "cond": lambda f: lambda x: cond(x.sum() > 0, f, torch.cos, x),
    "linearize": lambda f: lambda x: vmap(linearize(f, x)[1])(x.expand(2, 2, 3)),
}


@pytest.mark.parametrize("compiled", [jit, lambda f: f], ids=["jit", "not compiled"])
@pytest.mark.parametrize("transform", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("rules", ["vjp", "jvp", "vmap", "vjp jvp vmap"])
def test_what_rules_close_over(rules, transform, compiled):
    w = torch.ones(3)
    f = of_rules(rules, w)
    torch.testing.assert_close(compiled(transform(f))(X), transform(lambda x: x.sin() * w)(X))
    gone, w = weakref.ref(w), None
    assert gone() is not None
    del f
    assert gone() is None


def test_rules_of_a_function_made_inside_are_there_for_later_batches():
    w = torch.full((3,), 2.0)
    f = jit(lambda x: of_rules("vmap", w)(x))
    _, pulled = vjp(of_rules("jvp vmap", w), X)
    f(X)
    torch.testing.assert_close(vmap(f)(X), X.sin() * w)
    torch.testing.assert_close(vmap(pulled)(X.expand(4, 2, 3))[0][0], X.cos() * w)


def stepping(net):
    def step(x):
        net.zero_grad()
        net(x).square().sum().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad

    return step


@pytest.mark.parametrize("compiled", COMPILERS.values(), ids=COMPILERS)
def test_a_training_step(compiled):
    """Its first capture is begun anew, with gradients."""
    net = nn.Linear(3, 3)
    step, x = compiled(stepping(net)), torch.ones(2, 3)
    step(x)
    old = [weakref.ref(t) for t in (x, net.weight, net.weight.grad)]
    net.weight, x = nn.Parameter(torch.ones(3, 3)), torch.zeros(2, 3)
    step(x)
    assert [r() for r in old] == [None] * 3


@pytest.mark.parametrize("compiled", COMPILERS.values(), ids=COMPILERS)
@pytest.mark.parametrize("ask", [lambda y: y.grad, lambda y: y.grad_fn, lambda y: y.tolist()])
def test_a_refused_capture(compiled, ask):
    def refused():
        y, x = torch.ones(3, requires_grad=True) * 2, torch.ones(3)
        f = compiled(lambda x: (x, ask(y)))
        with pytest.raises(CaptureError):
            f(x)
        return weakref.ref(x), weakref.ref(y)

    assert [r() for r in refused()] == [None] * 2

"""Random numbers and state inside compiled functions: fresh on each call, eager's stream, never
drawn again."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotfunc import functionalize, jit, jvp, linearize, vjp
from tests.aot.compilers import Watched
from tests.aot.test_training import COMPILED
from tests.reference import assert_same


def ones(n=60):
    return torch.ones(n, dtype=torch.float64)


def seeded(f, *args):
    torch.manual_seed(7)
    return f(*args)


PROGRAMS = {
    "dropout": lambda x: F.dropout(x * x, 0.5).sin(),
    "noise": lambda x: (x * torch.randn_like(x)).exp() * torch.rand(x.shape, dtype=x.dtype),
    "a draw for nothing": lambda x: (torch.rand(3), F.dropout(x**4, 0.3))[1],
    "alpha dropout": lambda x: F.alpha_dropout(x.sin(), 0.4, True),
    "rrelu": lambda x: F.rrelu(x - 1.5, training=True) * x,
    "bernoulli": lambda x: torch.bernoulli(x * 0.5) * x * x,
}


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_eager_under_a_seed(name, compiled):
    f = PROGRAMS[name]
    g, x = COMPILED[compiled](f), ones().requires_grad_()

    def both(f):
        y = f(x)
        return y, torch.autograd.grad(y.sum(), x)[0], torch.rand(2)

    assert_same(seeded(both, g), seeded(both, f))
    assert not torch.equal(g(x), g(x))


@pytest.mark.parametrize("name", ["dropout", "noise", "a draw for nothing"])
def test_second_order_sees_the_same_draws(name):
    f, x = PROGRAMS[name], ones().requires_grad_()

    def second(f):
        y = f(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        (k,) = torch.autograd.grad(h.sum(), x)
        return y, g, h, k, torch.rand(2)  # and the stream goes on where eager's would

    assert_same(seeded(second, jit(f)), seeded(second, f))


def test_second_order_past_a_draw_that_nobody_reads():
    """The draw stays in the gradient's program, and so does what it reads."""
    c = torch.randn(3, dtype=torch.float64)

    def f(x):
        y = x.sin() * x
        y.add_(c)
        torch.rand_like(y)
        return y

    def second(f):
        x = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)

    assert_same(second(jit(f)), second(f))


def test_generator_of_ones_own():
    gen, x = torch.Generator(), ones().requires_grad_()

    def run(f):
        gen.manual_seed(3)
        (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        return g, torch.autograd.grad(g.sum(), x)[0], torch.rand(2, generator=gen)

    f = lambda x: torch.rand(x.shape, generator=gen, dtype=x.dtype) * x**3
    assert_same(run(jit(f)), run(f))


@pytest.mark.parametrize("compiled", ["aot_function", "aot_function, min-cut"])
def test_a_draw_is_not_in_the_backward(compiled):
    from aotfunc import aot_function, default_partition, min_cut_rematerialization_partition

    w = Watched()
    partition = min_cut_rematerialization_partition if "min-cut" in compiled else default_partition
    x = ones().requires_grad_()
    aot_function(PROGRAMS["dropout"], w.compiler, partition_fn=partition)(x).sum().backward()
    forward, backward = w.modules
    assert "dropout" in forward.code or "bernoulli" in forward.code
    assert "dropout.default" not in backward.code and "bernoulli" not in backward.code


def test_buffers_are_updated():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += 1
            return self.norm(x) * self.calls

    net, x = Net().double(), torch.randn(5, 3, dtype=torch.float64)
    twin = copy.deepcopy(net)
    g = jit(net)
    for i in range(4):
        with torch.set_grad_enabled(i % 2 == 0):
            assert_same(g(x), twin(x))
        assert_same(net.state_dict(), twin.state_dict())
    assert net.calls == 4
    net.eval(), twin.eval()
    assert_same(g(x), twin(x))
    assert_same(net.state_dict(), twin.state_dict())


def test_no_grad_around_a_call():
    net, x = nn.Linear(3, 3), torch.randn(2, 3)
    g = jit(net)
    with torch.no_grad():
        assert not g(x).requires_grad
    g(x).sum().backward()
    assert net.weight.grad is not None
    y = g(x)
    with torch.no_grad():
        y = g(y)
    assert not y.requires_grad


def test_threads():
    f, wrong = jit(lambda x, k: (x * k).sin().sum()), []

    def work(i):
        try:
            for k in range(12):
                x = torch.full((3,), float(i), requires_grad=True)
                f(x, k % 4).backward()
                assert_same(x.grad, (x.detach() * (k % 4)).cos() * (k % 4))
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong, wrong[0]


def marked(f):
    """With a derivative that autograd, run over the ops, would not see."""
    return lambda x: f(x) * x.detach()


NESTED = {
    "jit in jit": lambda f: (lambda j: jit(lambda x: j(x)))(jit(f)),
    "jit in jit, more around": lambda f: (lambda j: jit(lambda x: j(x * 1) + 0))(jit(f)),
    "functionalize": functionalize,
    "functionalize of marks": lambda f: functionalize(marked(f)),
    "marks in jit in functionalize": lambda f: functionalize(jit(marked(f))),
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("around", NESTED)
@pytest.mark.parametrize("name", ["dropout", "noise", "a draw for nothing"])
def test_nested_calls_draw_once(name, around, order):
    """A call inside a call draws once, and a backward that runs the function again sees the draws
    of the forward."""
    f = PROGRAMS[name]
    g, plain, x = NESTED[around](f), marked(f) if "marks" in around else f, ones().requires_grad_()

    def all_of_it(f):
        y = f(x)
        torch.rand(1)  # the state has gone on when the backward runs
        (d,) = torch.autograd.grad(y.sum(), x, create_graph=order == 2)
        return y, d, torch.autograd.grad(d.sum(), x)[0] if order == 2 else None, torch.rand(2)

    for _ in range(2):
        assert_same(seeded(all_of_it, g), seeded(all_of_it, plain))


TRANSFORMS = {
    "jvp": lambda f, x: jvp(f, (x,), (x * 2,)),
    "vjp": lambda f, x: vjp(f, x)[1](x),
    "linearize": lambda f, x: linearize(f, x)[1](x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_compiled_function_draw_once(transform):
    x, f = ones(), PROGRAMS["noise"]
    assert_same(
        *(seeded(lambda g: (TRANSFORMS[transform](g, x), torch.rand(2)), g) for g in (jit(f), f))
    )

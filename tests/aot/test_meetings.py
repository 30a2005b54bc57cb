"""Backwards of the user's that are not linear get the sum of all cotangents under a second
derivative, as in eager, though these come from a compiled call and from its gradient."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_function, jit, make_fx
from aotfunc.errors import AotfuncError
from tests.reference import assert_same

WAYS = {
    "aot": lambda f: aot_function(f, "eager"),
    "cpp": lambda f: aot_function(f, "cpp"),
    "jit in jit": lambda f: (lambda j: jit(lambda *xs: j(*xs)))(jit(f)),
}


def function(backward, forward=lambda ctx, x: x.view_as(x)):
    name, methods = "Bent", {"forward": forward, "backward": backward}
    each = {k: staticmethod(v) for k, v in methods.items()}
    return type(name, (torch.autograd.Function,), each).apply


def saving(ctx, x):
    ctx.save_for_backward(x)
    return x * 2


clipped = function(lambda ctx, g: g.clamp(-0.5, 0.5))
soft = function(lambda ctx, g: g.tanh(), saving)
scaled = function(lambda ctx, g: (g / (1 + g.abs().sum())) * ctx.saved_tensors[0], saving)
shifted = function(lambda ctx, g: g + 1)
own = function(
    lambda ctx, g: g.tanh() * ctx.saved_tensors[0],
    lambda ctx, x: (y := x.exp(), ctx.save_for_backward(y))[0],
)
linear = function(lambda ctx, g: torch.where(ctx.saved_tensors[0] > 0.5, -g * 3, 0.0), saving)
two = function(lambda ctx, g, h: g * h if h is not None else g, lambda ctx, x: (x.sin(), x.cos()))


def hooked(x):
    h = x.sin()
    h.register_hook(lambda g: g.clamp(-h.detach().abs(), h.detach().abs()))
    return h.exp()


def hooked_and_saved(x):
    h = x.exp()
    h.register_hook(lambda g: g * g * h.detach())
    return h.sin()


def beside_a_hook(x):
    h = x.exp()
    h.register_hook(lambda g: g * g * h.detach())
    k = h * x
    k.register_hook(lambda g: g * g)
    return k.sin()


def weighted(h):
    d = h.detach()
    h.register_hook(lambda g: g * d)
    return h


def an_equal_op_before(x):
    k, h = x.exp(), x.exp()
    return weighted(h).sin() * k


def an_equal_write(x):
    return weighted((x * 1).exp_()).sin() * (x * 1).exp()


def module_hook(x):
    m = nn.Tanh()
    m.register_full_backward_hook(lambda m, gi, go: ((gi[0] * x.detach()).clamp(-0.3, 0.3),))
    return m(x * 2).exp()


def linear_module_hook(module):
    def f(x):
        m = module()
        m.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))
        return m(x * 1.0)

    return f


def a_result_too(x):
    h = soft(x.sin())
    return h, h.exp() * x


PROGRAMS = {
    "clipped": lambda x: clipped(x.sin()).exp(),
    "soft": lambda x: soft(x.sin()).exp() * x,
    "reads what it saved": lambda x: scaled(x.sin()).exp(),
    "affine": lambda x: shifted(x.sin()).exp(),
    "linear": lambda x: linear(x.sin()).exp(),
    "the result": lambda x: soft(x.sin()),
    "the result, saved": lambda x: own(x.sin()),
    "of the argument": lambda x: clipped(x).exp(),
    "one after another": lambda x: soft(clipped(x.sin()).exp()).cos(),
    "two results of it": lambda x: (lambda a, b: (a * b).exp())(*two(x)),
    "two results": lambda x: (lambda h: (h.exp(), h.cos() * x))(soft(x.sin())),
    "a result too": a_result_too,
    "in a checkpoint": lambda x: checkpoint(
        lambda x: soft(x.sin()).exp(), x * 2, use_reentrant=False
    ),
    "a gradient inside": lambda x: torch.autograd.grad(
        soft(x.sin()).exp().sum(), x, create_graph=True
    )[0].sin(),
    "a hook": hooked,
    "a hook of a saved result": hooked_and_saved,
    "a hook beside one that autograd calls": beside_a_hook,
    "a hook of an op with an equal": lambda x: weighted(x.exp()).sin() * x.exp(),
    "a hook of an op with an equal before": an_equal_op_before,
    "a hook of a write with an equal": an_equal_write,
    "hooks of both": lambda x: weighted(x.tanh()).sin() * weighted(x.tanh()).cos(),
    "a hook, and results": lambda x: (weighted(x.tanh()).sin(), x.tanh()),
    "hooks of hooked values": lambda x: (lambda h: (own(weighted(h.exp())).tanh(), h.exp()))(
        weighted(x.tanh())
    ),
    "a hook of one of several": lambda x: (
        lambda a, b: weighted(a[0]).sin() * b[0] + a[1] * b[1] * x
    )(torch.std_mean(x), torch.std_mean(x)),
    "a hook of a module": module_hook,
    "a linear hook of a module": linear_module_hook(nn.Tanh),
    "a linear hook of another": linear_module_hook(nn.Softplus),
}


def derivatives(f, third=False):
    x = torch.linspace(0.3, 1.1, 3, dtype=torch.float64).requires_grad_()
    outs = f(x * 1)
    outs = outs if isinstance(outs, tuple) else (outs,)
    (g,) = torch.autograd.grad(sum(y.sin().sum() for y in outs), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=third)
    first = torch.autograd.grad(f(x * 2)[0].sum(), x)
    return outs, g, h, first, third and torch.autograd.grad(h.sum(), x)


@pytest.mark.filterwarnings("ignore:.*ull backward hook is firing")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_backward_that_is_not_linear(name):
    assert_same(derivatives(jit(PROGRAMS[name])), derivatives(PROGRAMS[name]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["soft", "a result too"])
def test_compiled_otherwise_and_the_third_derivative(name, way):
    assert_same(derivatives(WAYS[way](PROGRAMS[name]), True), derivatives(PROGRAMS[name], True))


def between_hooks(x, y):
    h = (x * y).sin()
    h.register_hook(lambda g: g * 2)
    h = clipped(h)
    k = h * x
    k.register_hook(lambda g: g * 3)
    return k * h, h.exp()


class Leaky(nn.Module):
    def forward(self, x):
        self.x = x
        return x.tanh()


def module_of_two(x, y, leak=False):
    m = Leaky()
    m.register_full_backward_hook(lambda m, gi, go: ((gi[0] * x.detach()).clamp(-0.3, 0.3),))
    h = m(x * 2)
    return h.exp(), (m.x if leak else h) * y


def written(x, y):
    h = soft(x.sin())
    y.mul_(h)
    return h.exp(), y * h


#: their results are nodes of their own, as ``y`` has a graph, and have a Function in common
OF_TWO = {
    "a Function": lambda x, y: (lambda h: (h.exp(), h.cos() * y))(soft(x.sin())),
    "the result too": lambda x, y: (lambda h: (h, h.cos() * y))(own(x.sin())),
    "one after another": lambda x, y: (
        lambda h: (lambda k: (k * h, k.cos() * y))(clipped(h.exp()))
    )(soft(x.sin())),
    "two results of it": lambda x, y: (lambda a, b: (a * 1, b * y))(*two(x.sin())),
    "between hooks": between_hooks,
    "a module": module_of_two,
    "a written argument": written,
}


def derivatives_of_two(f):
    x, y = (torch.full((3,), k, dtype=torch.float64, requires_grad=True) for k in (0.5, 0.7))
    a, b = f(x * 1, y * 1)
    first = torch.autograd.grad((a * b).sum(), (x, y), retain_graph=True)
    one = torch.autograd.grad(a.sum(), x)
    a, b = f(x * 1, y * 1)
    (g,) = torch.autograd.grad((a * b).sin().sum(), x, create_graph=True)
    return (a, b), first, one, torch.autograd.grad(g.square().sum(), (x, y))


@pytest.mark.filterwarnings("ignore:.*ull backward hook is firing")
@pytest.mark.parametrize("name", OF_TWO)
def test_of_two_nodes(name):
    assert_same(derivatives_of_two(jit(OF_TWO[name])), derivatives_of_two(OF_TWO[name]))


@pytest.mark.parametrize("way", WAYS)
def test_of_two_nodes_compiled_otherwise(way):
    f = OF_TWO["a Function"]
    assert_same(derivatives_of_two(WAYS[way](f)), derivatives_of_two(f))


@pytest.mark.filterwarnings("ignore:.*ull backward hook is firing")
def test_of_two_nodes_that_cannot_be_cut():
    f = jit(lambda x, y: module_of_two(x, y, leak=True))
    x, y = (torch.full((3,), k, requires_grad=True) for k in (0.5, 0.7))
    a, b = f(x * 1, y * 1)
    torch.autograd.grad(a.sum(), x, retain_graph=True)
    with pytest.raises(AotfuncError, match=r"whose backward is not linear.*return one result"):
        torch.autograd.grad((a * b).sum(), x)


def hooked_result(op):
    def f(x):
        h = op(x)
        h.register_hook(lambda g: g * 0.5)
        return h.sin()

    return f


@pytest.mark.parametrize(
    "f",
    [
        hooked_result(torch.exp),
        hooked_result(torch.tanh),
        hooked_result(lambda x: x * x),
        hooked_result(own),
        PROGRAMS["a hook of an op with an equal"],
        PROGRAMS["a hook of an op with an equal before"],
        lambda x: own(x).sin(),
        lambda x: (lambda a, b: a.sin() * b.exp() * a)(*two(x)),
    ],
)
def test_of_two_gradients_inside(f):
    def second(x):
        (g,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    x = torch.linspace(0.3, 1.1, 3, dtype=torch.float64).requires_grad_()
    for compiled in (jit(second), make_fx(second)(x)):
        assert_same(compiled(x), second(x))

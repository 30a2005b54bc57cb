"""torch.autograd.grad inside a transform, of tensors from outside that have a history there:
closed over, or passed to all samples alike; against a loop of plain autograd, in which everything
is outside."""

import pytest
import torch
from torch.autograd import grad as gradient

from aotfunc import grad, jit, make_fx, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same

torch.manual_seed(0)
W, X = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
G = torch.randn(2, 5, 4, dtype=torch.float64)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, g):
        return g * 3


def graph():
    """A leaf, a value computed from it, and one computed from both."""
    w = W.clone().requires_grad_()
    h = (X @ w).tanh()
    return w, h, Tripled.apply(h).sin() * w.mean()


#: of a leaf, an inner and an outer value of a graph, and a sample of a batch of cotangents
PROGRAMS = {
    "the leaf": lambda w, h, o, g: gradient(o, w, g, retain_graph=True),
    "an inner value": lambda w, h, o, g: gradient(o, [h, w], g, retain_graph=True),
    "the value itself": lambda w, h, o, g: gradient(o, [o, w], g, retain_graph=True),
    "several results": lambda w, h, o, g: gradient([o, h], [w, h], [g, g * 2], retain_graph=True),
    "the leaf as result": lambda w, h, o, g: gradient([o, w], [w], [g, w * 2], retain_graph=True),
    "computed on": lambda w, h, o, g: gradient((o * 2).exp(), [w, h], g, retain_graph=True),
    "by several ways": lambda w, h, o, g: gradient(
        (o * h * w.sum()).exp(), [w, h, o], g, retain_graph=True
    ),
    "by a batched value": lambda w, h, o, g: gradient(
        (o * g).exp().sum(), [w, h], retain_graph=True
    ),
    "unused": lambda w, h, o, g: gradient(h, [o, w], g, retain_graph=True, allow_unused=True)[1:],
    "zeros": lambda w, h, o, g: gradient(
        h * 2, [o, w], g, retain_graph=True, materialize_grads=True
    ),
    "again": lambda w, h, o, g: gradient(
        gradient(o, w, g, create_graph=True)[0].sin().sum(), [w], retain_graph=True
    ),
    "again, computed on": lambda w, h, o, g: gradient(
        gradient((o * h).exp(), w, g, create_graph=True)[0].sin().sum(), [w, h], retain_graph=True
    ),
    "three times": lambda w, h, o, g: gradient(
        gradient(gradient(o, w, g, create_graph=True)[0].sin().sum(), w, create_graph=True)[0]
        .cos()
        .sum(),
        [w],
        retain_graph=True,
    ),
}

PASSED = {
    "closed over": lambda f, w, h, o: vmap(lambda g: f(w, h, o, g))(G),
    "arguments": lambda f, w, h, o: vmap(f, (None, None, None, 0))(w, h, o, G),
    "an argument": lambda f, w, h, o: vmap(lambda o, g: f(w, h, o, g), (None, 0))(o, G),
    "arguments in chunks": lambda f, w, h, o: vmap(f, (None, None, None, 0), chunk_size=1)(
        w, h, o, G
    ),
    "two vmaps": lambda f, w, h, o: vmap(vmap(f, (None, None, None, 0)), (None, None, None, 1), 1)(
        w, h, o, G[:, None]
    ),
    "from the outer to the inner": lambda f, w, h, o: vmap(
        lambda w, h, o, g: vmap(lambda g: f(w, h, o, g))(g), (None, None, None, 1), 1
    )(w, h, o, G[:, None]),
}


def looped(f, w, h, o):
    return tuple(map(torch.stack, zip(*(f(w, h, o, g) for g in G), strict=True)))


@pytest.mark.parametrize("passed", PASSED)
@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients(name, passed):
    f, values = PROGRAMS[name], graph()
    want, got = looped(f, *values), PASSED[passed](f, *values)
    assert_same([g.reshape(t.shape) for g, t in zip(got, want, strict=True)], list(want))


OUTER = {
    "of a saved argument": lambda w, h, o, g: gradient(o, w, g, create_graph=True)[0].sin().sum(),
    "of a saved result": lambda w, h, o, g: gradient(h, w, g, create_graph=True)[0].sin().sum(),
    "computed on": lambda w, h, o, g: (
        gradient((o * h).exp(), w, g, create_graph=True)[0].sin().sum()
    ),
}


@pytest.mark.parametrize("passed", ["closed over", "arguments"])
@pytest.mark.parametrize("name", OUTER)
def test_the_results_are_differentiated_outside(name, passed):
    f, (w, h, o) = (lambda *values: (OUTER[name](*values),)), graph()
    want, got = looped(f, w, h, o), PASSED[passed](f, w, h, o)
    assert_same(gradient(got[0].sum(), w, retain_graph=True), gradient(want[0].sum(), w))


def a_batched_graph(w, h, o):
    return vmap(lambda o: gradient(o.sum(), w, retain_graph=True)[0])(o)


def batched_gradients(w, h, o):
    return vmap(
        lambda g: gradient(
            o * 2, w, torch.stack([g, g]), is_grads_batched=True, retain_graph=True
        )[0]
    )(G)


def an_argument_of_another_transform(w, h, o):
    return grad(lambda x, o: gradient((x * o).sum(), w, retain_graph=True)[0].sum())(h.detach(), o)


def compiled(w, h, o):
    return jit(lambda g: gradient(o * 2, w, g, retain_graph=True)[0])(G[0])


def compiled_around_vmap(w, h, o):
    return jit(lambda o, G: vmap(lambda g: gradient(o, w, g, retain_graph=True)[0])(G))(o, G)


def traced(w, h, o):
    return make_fx(lambda o, g: gradient(o * 2, w, g, retain_graph=True)[0])(o, G[0])


REFUSED = (
    a_batched_graph,
    batched_gradients,
    an_argument_of_another_transform,
    compiled,
    compiled_around_vmap,
    traced,
)


@pytest.mark.parametrize("f", REFUSED, ids=lambda f: f.__name__)
def test_refused(f):
    with pytest.raises(
        CaptureError,
        match=r"was computed there from one that is differentiated here.*test_outside_gra",
    ):
        f(*graph())


def test_a_sample_is_not_what_the_graph_was_computed_from():
    """It is a view of a batch; so it is with torch.func, where an argument of grad is another
    tensor, too."""
    w, h, o = graph()
    f = lambda h, g: gradient((o * g).sum(), [w, h], retain_graph=True, allow_unused=True)
    got = vmap(lambda h, g: f(h, g)[:1], (0, 0))(h[:2], G)
    assert_same(got[0], torch.stack([f(h, g)[0] for g in G]))
    assert vmap(lambda h, g: f(h, g)[1], (0, 0), None)(h[:2], G) is None
    assert_same(
        grad(lambda h: gradient((o * h.sin()).sum(), h, create_graph=True)[0].sum())(h),
        -o * h.sin(),
    )


@pytest.mark.parametrize("way", ["vmap", "jit", "make_fx", "written"])
def test_a_gradient_is_viewed_that_is_laid_out_otherwise_than_its_value(way):
    def f(x):
        o = x.transpose(0, 1) * 1
        (g,) = gradient((o.sin().contiguous().view(-1) ** 2).sum(), o)
        if way == "written":
            g.mul_(2)
        return g.view(6, 4)

    x = torch.randn(2, 3, 4, requires_grad=True)
    want = 2 * x.detach().sin() * x.detach().cos() * (2 if way == "written" else 1)
    run = {
        "vmap": lambda f: lambda x: vmap(f)(x[None])[0],
        "make_fx": lambda f: make_fx(f)(x),
    }.get(way, jit)
    assert_same(run(f)(x), want.transpose(0, 1).reshape(6, 4))
    assert_same(f(x), want.transpose(0, 1).reshape(6, 4))

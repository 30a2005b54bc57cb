"""Tensors are free as soon as the caller drops them: no transform leaves them in a reference
cycle."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import aotfunc as A
from tests.functions import Square


@contextmanager
def no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def lives_on(call) -> bool:
    """Whether an argument of ``call`` outlives a second call of it."""
    call(torch.rand(4))
    with no_collector():
        x = torch.rand(4)
        ref = weakref.ref(x)
        call(x)
        del x
        return ref() is not None


def hooked(x):
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda g: g * 3)
        y.retain_grad()
    return y.sum()


def inner_gradient(x):
    y = x.detach().requires_grad_()
    (y * y).sum().backward()
    return (y.grad * x).sum()


def writes(x):
    y = x.clone()
    y[1:].mul_(2)
    return y.sum()


FUNCTIONS = {
    "plain": lambda x: x.sin().sum(),
    "asks": lambda x: x.sum() * x.sum().item(),
    "custom": lambda x: Square.apply(x).sum(),
    "autograd.grad": lambda x: torch.autograd.grad((x**3).sum(), x, create_graph=True)[0].sum(),
    "backward": inner_gradient,
    "hook": hooked,
    "writes": writes,
    "checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=False).sum(),
    "nested": lambda x: A.grad(lambda y: A.vmap(torch.sin)(y).dot(x))(x).sum(),
    "compiled": lambda x: A.jit(torch.sin)(x).sum(),
}

TRANSFORMS = {
    "grad": lambda f: A.grad(f),
    "grad of grad": lambda f: A.grad(lambda x: A.grad(f)(x).sum()),
    "grad_and_value": lambda f: A.grad_and_value(lambda x: (f(x), x), has_aux=True),
    "vjp": lambda f: lambda x: A.vjp(f, x)[1](torch.tensor(1.0)),
    "jvp": lambda f: lambda x: A.jvp(f, (x,), (x.clone(),)),
    "linearize": lambda f: lambda x: A.linearize(f, x)[1](torch.ones(4)),
    "jacrev": lambda f: A.jacrev(f),
    "jacfwd": lambda f: A.jacfwd(f),
    "hessian": lambda f: A.hessian(f),
    "vmap": lambda f: lambda x: A.vmap(f)(x.expand(3, 4)),
    "chunks": lambda f: lambda x: A.vmap(f, chunk_size=2)(x.expand(3, 4)),
    "functionalize": lambda f: A.functionalize(f),
    "make_fx": lambda f: A.make_fx(f),
    "jit": lambda f: A.jit(f),
    "aot_function": lambda f: A.aot_function(f, "eager"),
    "backward": lambda f: (
        lambda x: torch.autograd.grad(A.jit(f)(x.requires_grad_()), x, create_graph=True)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_argument_is_free_when_the_caller_drops_it(name, transform):
    f = FUNCTIONS[name]
    compiled = transform in ("jit", "aot_function", "backward")
    if name == "asks" and (compiled or transform in ("vmap", "chunks")):
        f = lambda x: x.sum() * 2.0
    assert not lives_on(TRANSFORMS[transform](f))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, A.errors.CaptureError])
def test_an_argument_is_free_after_an_error(error, transform):
    def f(x):
        y = (x * 2).sin()
        if not calm:
            raise error("in the middle")
        return y.sum()

    calm = True
    call = TRANSFORMS[transform](f)
    call(torch.rand(4))
    calm = False
    with no_collector():
        x = torch.rand(4)
        ref = weakref.ref(x)
        try:
            call(x)
            raised = False
        except error:
            raised = True
        del x
        assert raised
        assert ref() is None


@pytest.mark.parametrize("transform", ["jit", "aot_function"])
def test_the_results_of_a_compiled_call_are_free_with_their_graph(transform):
    f = TRANSFORMS[transform](lambda x: (x.sin().exp(), x.cos()))
    f(torch.rand(4, requires_grad=True))[0].sum().backward()
    with no_collector():
        x = torch.rand(4, requires_grad=True)
        y, z = f(x)
        refs = [weakref.ref(t) for t in (x, y, z)]
        y.sum().backward()
        del x, y, z
        assert [r() for r in refs] == [None, None, None]


def test_an_argument_is_free_after_a_backward_that_is_differentiated():
    f = A.jit(lambda x: (x**3).sum())
    for _ in range(2):
        with no_collector():
            x = torch.rand(4, requires_grad=True)
            ref = weakref.ref(x)
            (g,) = torch.autograd.grad(f(x), x, create_graph=True)
            g.sum().backward()
            del x, g
            assert ref() is None


@pytest.mark.parametrize("transform", ["grad", "grad of grad", "hessian", "functionalize"])
def test_a_value_that_leaked_stays_usable(transform):
    kept = []

    def f(x):
        kept.append(x * 2)
        return (x**3).sum()

    call = TRANSFORMS[transform](f)
    x = torch.rand(4)
    call(x)
    expected = x * 2
    assert torch.equal(kept[-1] + 0, expected)
    ref = weakref.ref(x)
    with no_collector():
        del x
        kept.clear()
        assert ref() is None  # what kept it alive was the value that leaked

"""Instances of Tensor's subclasses without __torch_dispatch__: transforms compute with plain
tensors, as torch.func does; what a subclass changes is never lost without a word."""

import pytest
import torch

import aotfunc
from aotfunc import grad, hessian, jacfwd, jacrev, jit, jvp, linearize, make_fx, vjp, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Marked(torch.Tensor):
    """Adds a method and a property."""

    def doubled(self):
        return self * 2

    @property
    def first(self):
        return self[0]


class Strict(torch.Tensor):
    """Knows the functions that people call, and refuses aten's overloads."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverload):
            raise TypeError(f"Strict does not know {func}")
        return super().__torch_function__(func, types, args, kwargs or {})


class Negated(torch.Tensor):
    """Changes what an operator does."""

    def __add__(self, other):
        return super().__add__(-other)


class Bare(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


def square(x):
    return (x * x).sum()


V = torch.ones(3, dtype=torch.float64)
TRANSFORMS = {
    "grad": lambda a: grad(square)(a[0]),
    "vjp": lambda a: vjp(square, a[0])[1](torch.tensor(1.0, dtype=torch.float64)),
    "cotangent": lambda a: vjp(torch.sin, X[0])[1](a[0]),
    "jvp": lambda a: jvp(square, (a[0],), (V,)),
    "tangent": lambda a: jvp(square, (X[0],), (a[0],)),
    "linearize": lambda a: linearize(torch.sin, a[0])[1](a[1]),
    "jacrev": lambda a: jacrev(torch.sin)(a[0]),
    "jacfwd": lambda a: jacfwd(torch.sin)(a[0]),
    "hessian": lambda a: hessian(square)(a[0]),
    "vmap": lambda a: vmap(square)(a),
    "vmap, one for all": lambda a: vmap(torch.dot, (0, None))(X, a[0]),
    "a tree": lambda a: grad(lambda d, k: (d["x"] * k["y"]).sum())({"x": a[0]}, {"y": a[1]}),
    "a keyword": lambda a: vmap(lambda x, y: x * y)(X, y=a[0]),
    "nested": lambda a: vmap(grad(lambda x: grad(square)(x).sin().sum()))(a),
    "make_fx": lambda a: make_fx(torch.sin)(a[0])(X[0]),
    "closed over": lambda a: grad(lambda x: (a[0] * x).sum())(X[1]),
    "closed over by vmap": lambda a: vmap(lambda x: torch.dot(x, a[0]))(X),
}


@pytest.mark.parametrize("cls", [Marked, Strict, Negated, Bare, torch.nn.Parameter])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_plain_tensors_inside(name, cls):
    run, x = (
        TRANSFORMS[name],
        X.as_subclass(cls) if cls is not torch.nn.Parameter else torch.nn.Parameter(X),
    )
    if name.startswith("closed over") and cls in (Strict, Negated):
        with pytest.raises(
            CaptureError, match=rf"subclass {cls.__name__}, which changes .*as_subclass"
        ):
            run(x)
        return
    assert_same(run(x), run(X))


def test_methods_that_it_adds():
    outside = X[0].as_subclass(Marked)
    assert_same(
        grad(lambda r: (outside.doubled() * r).sum() * outside.first)(X[1]), 2 * X[0] * X[0, 0]
    )
    with pytest.raises(AttributeError, match="plain tensors inside"):
        grad(lambda r: (r * outside).doubled().sum())(X[1])
    with pytest.raises(AttributeError, match=r"'nothing'.*plain tensors inside"):
        vmap(lambda r: r.nothing)(X)


@pytest.mark.parametrize("cls", [Marked, Strict])
def test_written_and_differentiated_from_outside(cls):
    plain = X.clone()
    x = plain.as_subclass(cls)
    vmap(lambda r: r.mul_(2))(x)
    assert_same(plain, X * 2)
    w = X[0].clone().as_subclass(cls).requires_grad_()
    f, args = (lambda r: r * w, (X,)) if cls is Marked else (torch.mul, (X, w))
    vmap(f, (0, None)[: len(args)])(*args).sum().backward()
    assert_same(w.grad.as_subclass(torch.Tensor), X.sum(0))


@pytest.mark.parametrize("compiled", [jit, lambda f: aotfunc.aot_function(f, "eager")])
def test_compiled_functions(compiled):
    assert_same(compiled(torch.sin)(X.as_subclass(Marked)).as_subclass(torch.Tensor), X.sin())
    with pytest.raises(CaptureError, match=r"an argument is of the subclass Strict.*as_subclass"):
        compiled(torch.sin)(X.as_subclass(Strict))
    outside = X[0].as_subclass(Marked)
    with pytest.raises(
        CaptureError, match=r"a tensor from outside is of the subclass Marked.*as_subclass"
    ):
        compiled(lambda x: x * outside)(X)
    assert_same(
        compiled(lambda x: grad(square)(x * x))(X.as_subclass(Marked)).as_subclass(torch.Tensor),
        2 * X**2,
    )

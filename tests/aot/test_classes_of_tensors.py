"""What a function asks of the classes of its tensors: parameters, and instances of subclasses."""

import pytest
import torch
from torch import Tensor, nn

import aotfunc
from aotfunc import jit
from aotfunc.errors import CaptureError
from tests.aot.compiled_by import COMPILERS, every_compiler
from tests.reference import assert_same

X = torch.linspace(-1.0, 1.5, 4, dtype=torch.float64)


class Scaled(Tensor):
    factor = 3.0

    def scaled(self, by=1.0):
        return self * self.factor * by

    @property
    def first(self):
        return self[0]

    @staticmethod
    def offset():
        return 2.0

    @classmethod
    def doubled_factor(cls):
        return cls.factor * 2


class Further(Scaled):
    factor = 5.0


class Weight(nn.Parameter):
    def scaled(self):
        return self * 2


class Negated(Tensor):
    def __add__(self, other):
        return super().__add__(-other)


class Renamed(Scaled):
    def double(self):
        return self * 4


def by_parameter(x, y):
    return (
        x * (2 if isinstance(x, nn.Parameter) else 3) * (5 if isinstance(y, nn.Parameter) else 7)
    )


@every_compiler
def test_parameters_are_parameters(compiler):
    """Each class is another signature; what is computed from a parameter is none."""
    f = COMPILERS[compiler](by_parameter)
    flat = X.clone().requires_grad_()
    for _ in range(2):
        for x in (flat, nn.Parameter(X), X, nn.Parameter(X, False), Weight(X)):
            for y in (nn.Parameter(X), X):
                assert_same(f(x, y), by_parameter(x, y))
    g = COMPILERS[compiler](lambda x: [isinstance(t, nn.Parameter) for t in (x, x * 2, x.data)])
    assert g(nn.Parameter(X)) == [True, False, False]
    same = nn.Parameter(X)
    assert COMPILERS[compiler](lambda x: x)(same) is same


TRANSFORMS = {
    "grad": lambda A, f: A.grad(f),
    "vmap": lambda A, f: A.vmap(f, (0, None)),
    "vjp": lambda A, f: lambda *xs: A.vjp(f, *xs)[0],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_tell_what_torch_func_tells(name):
    p, f = nn.Parameter(X), lambda x, y: by_parameter(x, y).sum()
    assert_same(TRANSFORMS[name](aotfunc, f)(p, p), TRANSFORMS[name](torch.func, f)(p, p))


def test_in_a_compiled_function_inside():
    inner = jit(by_parameter)
    f = lambda x, y: inner(x, y) + inner(x * 1, y) * 10
    p = nn.Parameter(X)
    for x, y in ((p, X), (X, p), (p, p), (X, X)):
        assert_same(jit(f)(x, y), f(x, y))


METHODS = {
    "a method": lambda x: x.scaled(2.0),
    "a property": lambda x: x + x.first,
    "a class attribute": lambda x: x * x.factor,
    "a static method": lambda x: x * x.offset(),
    "a class method": lambda x: x * x.doubled_factor(),
    "hasattr": lambda x: x * (2 if hasattr(x, "scaled") else 3),
    "getattr": lambda x: x * getattr(x, "factor", 1.0) * getattr(x, "other", 7.0),
    "an attribute": lambda x: x * getattr(x, "tag", 11.0),
}


@every_compiler
@pytest.mark.parametrize("name", METHODS)
def test_what_a_subclass_adds(compiler, name, monkeypatch):
    f, body = COMPILERS[compiler](METHODS[name]), METHODS[name]
    tagged = X.as_subclass(Scaled)
    tagged.tag = 2.0
    for _ in range(2):
        for x in (X.as_subclass(Scaled), X.as_subclass(Further), tagged):
            got, want = f(x), body(x)
            assert type(got) is type(want)
            assert_same(got.as_subclass(Tensor), want.as_subclass(Tensor))
        monkeypatch.setattr(Scaled, "factor", 4.0)
        monkeypatch.setattr(Scaled, "offset", staticmethod(lambda: 9.0))
        tagged.tag = 3.0
    w = X.clone().requires_grad_()
    (got,) = torch.autograd.grad(f(w.as_subclass(Scaled)).sum(), w)
    (want,) = torch.autograd.grad(body(w.as_subclass(Scaled)).sum(), w)
    assert_same(got.as_subclass(Tensor), want.as_subclass(Tensor))


def test_a_method_of_a_subclass_of_parameter():
    p = Weight(X)
    assert_same(jit(lambda p: p.scaled())(p), X * 2)


@every_compiler
def test_results_have_their_classes(compiler):
    def f(x):
        return x * 2, torch.ones(3), x.view(2, 2), x, x.sum()

    x = X.as_subclass(Scaled)
    assert [*map(type, COMPILERS[compiler](f)(x))] == [*map(type, f(x))]


REFUSED = {
    "an operator": (lambda x: x + 1, Negated, "changes what tensors do"),
    "a method": (lambda x: x.double(), Renamed, "changes what tensors do"),
    "isinstance": (lambda x: x * (2 if isinstance(x, Scaled) else 3), Scaled, "looks at .Scaled"),
    "of a base": (lambda x: x * (2 if isinstance(x, Scaled) else 3), Further, "looks at .Scaled"),
    "type": (lambda x: x * type(x).factor, Scaled, "looks at .type"),
    "its class": (lambda x: x * x.__class__.factor, Scaled, "looks at .__class__"),
    "a value": (lambda x: (x * 2).scaled(), Scaled, "of a value computed from"),
    "of a value": (lambda x: x if hasattr(x * 2, "first") else x * 2, Scaled, "of a value"),
}


@every_compiler
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(compiler, name):
    f, cls, words = REFUSED[name]
    with pytest.raises(CaptureError, match=words):
        COMPILERS[compiler](f)(X.as_subclass(cls))

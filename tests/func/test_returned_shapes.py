"""Shapes among the results of a function are shapes, not tuples, whoever calls it."""

import copy

import pytest
import torch

from aotfunc import functionalize, grad, jit, make_fx

X = torch.ones(2, 3)
FUNCTIONS = {
    "alone": lambda x: x.shape,
    "tuple": lambda x: (x.shape, x * 2),
    "dictionary": lambda x: {"s": x.sum(0).shape, "x": x * 2},
    "twice": lambda x: [x.shape, [x.shape], x * 2],
}
CALLS = {
    "make_fx": lambda f: make_fx(f)(X),
    "make_fx of a tree": lambda f: lambda x: make_fx(lambda d: f(d["x"]))({"x": x})({"x": x}),
    "copied": lambda f: copy.deepcopy(make_fx(f)(X)),
    "make_fx in jit": lambda f: jit(make_fx(f)(X), backend="eager"),
    "jit": lambda f: jit(f, backend="eager"),
    "functionalize": functionalize,
    "aux": lambda f: lambda x: grad(lambda x: (x.sum(), f(x)), has_aux=True)(x)[1],
}


def kinds(tree):
    if type(tree) in (list, tuple):
        return [type(tree), *map(kinds, tree)]
    return {k: kinds(v) for k, v in tree.items()} if type(tree) is dict else type(tree)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes(name, call):
    f = FUNCTIONS[name]
    assert kinds(CALLS[call](f)(X)) == kinds(f(X))

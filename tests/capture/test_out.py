"""Tensors that a function makes and passes as ``out=`` are resized, as PyTorch does."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from aotfunc import functionalize, grad, jit, make_fx, vmap

pytestmark = pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
X = torch.tensor([3.0, 1.0, 2.0])


def one(x):
    out = torch.empty(0)
    same = torch.sin(x, out=out)
    assert same is out and out.shape == x.shape
    return out * 2, out


def several(x):
    values, places = torch.empty(0), torch.empty(0, dtype=torch.long)
    return torch.sort(x, out=(values, places))[1], values, places


def one_of_several(x):
    values, places = torch.empty(0), torch.empty(3, dtype=torch.long)
    torch.max(x.expand(2, 3).t(), 1, out=(values, places))
    return values, places


def of_another_dtype(x):
    out = torch.empty(0, dtype=torch.float64)
    torch.mul(x, x, out=out)
    return out


def smaller(x):
    out = torch.empty(2, 4)
    torch.sin(x, out=out)
    return out


def again(x):
    out, more = torch.empty(0), torch.empty(0)
    torch.cat([x, x], out=out)
    torch.cat([out, x], out=more)
    torch.mul(more, more, out=more)
    return more.add_(1), more.view(-1, 3)


def laid_out(x):
    out = torch.empty(0)
    torch.mm(x[:, None], x[None], out=out)
    return out.t(), out


PROGRAMS = [one, several, one_of_several, of_another_dtype, smaller, again, laid_out]
CALLS = {
    "jit": lambda f: jit(f, backend="eager"),
    "functionalize": functionalize,
    "make_fx": lambda f: make_fx(f)(X),
    "aux": lambda f: lambda x: grad(lambda x: (x.sum(), f(x.detach())), has_aux=True)(x)[1],
    "in jit": lambda f: jit(lambda x: functionalize(f)(x), backend="eager"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("f", PROGRAMS)
def test_as_eager(f, call):
    compiled = CALLS[call](f)
    for x in (X, X + 1):
        for got, want in zip(tree_leaves(compiled(x)), tree_leaves(f(x)), strict=True):
            assert got.dtype is want.dtype and got.stride() == want.stride()
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("f", PROGRAMS)
def test_of_a_batch(f):
    x = torch.stack([X, X + 1])
    for got, *want in zip(tree_leaves(vmap(f)(x)), *map(tree_leaves, map(f, x)), strict=True):
        torch.testing.assert_close(got, torch.stack(want))

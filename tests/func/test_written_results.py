"""vmap of functions that return what they wrote to: the argument itself, as in eager and
torch.func."""

import pytest
import torch

from aotfunc import grad, jit, vjp, vmap
from tests.reference import assert_same

X = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))

WRITES = {
    "sqrt_": torch.Tensor.sqrt_,
    "add_": lambda x: x.add_(1),
    "later": lambda x: (x.mul_(2), x * 3, x)[-1],
    "in a tree": lambda x: {"y": x.exp_()}["y"],
    "through a view": lambda x: (x[0].add_(1), x)[1],
}


@pytest.mark.parametrize("name", WRITES)
def test_the_argument_itself(name):
    f = WRITES[name]
    for library in (torch.func.vmap, vmap):
        want = torch.stack([f(x.clone()) for x in X])
        x = X.clone()
        assert library(f)(x) is x
        assert_same(x, want)
        x = X.clone()[None]
        assert library(library(f))(x) is x
        assert_same(x, want[None])
        x = X.clone().movedim(0, 2)
        moved = library(f, 2, 0)(x)
        assert moved.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert_same(moved, want)
        moved.zero_()
        assert not x.any()
    assert_same(vmap(f, chunk_size=1)(X.clone()), want)
    assert_same(jit(lambda x: vmap(f)(x) * 2)(X.clone()), want * 2)
    assert_same(grad(lambda y: vmap(f)(y * 1).sum())(X).shape, X.shape)


PARTS = {
    "a row": lambda z: z[0].mul_(z[1]),
    "rows": lambda z: z[1:].sin_(),
    "a diagonal": lambda z: z.diagonal().mul_(z[0]),
    "a strided view": lambda z: z.copy_(torch.as_strided_scatter(z, z[0].sin(), (2,), (2,), 1)),
    "chosen rows": lambda z: z.index_put_((torch.tensor([1, 0]),), z.sin()),
}


@pytest.mark.parametrize("name", PARTS)
def test_backward_through_writes_to_parts_of_complex_tensors(name):
    def f(z):
        z = z * 1
        PARTS[name](z)
        return z

    z = torch.rand(2, 2, 2, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(vmap(f), z)
    assert torch.autograd.gradcheck(lambda z: vjp(f, z[0])[1](z[1])[0], z)


def test_what_is_the_same_for_all_samples():
    total, w = torch.zeros(3, 4), torch.ones(4)
    f = lambda x, w: (w.add_(1), x * w)
    one, product = vmap(f, (0, None), (None, 0))(X, w)
    assert one is w
    assert_same(product, X * 2)
    assert vmap(lambda x: total.add_(1), out_dims=None)(X) is total
    assert_same(total, torch.ones(3, 4))
    spread = vmap(lambda x: total.add_(1))(X)
    assert_same(spread, torch.full((2, 3, 4), 2.0))


def test_differentiated_by_autograd():
    x = X.clone().requires_grad_()
    y = x * 1
    assert vmap(torch.Tensor.sqrt_)(y) is y
    y.sum().backward()
    assert_same(x.grad, 0.5 / X.sqrt())

"""A view of all of a tensor is another tensor on the same memory; the tensor itself is itself."""

import pytest
import torch

from aotfunc import jit, jvp, linearize, vjp, vmap
from tests.inputs import f64

CLOSED = f64(2, 3)
VIEWS = {
    "view_as": lambda x: x.view_as(x),
    "x[:]": lambda x: x[:],
    "x[...]": lambda x: x[...],
    "detach": lambda x: x.detach(),
    "turned twice": lambda x: x.unsqueeze(0).squeeze(0),
    "expand_as": lambda x: x.expand_as(x),
}
ITSELF = {"x": lambda x: x, "contiguous": lambda x: x.contiguous()}
WAYS = {
    "vmap": lambda f, x: vmap(f)(x),
    "vjp": lambda f, x: vjp(f, x)[0],
    "vjp with aux": lambda f, x: vjp(lambda x: (x.sum(), f(x)), x, has_aux=True)[2],
    "jvp": lambda f, x: jvp(f, (x,), (x.clone(),))[0],
    "linearize": lambda f, x: linearize(f, x)[0],
    "jit": lambda f, x: jit(f)(x),
    "vmap in jit": lambda f, x: jit(vmap(f))(x),
    "vjp in jit": lambda f, x: jit(lambda x: vjp(f, x)[0])(x),
    "vjp in vjp": lambda f, x: vjp(lambda x: vjp(f, x)[0], x)[0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, way):
    x = f64(2, 3)
    y = WAYS[way](VIEWS[view], x)
    assert y is not x and torch.equal(y, x)
    y.mul_(2)
    assert torch.equal(y, x)


@pytest.mark.parametrize("way", ["vmap", "vjp", "jvp", "linearize", "jit"])
@pytest.mark.parametrize("f", ITSELF)
def test_itself(f, way):
    x = f64(2, 3)
    assert WAYS[way](ITSELF[f], x) is x


def test_of_what_is_closed_over():
    assert vjp(lambda x: CLOSED, f64(2))[0] is CLOSED
    y = vjp(lambda x: CLOSED[:], f64(2))[0]
    assert y is not CLOSED and y.data_ptr() == CLOSED.data_ptr()


@pytest.mark.parametrize("way", ["vmap", "vjp", "jvp", "linearize"])
def test_derivatives_pass_through(way):
    x = f64(2, 3).requires_grad_()
    (g,) = torch.autograd.grad(WAYS[way](lambda x: x[:], x).square().sum(), x)
    assert torch.equal(g, 2 * x)

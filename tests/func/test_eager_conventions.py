"""Second derivatives that eager mode has by convention: of gradients that are no derivatives, and
zeros where nothing depends on an input any more."""

import pytest
import torch

import aotfunc
from aotfunc import grad, grad_and_value
from tests.inputs import f64
from tests.reference import assert_same, grads


@pytest.mark.parametrize("by_freq", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_second_derivatives_of_gradients_that_an_embedding_scales_or_drops(by_freq, padding_idx):
    """Such gradients are no derivatives, so that only eager says what theirs are."""
    table, v, mix = f64(4, 3), f64(4, 3), f64(7, 7)
    indices = torch.tensor([1, 2, 2, 1, 3, 3, 3])

    def loss(table):
        rows = torch.nn.functional.embedding(
            indices, table, padding_idx, scale_grad_by_freq=by_freq
        )
        return (mix @ rows).sin().sum()

    along = lambda gradient: lambda table: (gradient(loss, create_graph=True)(table) * v).sum()
    want = grads(along(grads))(table)
    got = grad(along(lambda f, create_graph: grad(f)))(table)
    assert_same(got, want, rtol=1e-12, atol=1e-12)


FLAT = {
    "relu": torch.relu,
    "relu of a product": lambda x: torch.relu(x * x.new_tensor([1.0, -2.0, 3.0])),
    "leaky_relu": torch.nn.functional.leaky_relu,
    "hardtanh": torch.nn.functional.hardtanh,
    "hardshrink": torch.nn.functional.hardshrink,
    "threshold": lambda x: torch.nn.functional.threshold(x, 0.1, 0.0),
    "prelu": lambda x: torch.nn.functional.prelu(x, x.new_tensor([0.3])),
    "max_pool": lambda x: torch.nn.functional.max_pool1d(x[None], 2),
    "nll_loss": lambda x: torch.nn.functional.nll_loss(x[None], torch.tensor([1])),
}


@pytest.mark.parametrize("name", FLAT)
def test_autograd_has_zeros_where_a_gradient_is_constant_in_pieces(name):
    f, x = lambda x: FLAT[name](x).sum(), f64(3).requires_grad_()
    (by_eager,) = torch.autograd.grad(f(x), x, create_graph=True)
    (want,) = torch.autograd.grad(by_eager.sum(), x)
    assert not want.any()
    for g in (
        grad(f)(x),
        grad_and_value(f)(x)[0],
        aotfunc.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
        aotfunc.vmap(grad(f))(x[None]),
        aotfunc.jit(grad(f))(x),
    ):
        assert_same(torch.autograd.grad(g.sum(), x)[0], want)

"""Distances between rows whose batches broadcast have derivatives of every order."""

import pytest
import torch

from aotfunc import aot_function, check_grads, grad, hessian
from tests.inputs import f64
from tests.reference import assert_same

BATCHES = [((2, 1), (1,)), ((1,), (2, 1)), ((), (3,)), ((3,), ()), ((0,), ()), ((1,), (0,))]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_batches_that_broadcast(batches, p):
    x, y = (f64(*batch, rows, 2) for batch, rows in zip(batches, (2, 3), strict=True))
    f = lambda x, y: torch.cdist(x, y, p, "donot_use_mm_for_euclid_dist").square().sin().sum()
    check_grads(f, (x, y), order=2)
    norms = lambda x, y: (
        (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().pow(p).sum(-1).pow(2 / p).sin().sum()
    )
    assert_same(hessian(f, (0, 1))(x, y), torch.func.hessian(norms, (0, 1))(x, y))
    args = x.requires_grad_(), y.requires_grad_()
    second = lambda gradients: torch.autograd.grad(
        sum(g.square().sum() for g in gradients), args, materialize_grads=True
    )
    want = second(torch.autograd.grad(norms(*args), args, create_graph=True))
    for first in (grad(f, (0, 1)), aot_function(grad(f, (0, 1)))):
        assert_same(second(first(*args)), want)

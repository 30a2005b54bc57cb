"""FakeTensors as arguments: programs say what shapes and dtypes come out; values may not be asked
for."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from aotfunc import grad, hessian, jit, jvp, make_fx, vjp, vmap
from aotfunc.errors import AotfuncError

CALLS = {
    "jit": lambda x: jit(lambda x: x.sin() @ x.t())(x),
    "grad": lambda x: grad(lambda x: x.sin().sum())(x),
    "vjp": lambda x: vjp(torch.sin, x)[1](x)[0],
    "jvp": lambda x: jvp(torch.sin, (x,), (x,))[1],
    "vmap": lambda x: vmap(torch.sin)(x),
    "vmap(grad)": lambda x: vmap(grad(lambda r: nn.functional.layer_norm(r, (4,)).sum()))(x),
    "hessian": lambda x: hessian(lambda r: (r**3).sum())(x[0]),
    "make_fx": lambda x: make_fx(lambda x: x.double() * 2)(x)(x),
    "written": lambda x: jit(lambda x: x.add_(1))(x.clone()),
    "drawn": lambda x: jit(lambda x: x + torch.randn(4))(x),
}


@pytest.mark.parametrize("call", CALLS)
def test_shapes_and_dtypes(call):
    want = CALLS[call](torch.ones(3, 4))
    with FakeTensorMode() as mode:
        got = CALLS[call](mode.from_tensor(torch.ones(3, 4)))
    assert type(got).__name__ == "FakeTensor"
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_a_backward_pass():
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(3, 4)).requires_grad_()
        jit(lambda x: (x.sin() * x).sum())(x).backward()
    assert x.grad.shape == (3, 4)


def test_an_entry_serves_both():
    f = jit(torch.sin)
    f(torch.ones(3))
    with FakeTensorMode() as mode:
        assert type(f(mode.from_tensor(torch.ones(3)))).__name__ == "FakeTensor"
    assert torch.equal(f(torch.ones(3)), torch.ones(3).sin())


def test_values_are_refused():
    with FakeTensorMode() as mode, pytest.raises(AotfuncError, match="no values"):
        grad(lambda x: x.sum() * x.sum().item())(mode.from_tensor(torch.ones(3)))


def test_numbers_that_change():
    """A Python number that changes is an input of the program: a tensor that mixes with fake
    ones."""
    for rate in (0.1, 0.2, 0.3):
        with FakeTensorMode() as mode:
            inside = grad(lambda x, r=rate: (x * r).sin().sum())(torch.ones(3))
        outside = grad(lambda x, r=rate: (x * r).sin().sum())(mode.from_tensor(torch.ones(3)))
        assert inside.shape == outside.shape == (3,)

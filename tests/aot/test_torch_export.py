"""torch.export of modules that call transforms and compiled functions."""

import pytest
import torch
from torch import nn

from aotfunc import grad, hessian, jit, jvp, laplacian, scan, vjp, vmap
from aotfunc.compile import aot_module
from aotfunc.errors import CaptureError
from tests.reference import assert_same


class Caller(nn.Module):
    """A module that calls a function of its layer and its input."""

    def __init__(self, f):
        super().__init__()
        self.layer, self.f = nn.Linear(3, 2), f

    def forward(self, x):
        return self.f(self.layer, x)


def energy(layer):
    return lambda x: layer(x).tanh().sum()


def cut(layer):
    def f(x):
        with torch.no_grad():
            y = layer(x)
        return y * layer(x)

    return f


TRANSFORMS = {
    "grad": lambda layer, x: grad(energy(layer))(x),
    "vmap(grad)": lambda layer, x: vmap(grad(energy(layer)))(x),
    "hessian": lambda layer, x: hessian(energy(layer))(x),
    "jvp": lambda layer, x: jvp(layer, (x,), (x,)),
    "vjp": lambda layer, x: vjp(layer, x)[1](torch.ones(4, 2)),
    "laplacian": lambda layer, x: vmap(laplacian(energy(layer)))(x),
    "scan": lambda layer, x: scan(lambda c, r: (c * r, layer(c + r)), x[0], x),
}
COMPILED = {
    "jit": lambda layer, x: jit(layer)(x).sin(),
    "no_grad": lambda layer, x: jit(cut(layer))(x),
    "jit(vmap(grad))": lambda layer, x: jit(vmap(grad(energy(layer))))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS | COMPILED)
def test_values(name):
    module = Caller((TRANSFORMS | COMPILED)[name])
    program = torch.export.export(module, (torch.randn(4, 3),))
    x = torch.randn(4, 3)
    assert_same(program.module()(x), module(x))
    assert_same(program.run_decompositions().module()(x), module(x))
    assert list(program.state_dict) == ["layer.weight", "layer.bias"]


def test_compiled_modules_at_other_sizes():
    module = Caller(lambda layer, x: aot_module(layer)(x).sin())
    sizes = {0: torch.export.Dim("batch")}
    program = torch.export.export(module, (torch.randn(4, 3),), dynamic_shapes=(sizes,))
    x = torch.randn(7, 3)
    assert_same(program.module()(x), module(x))


@pytest.mark.parametrize("name", ["grad", "vmap(grad)"])
def test_symbolic_sizes_are_refused(name):
    sizes = {0: torch.export.Dim("batch")}
    with pytest.raises(CaptureError, match=r"known sizes.*static shapes"):
        torch.export.export(
            Caller(TRANSFORMS[name]), (torch.randn(4, 3),), dynamic_shapes=(sizes,)
        )


def test_a_capture_afterwards():
    torch.export.export(Caller(TRANSFORMS["grad"]), (torch.randn(4, 3),))
    x = torch.randn(3, requires_grad=True)
    jit(torch.sin)(x).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())

"""Derivatives of recurrent layers and cells: both modes, second order, and float32, where oneDNN's
layers run."""

import pytest
import torch

from aotfunc import check_grads, functional_call, jvp
from tests.reference import assert_same

nn = torch.nn
LAYERS = [nn.LSTM, nn.GRU, nn.RNN]


def outputs(layer, parameters, x):
    return functional_call(layer, parameters, (x,))[0].sin().sum(-1)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_to_second_order(kind):
    layer = kind(2, 3).double()
    names, values = zip(*((k, v.detach()) for k, v in layer.named_parameters()), strict=True)
    f = lambda *a: outputs(layer, dict(zip(names, a[:-1], strict=True)), a[-1])
    check_grads(f, (*values, torch.randn(4, 2, 2, dtype=torch.float64)), order=2)


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_mode_in_float32(kind):
    layer = kind(2, 3)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    x, t = torch.randn(4, 2, 2), torch.randn(4, 2, 2)
    got = jvp(lambda x: outputs(layer, parameters, x), (x,), (t,))[1]
    exact = {k: v.double() for k, v in parameters.items()}
    y, s = x.double(), 1e-5 * t.double()
    want = (outputs(layer, exact, y + s) - outputs(layer, exact, y - s)) / 2e-5
    assert_same(got, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_to_second_order(kind):
    cell = kind(2, 3).double()

    def f(x):
        out = cell(x)
        return out[0] if isinstance(out, tuple) else out

    check_grads(f, (torch.randn(2, 2, dtype=torch.float64),), order=2)

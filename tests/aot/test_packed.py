"""Packed sequences as arguments of compiled functions and of transforms."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from aotfunc import aot_module, functional_call, grad, jit

close = torch.testing.assert_close


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 4, bidirectional=True)

    def forward(self, packed, scale):
        out, last = self.layer(packed)
        return pad_packed_sequence(out, batch_first=True)[0] * scale, last.sin()


def sequences(*lengths):
    return [torch.randn(n, 3, requires_grad=True) for n in lengths]


@pytest.mark.parametrize(
    ("layer", "backend"), [(nn.LSTM, "eager"), (nn.GRU, "cpp"), (nn.RNN, "eager")]
)
def test_layers(layer, backend):
    """Results, and gradients of data and weights, are eager's; other lengths are a capture."""
    torch.manual_seed(0)
    net = layer(3, 4)
    compiled = aot_module(copy.deepcopy(net), backend)
    for lengths in ((2, 5, 3), (5, 2, 3), (4, 4, 2)):  # the first two have the same steps
        given = sequences(*lengths)
        outs = []
        for m in compiled, net:
            packed, _ = m(pack_sequence(given, enforce_sorted=False))
            y, sizes = pad_packed_sequence(packed)
            outs.append((y, sizes, *torch.autograd.grad(y.sin().sum(), [*given, *m.parameters()])))
        close(*outs)
    assert compiled._compiled.captures == 2


def test_in_a_module_and_under_transforms():
    torch.manual_seed(0)
    net, packed = Last(), pack_sequence(sequences(3, 2))
    loss = lambda y: (y[0].sum() + y[1]).square().mean()
    f = lambda ps, packed: loss(functional_call(net, ps, (packed, 2.0)))
    weights = dict(net.named_parameters())
    expected = torch.autograd.grad(f(weights, packed), [*weights.values()])
    for way in lambda g: g, jit:
        found = way(grad(f))(weights, packed)
        close([*found.values()], [*expected])

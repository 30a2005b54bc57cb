"""The backend "inductor", end to end on the CPU. Its first compile takes seconds, so these are few and do much."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotfunc import aot_function, grad, jit, min_cut_rematerialization_partition
from tests.reference import assert_same

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on the CPU"),
    pytest.mark.slow,
    pytest.mark.limit(300),
]


def derivatives(f, x):
    y = f(x)
    (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sin().sum(), x)
    return y, g, h


def test_forward_backward_second_order():
    f = lambda x: (x @ x.t()).tanh() * x.sum(-1)
    x = torch.randn(4, 4, requires_grad=True)
    assert_same(derivatives(jit(f, "inductor"), x), derivatives(f, x), rtol=1e-4, atol=1e-4)
    assert_same(grad(lambda x: jit(f, "inductor")(x).sum())(x.detach()), grad(lambda x: f(x).sum())(x.detach()))
    views = jit(lambda x: (x, x.t(), (x * 2).view(-1)), "inductor")
    a, b, c = views(x)
    assert a is x and b.data_ptr() == x.data_ptr()
    assert_same(torch.autograd.grad(c.sum() + b.sum(), x)[0], torch.full((4, 4), 3.0))


def test_batch_norm_and_dropout():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = torch.randn(4, 1, 6, 6)
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def run(f):
        net.load_state_dict(before)
        net.zero_grad()
        y = f(x)
        y.square().sum().backward()
        return y, [p.grad.clone() for p in net.parameters()], {k: v.clone() for k, v in net.state_dict().items()}

    f = aot_function(net, "inductor", partition_fn=min_cut_rematerialization_partition)
    assert_same(run(f), run(net), rtol=1e-3, atol=1e-4)

    x = torch.ones(500, requires_grad=True)
    drop = jit(lambda x: F.dropout(x * x, 0.5), "inductor")
    y = drop(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert set(y.tolist()) == {0.0, 2.0} and 150 < (y > 0).sum() < 350
    assert torch.equal(g > 0, y > 0), "the backward sees the mask of the forward"
    assert not torch.equal(drop(x), drop(x))


def test_transformer_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8, requires_grad=True)

    def run(f):
        layer.zero_grad()
        y = f(x)
        (g,) = torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
        y.sin().sum().backward()
        return y, g, [p.grad.clone() for p in layer.parameters()]

    assert_same(run(jit(layer, "inductor")), run(layer), rtol=1e-3, atol=1e-4)

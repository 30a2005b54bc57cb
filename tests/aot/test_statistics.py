"""Buffers that a network updates, some of which share memory: eager's after every step."""

import copy
from itertools import chain

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from aotfunc import aot_module


class Norms(nn.Module):
    def __init__(self, shares=lambda a, b: None):
        super().__init__()
        self.a, self.b, self.linear = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        shares(self.a, self.b)

    def forward(self, x):
        return self.b(self.linear(self.a(x)))


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("p", torch.arange(4.0))
        self.register_buffer("q", torch.ones(4))
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x):
        before = self.p.clone()
        self.p.copy_(self.q)
        self.q.copy_(before + 1)
        return x * self.w * self.p


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("p", torch.arange(16.0).view(4, 4))
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x):
        with torch.no_grad():
            self.p.copy_(self.p.t() + 1)
        return x * self.w * self.p[0]


def halves(a, b):
    memory = torch.zeros(8)
    a.running_mean, b.running_mean = memory[:4], memory[4:]


MADE = {
    "apart": Norms,
    "one tensor": lambda: Norms(lambda a, b: setattr(b, "running_mean", a.running_mean)),
    "a view": lambda: Norms(lambda a, b: setattr(b, "running_mean", a.running_mean[:])),
    "mean and variance": lambda: Norms(lambda a, b: setattr(b, "running_mean", a.running_var)),
    "two halves": lambda: Norms(halves),
    "swapped": Swapped,
    "turned": Turned,
}


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("made", MADE)
def test_buffers(made, backend):
    torch.manual_seed(0)
    net = MADE[made]()
    ours = copy.deepcopy(net)
    step = aot_module(ours, backend)
    for _ in range(3):
        x = torch.randn(6, 4)
        versions = [t._version for t in ours.buffers()]
        for module, forward in ((net, net), (ours, step)):
            module.zero_grad()
            forward(x).sin().sum().backward()
        for t, u in zip(
            chain(net.buffers(), (p.grad for p in net.parameters())),
            chain(ours.buffers(), (p.grad for p in ours.parameters())),
            strict=True,
        ):
            assert_close(u, t, rtol=1e-4, atol=1e-5)
        assert all(t._version > v for t, v in zip(ours.buffers(), versions, strict=True))

"""A compiled function captured, measured and compiled before its first call."""

import pytest
import torch
from torch import nn

from aotfunc import aot_function, aot_module, jit
from aotfunc.errors import CaptureError
from aotfunc.partition import default_partition
from aotfunc.partition.memory import peak
from tests.reference import assert_same


def counting():
    """A compiler that counts, and its counts."""
    made, ran = [], []

    def compiler(gm, inputs):
        made.append(gm)

        def run(*args):
            ran.append(gm)
            return gm(*args)

        return run

    return compiler, made, ran


def test_ahead_of_the_first_call():
    compiler, made, ran = counting()
    f, calls = jit(lambda x, w: calls.append(1) or (x @ w).tanh(), compiler), []
    x, w = torch.randn(4, 3), torch.randn(3, 2, requires_grad=True)
    low = f.lower(x, w)
    assert not made and not ran and f.captures == 1
    assert low.graphs.keys() == {"function", "joint", "forward", "backward"}
    assert "aten.tanh" in low.code and "aten.tanh_backward" in low.graphs["backward"].code
    assert low.compile() is f and len(made) == 2 and not ran
    out = f(x, w)
    out.sum().backward()
    assert f.captures == 1 and len(made) == 2 and len(ran) == 2
    torch.testing.assert_close(out, (x @ w).tanh())
    torch.testing.assert_close(w.grad, x.t() @ (1 - out.detach() ** 2))
    assert "for (float32[4, 3], float32[3, 2]) -> (float32[4, 2])" in repr(low)


def test_without_gradients():
    compiler, made, ran = counting()
    f = jit(torch.sin, compiler)
    low = f.lower(torch.ones(3))
    assert low.graphs.keys() == {"function"}
    low.compile()
    f(torch.zeros(3))
    assert len(made) == len(ran) == 1 and f.captures == 1
    with torch.no_grad():
        x = torch.ones(3, requires_grad=True)
        assert f.lower(x).graphs.keys() == {"function"}
    assert f.lower(x).graphs.keys() == {"function", "joint", "forward", "backward"}


def test_nothing_is_changed():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.seen = nn.BatchNorm1d(3), []

        def forward(self, x):
            self.last = x
            self.seen.append(x)
            return self.norm(x).mul_(2)

    m, x = Counter(), torch.randn(4, 3)
    state = {k: v.clone() for k, v in m.state_dict().items()}
    aot_module(m, "eager").lower(x).compile()
    assert_same(dict(m.state_dict()), state)
    assert not m.seen and not hasattr(m, "last")


def test_what_a_first_call_refuses():
    with pytest.raises(CaptureError):
        jit(lambda x: x if x.sum() > 0 else -x).lower(torch.ones(3))


# ----- costs -------------------------------------------------------------------------------------


def test_costs_of_products():
    x, w = torch.randn(4, 3), torch.randn(3, 2, requires_grad=True)
    found = jit(lambda x, w: x @ w).lower(x, w).cost_analysis()
    product = {"flops": 2 * 4 * 3 * 2, "bytes accessed": 4 * (4 * 3 + 3 * 2 + 4 * 2)}
    assert found == {"forward": product, "backward": product}
    conv = jit(nn.Conv2d(3, 5, 3).requires_grad_(False)).lower(torch.ones(2, 3, 8, 8))
    assert conv.cost_analysis()["function"]["flops"] == 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)


def test_memory():
    """Saved is what the partition keeps; the peak, what lives at one time."""
    x = torch.ones(1000, requires_grad=True)
    f = lambda x: x.exp().tanh().cos()
    every = aot_function(f, "eager", partition_fn=default_partition).lower(x).memory_analysis()
    few = jit(f, "eager", memory_budget=0.0).lower(x).memory_analysis()
    assert every["arguments"] == every["results"] == 4000
    assert every["saved"] == 8000 and few["saved"] < 8000
    assert every["forward peak"] == 12000  # exp and tanh are kept, and there is the result


def test_peak_of_graphs():
    def of(f, *args):
        return peak(jit(f, "eager").lower(*args).graph)

    x = torch.ones(1000)
    assert of(lambda x: x.sin().cos().exp(), x) == 8000  # one made of one
    assert of(lambda x: x.view(10, 100).t().sin().t().cos().sum(), x) == 8000
    assert of(lambda x: (x.sin(), x.cos()), x) == 8000
    assert of(lambda x: x.view(10, 100).max(0), x) == 400 + 800  # numbers and their places
    assert of(lambda x: (x + 1).view(10, 100).unbind()[3].sin(), x) == 4400
    assert of(lambda x: x.t(), x) == 0

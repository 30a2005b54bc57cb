"""Which nodes form a kernel, and how many of them are tried."""

import pytest
import torch

from aotfunc import jit
from aotfunc.backends.loops import fuse
from aotfunc.backends.loops.alike import description
from tests.kernels import every_kernel

pytestmark = pytest.mark.usefixtures("cache")


def scan(x, a, c):
    """A state-space model, step by step."""
    decay, state, outs = a.sigmoid(), torch.zeros_like(x[0]), []
    for i in range(len(x)):
        state = decay[i] * state + x[i]
        outs.append(state * c[i])
    return torch.stack(outs)


def test_trials_grow_with_the_graph(monkeypatch):
    """Kernels have many nodes, and are not built anew with each of them."""
    counts, real = [], fuse.build_kernel

    def counted(nodes, *args):
        counts[-1] += len(nodes)
        return real(nodes, *args)

    monkeypatch.setattr(fuse, "build_kernel", counted)
    for steps in (8, 16):
        counts.append(0)
        fuse.TRIED.clear()
        args = [torch.randn(steps, 4, 3) for _ in range(3)]
        got = jit(scan, backend=every_kernel)(*args)
        torch.testing.assert_close(got, scan(*args))
    assert counts[1] < 2.2 * counts[0], counts


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x.sin(), x.t().cos()),
        lambda x: (lambda y: (y.exp(), y.t() * 2))(x.sin()),
        lambda x: (x.sin() + 1, x.flip(0).cos(), x.t().exp()),
        lambda x: (lambda y, z: (y * z, y + z, (y * z).t().cos()))(x.sin(), x.roll(1, 0)),
    ],
)
def test_values_of_one_shape_that_are_read_in_several_orders(f):
    """What is likely to be one kernel is looked at in the end."""
    x = torch.randn(5, 5)
    torch.testing.assert_close(jit(f, backend=every_kernel)(x), f(x))


def test_layers_are_tried_once(monkeypatch):
    """Nodes of one description form the same kernel; what differs, if only by which argument is
    read twice, has another one."""
    tried, real = [], fuse.build_kernel
    monkeypatch.setattr(fuse, "build_kernel", lambda *args: tried.append(1) or real(*args))

    def deep(count):
        fuse.TRIED.clear()
        tried.clear()
        w = torch.randn(6, 6)

        def f(x):
            for _ in range(count):
                x = torch.nn.functional.layer_norm(x + (x @ w).tanh(), (6,))
            return x

        x = torch.randn(3, 6)
        torch.testing.assert_close(jit(f, backend=every_kernel)(x), f(x))
        return len(tried)

    assert deep(6) == deep(3)
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    x.meta["val"], y.meta["val"] = torch.ones(3), torch.ones(3)

    def found(op, *args):
        n = graph.call_function(op, args)
        n.meta["val"] = torch.ones(3)
        return description([n], [n])

    mul = torch.ops.aten.mul.Tensor
    assert found(mul, x, y) == found(mul, y, x) != found(mul, x, x)
    assert len({found(mul, x, a) for a in (1, 1.0, True, 0.0, -0.0)}) == 5
    n = graph.find_nodes(op="call_function", target=mul)[0]
    before = description([n], [n])
    n.meta = {**n.meta, "val": torch.ones(3, dtype=torch.float64)}
    assert description([n], [n]) != before

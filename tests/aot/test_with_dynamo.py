"""Compiled functions and torch.compile, torch.jit in one program."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from aotfunc import aot_function, jit
from aotfunc.errors import CaptureError
from tests.reference import assert_same


def loss(net):
    return lambda x: net(x).square().sum()


def step(f, optimizer, x):
    optimizer.zero_grad()
    value = f(x)
    value.backward()
    optimizer.step()
    return value


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
@pytest.mark.parametrize(
    "compiled", [jit, lambda f: aot_function(f, "eager")], ids=["jit", "aot_function"]
)
def test_a_training_step_under_torch_compile(compiled):
    """Dynamo meets the backward too: it looks into neither half."""
    ours = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    theirs = copy.deepcopy(ours)
    a, b = (torch.optim.SGD(net.parameters(), 0.1) for net in (ours, theirs))
    f = compiled(loss(ours))
    whole = torch.compile(lambda x: step(f, a, x), backend="eager")
    for _ in range(3):
        x = torch.randn(5, 3)
        assert_same(whole(x), step(loss(theirs), b, x))
        assert_same(list(ours.parameters()), list(theirs.parameters()))
    torch._dynamo.reset()


def test_a_function_that_torch_compile_has_compiled():
    """It is refused inside a capture, and runs as it is where the user turns Dynamo off."""
    layer = nn.Linear(3, 3)
    theirs = torch.compile(layer, backend="eager")
    f, x = jit(lambda x: theirs(x).sin()), torch.ones(1, 3)
    with pytest.raises(CaptureError, match=r"torch\.compile has compiled .*theirs"):
        f(x)
    with torch.compiler.set_stance("force_eager"):
        assert_same(f(x), layer(x).sin())
    assert_same(theirs(x), layer(x))
    torch._dynamo.reset()


def test_a_scripted_module():
    scripted = torch.jit.script(nn.Linear(2, 2))
    f, x = jit(lambda x: scripted(x) * 2), torch.ones(1, 2)
    assert_same(f(x), scripted(x) * 2)
    with torch.no_grad():
        scripted.weight.fill_(3.0)
    assert_same(f(x), scripted(x) * 2)


@pytest.mark.slow
def test_decompositions_of_inductor_in_a_fresh_process():
    """Max pooling's asks a module of Inductor's that it does not import."""
    code = "import torch; from aotfunc.backends.inductor import decompositions as d; d(); "
    code += "torch._inductor.lowering"
    subprocess.run([sys.executable, "-c", code], check=True)


# ----- torch.compile(backend="aotfunc") ----------------------------------------------------------


@pytest.fixture
def compiled():
    yield lambda f, **options: torch.compile(f, backend="aotfunc", **options)
    torch._dynamo.reset()


NETS = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)
    ),
    "layer of a transformer": lambda: nn.TransformerEncoderLayer(3, 1, 8),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3)),
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_dynamos_graphs_of_several_sizes(compiled, net):
    ours = net()
    theirs = copy.deepcopy(ours)
    f = compiled(ours, options={"backend": "eager"})
    for n in (5, 5, 6, 7):
        x, results = torch.randn(n, 3), []
        for module in (f, theirs):
            torch.manual_seed(n)
            results.append(module(x))
            results[-1].square().sum().backward()
        assert_same(*results)
        pairs = [*zip(ours.parameters(), theirs.parameters(), strict=True)]
        torch.testing.assert_close([p.grad for p, _ in pairs], [q.grad for _, q in pairs])
        assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_dynamos_graphs_write_and_alias(compiled):
    def f(x, n):
        y = x * n
        if y.sum() > 0:
            y = y.sin()
        y.add_(x.shape[0])
        x.mul_(2)
        return {"y": y, "part": x[1:], "size": x.shape[0]}

    g = compiled(f, dynamic=True)
    for n in (3, 4, 5):
        x = torch.randn(n, 2)
        z = x.clone()
        ours, theirs = g(x, n), f(z, n)
        torch.testing.assert_close(ours, theirs)
        assert_same(x, z)
        assert ours["part"].data_ptr() == x[1:].data_ptr()


def test_dynamos_graphs_with_transforms_inside(compiled):
    f = compiled(torch.func.vmap(torch.func.grad(lambda x: x.sin().sum())), fullgraph=True)
    x = torch.randn(3, 2)
    torch.testing.assert_close(f(x), x.cos())


def test_options_of_the_backend(compiled):
    f = compiled(torch.sin, options={"speed": 11})
    with pytest.raises(Exception, match="there is no option speed"):
        f(torch.ones(2))

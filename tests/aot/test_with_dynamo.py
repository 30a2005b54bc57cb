"""Compiled functions and torch.compile, torch.jit in one program."""

import copy
import subprocess
import sys

import torch
from torch import nn

from aotfunc import aot_function, jit
from tests.reference import assert_same


def test_a_training_step_under_torch_compile():
    """Dynamo meets the backward too: it looks into neither half."""
    for compiled in (jit, lambda f: aot_function(f, "eager")):
        nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))]
        nets.append(copy.deepcopy(nets[0]))
        loss = lambda net: lambda x: net(x).square().sum()
        fs = [compiled(loss(nets[0])), loss(nets[1])]
        optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in nets]

        def step(i, x, fs=fs, optimizers=optimizers):
            optimizers[i].zero_grad()
            value = fs[i](x)
            value.backward()
            optimizers[i].step()
            return value

        ours = torch.compile(lambda x, step=step: step(0, x), backend="eager")
        for _ in range(3):
            x = torch.randn(5, 3)
            assert_same(ours(x), step(1, x))
            assert_same(list(nets[0].parameters()), list(nets[1].parameters()))
        torch._dynamo.reset()


def test_a_scripted_module():
    scripted = torch.jit.script(nn.Linear(2, 2))
    f, x = jit(lambda x: scripted(x) * 2), torch.ones(1, 2)
    assert_same(f(x), scripted(x) * 2)
    with torch.no_grad():
        scripted.weight.fill_(3.0)
    assert_same(f(x), scripted(x) * 2)


def test_decompositions_of_inductor_in_a_fresh_process():
    """Max pooling's asks a module of Inductor's that it does not import."""
    code = "import torch; from aotfunc.backends.inductor import _decompositions as d; d(); torch._inductor.lowering"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Compiled functions, and modules that hold them, are copied and pickled without what was
captured."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

import aotfunc as A
from aotfunc.compile import aot_module, memory_efficient_fusion
from tests.copies import COPIES, pickled

X = torch.linspace(-1, 1, 6).reshape(2, 3)
aten = torch.ops.aten


def scaled(x, w):
    return (x * w).tanh().sum()


@A.jit(backend="eager")
def decorated(x):
    return x.sin() * 2


def compiler(gm, inputs):
    return gm.forward


def doubled_sine(x):
    return 2 * torch.ops.aten.cos.default(x)


class Net(nn.Module):
    """One of everything that a module may hold."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.factor = 2.0
        self.act = A.jit(torch.tanh)
        self.own = A.aot_function(self.affine, "eager")
        self.decorated = decorated
        self.inner = aot_module(nn.Linear(3, 1), "eager")

    @A.jit
    def scale(self, x):
        return x * self.factor

    def affine(self, x):
        return self.linear(x) + self.factor

    def forward(self, x):
        return self.inner(self.decorated(self.scale(self.act(self.own(x)))))


def by_hand(net, x):
    return net.inner.orig_module((net.factor * (net.linear(x) + net.factor).tanh()).sin() * 2)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("called", [False, True])
def test_a_module_with_compiled_parts(how, called):
    torch.manual_seed(0)
    net = Net()
    if called:
        net(X).sum().backward()
        net.zero_grad()
    twin = COPIES[how](net)
    torch.testing.assert_close(twin(X), by_hand(net, X))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(3)
        twin.factor = 5.0
    torch.testing.assert_close(twin(X), by_hand(twin, X))
    torch.testing.assert_close(
        net(X), by_hand(net, X)
    )  # the original has its own parameters and numbers
    twin(X).sum().backward()
    grads = [p.grad for p in twin.parameters()]
    assert all(g is not None for g in grads) and all(p.grad is None for p in net.parameters())
    expected = torch.autograd.grad(by_hand(twin, X).sum(), list(twin.parameters()))
    torch.testing.assert_close(tuple(grads), expected)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_entries_of_its_own(how):
    f = A.jit(scaled)
    f(X, 2.0)
    twin = COPIES[how](f)
    assert twin is not f and twin.f is scaled and len(f.entries) == 1 and not len(twin.entries)
    torch.testing.assert_close(twin(X, 2.0), scaled(X, 2.0))
    twin(X, 3.0)
    assert len(twin.entries) == 2 and len(f.entries) == 1


@pytest.mark.parametrize("how", COPIES)
def test_options_come_along(how):
    f = A.aot_function(
        scaled,
        compiler,
        "eager",
        A.min_cut_rematerialization_partition,
        {aten.sin.default: doubled_sine},
    )
    twin = COPIES[how](f)
    theirs, ours = twin.pipeline, f.pipeline
    assert (theirs.name, theirs.compilers, theirs.partition) == (
        ours.name,
        ours.compilers,
        ours.partition,
    )
    assert theirs.decompositions == ours.decompositions
    torch.testing.assert_close(twin(X, 1.5), scaled(X, 1.5))


def test_what_is_decorated_is_pickled_by_its_name():
    assert pickled(decorated) is decorated and copy.deepcopy(decorated) is decorated


def test_a_bound_method():
    net = Net()
    bound = pickled(net.scale)
    torch.testing.assert_close(bound(X), X * 2)
    bound.__self__.factor = 3.0
    torch.testing.assert_close(bound(X), X * 3)
    torch.testing.assert_close(net.scale(X), X * 2)


@pytest.mark.parametrize("make", [A.jit, lambda f: A.aot_function(f, "eager")])
def test_a_function_that_cannot_be_pickled_is_named(make):
    def local(x):
        return x

    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(make(local))
    assert copy.deepcopy(make(local)).f is local


def test_a_fused_module_is_copied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    fused = memory_efficient_fusion(net, fw_compiler="eager")
    replicas = [copy.deepcopy(fused) for _ in range(2)]  # as nn.DataParallel does
    for r in (fused, *replicas):
        torch.testing.assert_close(r(X), net(X))
    assert len({id(p) for r in (fused, *replicas) for p in r.parameters()}) == 6


def test_averaged_weights():
    net = Net()
    averaged = torch.optim.swa_utils.AveragedModel(net)
    with torch.no_grad():
        net.linear.weight.add_(1)
    averaged.update_parameters(net)
    torch.testing.assert_close(averaged(X), by_hand(averaged.module, X))


def in_a_process(f, net, x, queue):
    queue.put([t.detach().numpy() for t in (f(x, 2.0), net(x))])


@pytest.mark.limit(120)
def test_another_process():
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    f, net = A.jit(scaled), Net()
    f(X, 2.0)
    process = context.Process(target=in_a_process, args=(f, net, X, queue))
    process.start()
    got = queue.get()
    process.join()
    torch.testing.assert_close(torch.from_numpy(got[0]), scaled(X, 2.0))
    torch.testing.assert_close(torch.from_numpy(got[1]), by_hand(net, X).detach())

"""Training through compiled functions equals eager training, step by step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotfunc import (
    aot_function,
    aot_module,
    default_partition,
    jit,
    min_cut_rematerialization_partition,
)
from tests.reference import assert_same

COMPILED = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager", partition_fn=default_partition),
    "aot_function, min-cut": lambda f: aot_function(
        f, "eager", partition_fn=min_cut_rematerialization_partition
    ),
}


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)
    )


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3 * 9, 3),
    )


def data(image):
    return torch.randn(10, *((1, 8, 8) if image else (6,)), dtype=torch.float64), torch.arange(
        10
    ) % 3


def losses(net, step, x, t, optimizer, steps=20):
    opt, found = optimizer(net.parameters()), []
    for _ in range(steps):
        opt.zero_grad()
        loss = step(x, t)
        loss.backward()
        opt.step()
        found.append(loss.detach())
    return torch.stack(found)


SGD = lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9)
ADAM = lambda ps: torch.optim.Adam(ps, 0.01)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize(
    "make, optimizer", [(mlp, SGD), (mlp, ADAM), (conv_net, SGD), (conv_net, ADAM)]
)
def test_twenty_steps(make, optimizer, compiled):
    net = make().double()
    twin = copy.deepcopy(net)
    x, t = data(make is conv_net)
    step = COMPILED[compiled](lambda x, t: F.cross_entropy(net(x), t))
    got = losses(net, step, x, t, optimizer)
    want = losses(twin, lambda x, t: F.cross_entropy(twin(x), t), x, t, optimizer)
    assert_same(got, want)
    assert_same(net.state_dict(), twin.state_dict())
    assert got[-1] < 0.8 * got[0] and len(step.entries) == 1


def test_aot_module():
    net = mlp().double()
    twin = copy.deepcopy(net)
    compiled = aot_module(net, "eager")
    assert isinstance(compiled, nn.Module)
    assert [p.data_ptr() for p in compiled.parameters()] == [
        p.data_ptr() for p in net.parameters()
    ]
    x, t = data(False)
    got = losses(compiled, lambda x, t: F.cross_entropy(compiled(x), t), x, t, SGD)
    want = losses(twin, lambda x, t: F.cross_entropy(twin(x), t), x, t, SGD)
    assert_same(got, want)
    compiled.eval()
    assert_same(compiled(x), twin.eval()(x))
    assert not net.training


def test_whole_step_with_the_learning_rate_as_a_tensor():
    def step(params, x, t, lr):
        leaves = [p.detach().requires_grad_() for p in params]
        loss = F.mse_loss(torch.tanh(x @ leaves[0]) @ leaves[1], t)
        return loss.detach(), [
            p - lr * g for p, g in zip(params, torch.autograd.grad(loss, leaves))
        ]

    x, t = torch.randn(8, 3), torch.randn(8, 2)
    compiled = jit(step)
    mine = theirs = [torch.randn(3, 4), torch.randn(4, 2)]
    for i in range(10):
        lr = torch.tensor(0.1 / (1 + i))
        loss, mine = compiled(mine, x, t, lr)
        expected, theirs = step(theirs, x, t, lr)
        assert_same((loss, mine), (expected, theirs))
    assert len(compiled.entries) == 1


def test_gradients_accumulate():
    x = torch.randn(3, requires_grad=True)
    f = jit(lambda x: (x * x).sum())
    f(x).backward()
    f(x).backward()
    assert_same(x.grad, 4 * x.detach())


def test_unused_and_frozen_inputs_have_no_gradient():
    a, b, c = (torch.randn(2, requires_grad=i < 2) for i in range(3))
    jit(lambda a, b, c: a * c)(a, b, c).sum().backward()
    assert a.grad is not None and b.grad is None and c.grad is None
    a.grad = None
    y, z = jit(lambda a, b: (a * 2, b * 3))(a, b)
    y.sum().backward()
    assert_same(a.grad, torch.full((2,), 2.0))
    assert b.grad is None  # only the other result depends on it


@pytest.mark.parametrize("compiled", COMPILED)
def test_backward_does_not_go_through_inputs_without_a_gradient(compiled):
    """Hooks of an input that no result depends on do not run, and its own graph may be freed."""
    w, leaf = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    f = COMPILED[compiled](lambda x, y: x * w + y.shape[0])
    leaf.register_hook(lambda g: g * 2)
    y = leaf * 1
    for _ in range(2):
        f(torch.ones(3), y).sum().backward()
    f(torch.ones(3), leaf).sum().backward()
    assert w.grad.tolist() == [3, 3, 3] and leaf.grad is None


def test_results_require_grad_as_in_eager():
    def f(x, w):
        with torch.no_grad():
            frozen = x * 2
        return (
            x * 2,
            w * 2,
            frozen,
            x.detach() * 2,
            x > 0,
            x.argmax(),
            (x * w.detach()),
            torch.ones(2),
        )

    x, w = torch.randn(2, requires_grad=True), torch.randn(2)
    assert [t.requires_grad for t in jit(f)(x, w)] == [t.requires_grad for t in f(x, w)]
    assert not jit(lambda x: x.detach() * 2)(x).requires_grad


def test_a_result_that_is_not_used_adds_nothing():
    """0 * inf is not 0: its cotangent is absent, not zero."""

    def f(x):
        root, e = x.sqrt(), x.exp()
        return root, torch.cat([root, e]), root * e, (x / 0.0).sum(), e

    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert_same(torch.autograd.grad(jit(f)(x)[4].sum(), x)[0], torch.ones(2, dtype=torch.float64))
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    for used in ([0], [1], [2], [0, 2], [1, 4], [0, 1, 2, 4]):
        for order in (1, 2):
            grads = []
            for g in (jit(f), f):
                outs, y = g(x), 0.0
                for k in used:
                    y = y + outs[k].sin().sum()
                d = torch.autograd.grad(y, x, create_graph=order == 2)[0]
                grads.append(d if order == 1 else torch.autograd.grad(d.sum(), x)[0])
            assert_same(*grads)


APART = {
    "ops": lambda x: (x * 2, x.sin()),
    "the same op": lambda x: (x.sin() + 1, x.sin() * x),
    "nothing saved": lambda x: (lambda h: (h * 2, h * 3))(x + 1),
    "random": lambda x: (F.dropout(x * x, 0.5), F.dropout(x, 0.5).sin()),
    "three": lambda x: (x.sin() * x, x.exp(), x.cos()),
    "products": lambda x: (x @ x.mT, (x.mT @ x).sin()),
    "a saved one": lambda x: (lambda h: (h.sin(), h * h))(x.exp()),
}


@pytest.mark.parametrize("taken", ["backward", "grad", "create_graph"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("way", [jit, lambda f: aot_function(f, "eager")], ids=["jit", "aot"])
def test_gradients_of_one_result_after_the_other(way, name, order, taken):
    """A second one needs no retained graph where eager's needs none."""

    def run(wrap):
        torch.manual_seed(0)
        x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        outs, found = wrap(APART[name])(x), []
        for k in order:
            try:
                if taken == "backward":
                    outs[k].sum().backward()
                    found.append(x.grad.clone())
                else:
                    keeps = taken == "create_graph"
                    (g,) = torch.autograd.grad(
                        outs[k].sum(), x, create_graph=keeps, retain_graph=False
                    )
                    found.append(g)
            except RuntimeError as e:
                assert "second time" in str(e)
                found.append(None)
        return found

    for got, want in zip(run(way), run(lambda f: f), strict=True):
        if want is not None:
            assert_same(got, want)
        elif name != "nothing saved" and order == (0, 0):
            assert got is None


def test_what_was_written_between_two_backwards():
    def run(wrap, first, second):
        x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        outs = wrap(lambda x, w: (x * w, x.sin()))(x, w)
        outs[first].sum().backward()
        with torch.no_grad():
            w.add_(1)
        outs[second].sum().backward()
        return x.grad

    assert_same(run(jit, 0, 1), run(lambda f: f, 0, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(jit, 1, 0)


@pytest.mark.parametrize("compiled", COMPILED)
def test_retain_graph(compiled):
    x = torch.randn(3, requires_grad=True)
    y = COMPILED[compiled](lambda x: (x * x).sin().sum())(x)
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert_same(torch.autograd.grad(y, x, retain_graph=True), first)
    assert_same(torch.autograd.grad(y, x), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


def test_an_input_that_changed_since():
    x = torch.randn(3, requires_grad=True) * 1
    y = jit(lambda x: x.sin())(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    # exp saves its result, and not its argument
    f = aot_function(lambda x: x.exp(), "eager")
    for create_graph in (False, True):
        leaf = torch.randn(3, requires_grad=True)
        x = leaf * 1
        y = f(x).sum()
        x.zero_()
        (g,) = torch.autograd.grad(y, leaf, create_graph=create_graph)
        assert_same(g.detach(), leaf.detach().exp())

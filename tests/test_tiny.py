"""The five-second check that every commit runs: each public name once, on a function of one
line."""

import torch

import aotfunc
from tests.reference import assert_same


def f(x):
    return (torch.sin(x) * x).sum()


def df(x):
    return torch.cos(x) * x + torch.sin(x)


def d2f(x):
    return 2 * torch.cos(x) - x * torch.sin(x)


def test_grad():
    x = torch.randn(5, dtype=torch.float64)
    assert_same(aotfunc.grad(f)(x), df(x))
    assert_same(aotfunc.grad_and_value(f)(x), (df(x), f(x)))


def test_grad_of_grad():
    x = torch.randn((), dtype=torch.float64)
    assert_same(aotfunc.grad(aotfunc.grad(f))(x), d2f(x))


def test_vjp_and_jvp():
    x, v = torch.randn(2, 5, dtype=torch.float64)
    out, pull = aotfunc.vjp(torch.sin, x)
    assert_same((out, *pull(v)), (x.sin(), v * x.cos()))
    assert_same(aotfunc.jvp(torch.sin, (x,), (v,)), (x.sin(), v * x.cos()))


def test_linearize():
    x, v = torch.randn(2, 5, dtype=torch.float64)
    out, push = aotfunc.linearize(torch.sin, x)
    assert_same((out, push(v)), (x.sin(), v * x.cos()))


def test_vmap():
    x = torch.randn(3, 5, dtype=torch.float64)
    assert_same(aotfunc.vmap(f)(x), torch.stack([f(row) for row in x]))
    assert_same(aotfunc.vmap(aotfunc.grad(f))(x), df(x))


def test_jacobians_and_hessian():
    x = torch.randn(4, dtype=torch.float64)
    assert_same(aotfunc.jacrev(torch.sin)(x), torch.diag(x.cos()))
    assert_same(aotfunc.jacfwd(torch.sin)(x), torch.diag(x.cos()))
    assert_same(aotfunc.hessian(f)(x), torch.diag(d2f(x)))


def test_make_fx_prints_one_cos():
    gm = aotfunc.make_fx(aotfunc.grad(lambda x: torch.sin(x).sum()))(torch.randn(3))
    calls = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert calls == [torch.ops.aten.cos.default], gm.code


def test_functionalize():
    def write(x):
        y = x.clone()
        y.view(-1)[0] += 1
        return y

    x = torch.randn(2, 2)
    assert_same(aotfunc.functionalize(write)(x), write(x))


def test_jit_and_aot_function():
    x = torch.randn(5, dtype=torch.float64)
    assert_same(aotfunc.jit(f)(x), f(x))
    leaf = x.clone().requires_grad_()
    aotfunc.aot_function(f, "eager")(leaf).backward()
    assert_same(leaf.grad, df(x))


def test_per_sample_gradients_of_a_module():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    params = dict(net.named_parameters())
    x = torch.randn(6, 3)
    loss = lambda p, row: aotfunc.functional_call(net, p, row).sum()
    per_sample = aotfunc.vmap(aotfunc.grad(loss), in_dims=(None, 0))(params, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(net(row).sum(), list(net.parameters()))
        for got, want in zip(per_sample.values(), expected):
            torch.testing.assert_close(got[i], want)


def test_check_grads():
    aotfunc.check_grads(
        lambda x: torch.tanh(x) * x, (torch.randn(3, dtype=torch.float64),), order=2
    )


def test_a_clear_error():
    try:
        aotfunc.grad(torch.sin)(torch.randn(3))
    except aotfunc.errors.AotfuncError as error:
        assert (
            "scalar" in str(error).lower()
            or "0-dim" in str(error)
            or "(3,)" in str(error)
            or "[3]" in str(error)
        )
    else:
        raise AssertionError("grad of a vector function must raise")

"""Transforms of compiled functions: right numbers, and what was compiled stays compiled."""

import pytest
import torch
from torch import nn

import aotfunc
from aotfunc import (
    aot_function,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    jvp,
    linearize,
    make_fx,
    vjp,
    vmap,
)
from tests.aot.compilers import Watched
from tests.inputs import f64
from tests.reference import assert_same


def f(x):
    return (x.sin() * x.exp()).sum()


def batched(m, x):
    return torch.stack([x, x * 2, x.cos()])


#: what is done, with `t` the library of transforms (ours, or torch.func as reference) and g the
# compiled function
TRANSFORMED = {
    "grad": lambda t, g, x: t.grad(g)(x),
    "grad of grad": lambda t, g, x: t.grad(lambda x: t.grad(g)(x).sum())(x),
    "grad of a function of it": lambda t, g, x: t.grad(lambda x: g(x) ** 2)(x),
    "vjp": lambda t, g, x: t.vjp(g, x)[1](torch.ones_like(x.sum()))[0],
    "jvp": lambda t, g, x: t.jvp(g, (x,), (x.cos(),)),
    "jvp of grad": lambda t, g, x: t.jvp(t.grad(g), (x,), (x.cos(),)),
    "vmap": lambda t, g, x: t.vmap(g)(x.expand(4, *x.shape) * 1),
    "vmap of grad": lambda t, g, x: t.vmap(t.grad(g))(torch.stack([x, x * 2])),
    "grad of vmap": lambda t, g, x: t.grad(lambda x: t.vmap(g)(torch.stack([x, x * 2])).sum())(x),
    "vmap of vmap": lambda t, g, x: t.vmap(t.vmap(g))(x.expand(2, 2, *x.shape) * 1),
    "jacrev": lambda t, g, x: t.jacrev(g)(x),
    "jacfwd": lambda t, g, x: t.jacfwd(g)(x),
    "hessian": lambda t, g, x: t.hessian(g)(x),
    "jacrev of grad": lambda t, g, x: t.jacrev(t.grad(g))(x),
    "linearize": lambda t, g, x: t.linearize(g, x)[1](x.cos()),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # torch.func.linearize
@pytest.mark.parametrize(
    "compiled", [lambda f, c: jit(f, c), lambda f, c: aot_function(f, c)], ids=["jit", "aot"]
)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_stays_compiled(name, compiled):
    run, x, w = TRANSFORMED[name], f64(3), Watched()
    g = compiled(f, w.compiler)
    with w:
        got = run(aotfunc, g, x)
        calls = w.calls
        run(aotfunc, g, x)
    assert_same(got, run(torch.func, f, x))
    assert calls > 0 and w.calls == calls, "compiled on the first call, and only then"
    arithmetic = {"sin", "exp", "cos", "sum"} - (
        {"cos"} if "jvp" in name or name == "linearize" else set()
    )
    assert not arithmetic & (w.outside - {"sum"}), f"ran outside of compiled code: {w.outside}"
    assert {"exp"} <= w.inside


def test_jit_of_hessian_of_jit():
    x = f64(3)
    assert_same(jit(hessian(jit(f)))(x), torch.func.hessian(f)(x))
    w = Watched()
    with w:
        got = jit(hessian(jit(f, w.compiler)), w.compiler)(x)
    assert_same(got, torch.func.hessian(f)(x))
    assert w.calls == 1, "an outer jit inlines the inner one"
    assert not {"sin", "exp", "cos"} & w.outside


def test_make_fx_inlines():
    code = make_fx(lambda x: jit(f)(x) * 2)(f64(3)).code
    assert "aten.sin" in code and "jit" not in code


def test_the_carried_graph_keeps_its_compiler_in_a_larger_function():
    inner, outer = Watched(), Watched()
    g, x = jit(lambda x: x.sin() * x, inner.compiler), f64(3)
    with inner:
        got = grad(lambda x: (g(x).exp() + x).sum())(x)
    assert_same(got, torch.func.grad(lambda x: ((x.sin() * x).exp() + x).sum())(x))
    assert (
        "sin" in inner.inside
        and "exp" not in inner.inside
        and "exp" in inner.outside
        and not outer.calls
    )


def test_second_order_both_ways():
    x = f64(3)
    g = jit(f)
    want = torch.func.hessian(f)(x)
    for h in (
        jacrev(jacrev(g)),
        jacfwd(jacrev(g)),
        jacfwd(jacfwd(g)),
        jacrev(jacfwd(g)),
        hessian(g),
    ):
        assert_same(h(x), want)


def test_results_of_transforms_go_on_under_autograd():
    x = f64(3).requires_grad_()
    for t in (
        grad(jit(f)),
        lambda x: vjp(jit(f), x)[1](torch.ones((), dtype=x.dtype))[0],
        jit(grad(jit(f))),
    ):
        (h,) = torch.autograd.grad(t(x).sum(), x)
        assert_same(h, torch.func.hessian(f)(x.detach()).sum(0))


def test_several_arguments_and_results():
    g = jit(lambda p, x, n: {"y": p["w"] @ x * n, "z": (x.sum(), p["b"] * 2)})
    plain = lambda p, x, n: {"y": p["w"] @ x * n, "z": (x.sum(), p["b"] * 2)}
    p, x = {"w": f64(2, 3), "b": f64(2)}, f64(3)
    loss = lambda h: lambda p, x: h(p, x, 2)["y"].sin().sum() + h(p, x, 2)["z"][1].sum()
    for argnums in (0, 1, (0, 1)):
        assert_same(grad(loss(g), argnums)(p, x), torch.func.grad(loss(plain), argnums)(p, x))
    xs = f64(4, 3)
    assert_same(
        vmap(lambda x: g(p, x, 2), out_dims=0)(xs), torch.func.vmap(lambda x: plain(p, x, 2))(xs)
    )
    assert_same(
        jvp(lambda x: g(p, x, 2)["y"], (x,), (x,)),
        torch.func.jvp(lambda x: plain(p, x, 2)["y"], (x,), (x,)),
    )


def test_batch_dimensions():
    g, x, y = jit(lambda x, y: x @ y), f64(3, 4), f64(4, 5)
    for dims in ((0, None), (None, 1), ((1), 0)):
        try:
            want = torch.func.vmap(lambda a, b: a @ b, dims)(x if dims != (1, 0) else f64(4, 4), y)
        except RuntimeError:
            continue
        if dims != (1, 0):
            assert_same(vmap(g, dims)(x, y), want)


def test_random_inside_vmap():
    g, x = jit(lambda x: x * torch.rand(2)), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(g)(x)
    same = vmap(g, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = vmap(g, randomness="different")(x)
    assert not torch.equal(different[0], different[1])


def test_inside_torch_func():
    g, x = jit(f), f64(3)
    assert_same(torch.func.grad(g)(x), torch.func.grad(f)(x))
    assert_same(torch.func.vmap(g)(f64(2, 3) * 0), torch.zeros(2, dtype=torch.float64))
    assert_same(torch.func.hessian(g)(x), torch.func.hessian(f)(x))


def test_modules():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    g, x = jit(net), f64(3)
    assert_same(grad(lambda x: g(x).sum())(x), torch.func.grad(lambda x: net(x).sum())(x))
    lin = linearize(lambda x: g(x), x)[1]
    assert_same(lin(x), torch.func.jvp(net, (x,), (x,))[1])
    params = dict(net.named_parameters())
    call = lambda t, p: t.grad(lambda p: torch.func.functional_call(net, p, (x,)).sum())(p)
    assert_same(jit(lambda p: call(aotfunc, p))(params), call(torch.func, params))


def test_cotangents_and_tangents_have_the_strides_that_were_compiled_for():
    """An expanded or transposed cotangent is laid out anew: Inductor's code reads with fixed
    strides."""

    def strict(gm, example_inputs):
        planned = [n.meta["val"].stride() for n in gm.graph.nodes if n.op == "placeholder"]

        def run(*args):
            assert [x.stride() for x in args] == planned
            return gm(*args)

        return run

    h = lambda x: (x @ x.t()).tanh() * x.sum(-1)
    x, v = f64(4, 4), f64(4, 4)
    g = jit(h, strict)
    for k in (
        lambda g: lambda x: g(x).sum(),
        lambda g: lambda x: g(x).sum() * x.sum(),
        lambda g: lambda x: g(x).t() * x,
    ):
        total = lambda x, k=k: k(g)(x).sum()
        assert_same(grad(total)(x), torch.func.grad(lambda x, k=k: k(h)(x).sum())(x))
    pushed = lambda t, g, by, x, v: t.jvp(lambda x: g(by(x)), (x,), (v,))
    for by, a, b in (
        (lambda y: y * 1.0, x, v.t()),
        (lambda y: y.t() * 1.0, x, v.t()),
        (lambda y: y.expand(4, 4), x[0], v[0]),
    ):
        assert_same(pushed(aotfunc, g, by, a, b), pushed(torch.func, h, by, a, b))

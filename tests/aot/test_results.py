"""Compiled code that does otherwise than its graph says is brought to it, or not used;
decompositions likewise."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from aotfunc import aot_function, jit
from aotfunc.backends import REGISTRY
from aotfunc.errors import BackendWarning
from tests.reference import assert_same

aten = torch.ops.aten


@pytest.fixture
def compiler(monkeypatch):
    """``inductor`` with a compiler of ours: its functions are what ``make(gm)`` returns."""

    def set_to(make):
        monkeypatch.setattr(
            sys.modules["aotfunc.backends.inductor"],
            "compiled_by_inductor",
            lambda gm, say: make(gm),
        )

    return set_to


def replaced(index, of):
    """A compiler whose result ``index`` is ``of(args, results)``."""

    def make(gm):
        def fn(args):
            outs = list(gm(*args))
            outs[index] = of(args, outs)
            return outs

        return fn

    return make


@pytest.mark.parametrize(
    "of",
    [
        lambda args, outs: args[0],
        lambda args, outs: args[0].detach(),
        lambda args, outs: outs[0],
        lambda args, outs: outs[1].t().contiguous().t(),
    ],
    ids=["an input", "its memory", "another result", "another layout"],
)
def test_memory_and_layout(compiler, of):
    compiler(replaced(1, of))
    f = jit(lambda x: (x.sin(), x.cos()), "inductor")
    for _ in range(2):
        x = torch.arange(6.0).view(2, 3)
        a, b = f(x)
        assert b.stride() == (3, 1)
        b.fill_(7)
        assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert_same(a, x.sin())


@pytest.mark.parametrize(
    "make",
    [
        replaced(0, lambda args, outs: outs[0].double()),
        replaced(0, lambda args, outs: outs[0][:1]),
        lambda gm: lambda args: 1 / 0,
    ],
    ids=["dtype", "shape", "error"],
)
def test_compiled_code_that_fails_is_not_used(compiler, make):
    compiler(make)
    f = jit(lambda x: torch.rand(3) * x, "inductor")
    x = torch.ones(3)
    torch.manual_seed(0)
    with pytest.warns(BackendWarning, match="the whole graph is run eagerly"):
        got = [f(x), f(x)]
    torch.manual_seed(0)
    assert_same(got, [torch.rand(3), torch.rand(3)])
    assert "run eagerly:\n  forward: the whole graph: " in f.explain()


def test_saved_views_notice_writes(compiler):
    """A residual that the compiled code hands over as a mere piece of an input's memory is a view
    of it again."""

    def make(gm):
        return lambda args: [
            o.detach().data if o.requires_grad else torch.tensor([]).set_(o) for o in gm(*args)
        ]

    compiler(make)
    f = jit(lambda x: (x.t() @ x).sum(), "inductor")
    leaf = torch.randn(3, 3, requires_grad=True)
    x = leaf * 1
    y = f(x)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, leaf)


def test_errors_are_eagers(compiler):
    compiler(lambda gm: lambda args: gm(*args) if args[1].max() < 3 else 1 / 0)
    f = jit(lambda x, i: x[i] * 2, "inductor")
    x = torch.arange(3.0)
    assert f(x, torch.tensor([1, 2])).tolist() == [2, 4]
    with pytest.raises(IndexError):
        f(x, torch.tensor([1, 7]))
    assert f(x, torch.tensor([0, 2])).tolist() == [0, 4]


# decompositions
# -------------------------------------------------------------------------------------------------


def rounded_norm(x, shape, weight, bias, eps):
    """As PyTorch's own: the statistics come in the dtype of the input, where the op's are
    float32."""
    wide = x.float()
    mean, var = wide.mean(-1, keepdim=True), wide.var(-1, keepdim=True, correction=0)
    rstd = (var + eps).rsqrt()
    return ((wide - mean) * rstd * weight + bias).to(x.dtype), mean.to(x.dtype), rstd.to(x.dtype)


def test_decompositions_keep_dtypes():
    weight, bias = torch.randn(8), torch.randn(8)
    f = lambda x: F.layer_norm(x, (8,), weight, bias)
    g = aot_function(f, "eager", decompositions={aten.native_layer_norm.default: rounded_norm})
    x = (torch.randn(4, 8) * torch.tensor([[0.1], [1], [10], [100]])).bfloat16().requires_grad_()
    got, want = g(x), f(x)
    assert_same(got, want, rtol=2e-2, atol=2e-2)
    ct = torch.randn(4, 8).bfloat16()
    assert_same(*(torch.autograd.grad(y, x, ct)[0] for y in (got, want)), rtol=2e-2, atol=2e-2)


def test_decompositions_keep_strides():
    table = {
        aten.sin.default: lambda x: x.t().contiguous().cos().t(),
        aten.mul.Tensor: lambda a, b: a.double() + b,
    }
    f = aot_function(lambda x: (x.sin().view(-1), x.sin() * x), "eager", decompositions=table)
    x = torch.randn(3, 4)
    a, b = f(x)
    assert_same((a, b), (x.cos().view(-1), x.cos() + x))
    assert b.stride() == (4, 1)


def test_decompositions_are_called_as_pytorch_calls_them():
    def add(x, y, *, alpha=1):
        return (
            x + y * alpha
            if isinstance(y, torch.Tensor)
            else aten.add.Tensor(x, torch.full((), y * alpha))
        )

    seen = []

    def softmax(x, dim, half_to_float):
        seen.append((dim, half_to_float))
        return x.exp() / x.exp().sum(dim, keepdim=True)

    table = {aten.add.Scalar: add, aten._softmax.default: softmax}
    f = lambda x: aten.add.Scalar(x, 2.0, 3).softmax(-1)
    x = torch.randn(4)
    assert_same(aot_function(f, "eager", decompositions=table)(x), f(x))
    assert seen == [(0, False)]


def test_decompositions_keep_results_apart():
    table = {
        aten.cat.default: lambda xs, dim=0: xs[0],
        aten.sin.default: lambda x: x,
        aten.cos.default: lambda x: x,
    }
    f = aot_function(lambda x: (torch.cat([x]), x.sin(), x.cos()), "eager", decompositions=table)
    x = torch.zeros(2)
    outs = f(x)
    assert len({t.data_ptr() for t in (x, *outs)}) == 4


# PyTorch's transforms around compiled code
# ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda f: jit(f, "opaque"), lambda f: aot_function(f, "opaque")], ids=["jit", "aot"]
)
def test_batched_and_dual_values_go_past_compiled_code(wrap, monkeypatch):
    def opaque(gm, example_inputs):
        def fn(*args):
            return tuple(
                torch.from_numpy(o.numpy())
                for o in gm(*[torch.from_numpy(a.numpy()) for a in args])
            )

        return fn

    monkeypatch.setitem(REGISTRY, "opaque", opaque)
    f = lambda x: x.sin() * x.sum()
    g = wrap(f)
    x = torch.randn(4)
    jacobian = torch.autograd.functional.jacobian
    assert_same(jacobian(g, x, vectorize=True), jacobian(f, x))
    leaf = x.clone().requires_grad_()
    assert_same(
        torch.autograd.grad(g(leaf), leaf, torch.eye(4), is_grads_batched=True)[0], jacobian(f, x)
    )
    assert_same(jacobian(g, x, vectorize=True, strategy="forward-mode"), jacobian(f, x))
    assert_same(torch.func.jacfwd(g)(x), jacobian(f, x))
    with forward_ad.dual_level():
        got, want = (
            forward_ad.unpack_dual(h(forward_ad.make_dual(x, torch.ones(4)))) for h in (g, f)
        )
    assert_same(tuple(got), tuple(want))


@pytest.mark.parametrize("way", [jit, lambda f: aot_function(f, "eager")])
def test_several_complex_results(way):
    """One node of autograd gives each of them a node of its own."""

    def f(z):
        return z * z, z.exp() * 2, (z * 3).real.sin()

    def run(C):
        z, calls = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True), []
        a, b, c = C(f)(z)
        a.register_hook(lambda g: calls.append("a"))
        b.register_hook(lambda g: g * 2)
        b.mul_(1j)
        assert not (a._is_view() or b._is_view() or calls)
        (g,) = torch.autograd.grad(b.real.sum() + c.sum(), z, create_graph=True)
        (h,) = torch.autograd.grad(g.abs().sum(), z)
        return a.detach(), b.detach(), c.detach(), g.detach(), h, calls

    got, want = run(way), run(lambda f: f)
    assert got[-1] == want[-1]
    assert_same(got[:-1], want[:-1], rtol=1e-5, atol=1e-5)

"""Modes around a call act once: on what the function does, as in eager, never again on what was
recorded of it."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import aotfunc as A
from aotfunc import compile as C
from tests.reference import assert_same


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, W = rand(4, 16), rand(16, 16, seed=1)


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype, enabled, cache_enabled=False)


class Twice(TorchFunctionMode):
    """Doubles each sine; an op of a program that it would see is named ``sin.default``."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.add(out) if "sin" in getattr(func, "__name__", str(func)) else out


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype=torch.float64):
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


@contextlib.contextmanager
def default_device(device="meta"):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "none": contextlib.nullcontext,
    "autocast to bfloat16": autocast,
    "autocast to float16": lambda: autocast(torch.float16),
    "no autocast": lambda: autocast(enabled=False),
    "float64 by default": default_dtype,
    "with torch.device": lambda: torch.device("meta"),
    "set_default_device": default_device,
    "a function mode": Twice,
    "a dispatch mode": Watch,
    "inference mode": torch.inference_mode,
}


# ----- programs: each leaves the ambient mode, or depends on it, in its own way ------------------


def island(w):
    with autocast(enabled=False):
        return (X @ w).sin()


def nested(w):
    with autocast():
        a = X @ w
        with autocast(enabled=False):
            b = X @ w
            with autocast(torch.float16):
                return a.float() + 2 * b + (X @ w).float()


def loss(w):
    with autocast(enabled=False):
        y = X @ w
    return F.mse_loss(y.float(), X) * y


def layers(w):
    return F.layer_norm(F.linear(X, w).relu(), (16,)).softmax(-1)


def factories(w):
    places = torch.arange(16, device="cpu")
    return (X @ w).sin() * (places / 3) + torch.tensor(2.5, device="cpu") * torch.full(
        (16,), 1.5, device="cpu"
    )


class Product(torch.autograd.Function):
    @staticmethod
    def forward(x, w):
        return x @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return (g.to(w.dtype) @ w.t()).to(x.dtype), (x.t() @ g.to(x.dtype)).to(w.dtype)

    @staticmethod
    def vmap(info, in_dims, x, w):
        return torch.matmul(x, w), 0


class Numpy(Product):
    """Its forward needs values: it runs when the program runs."""

    vmap = torch.autograd.Function.vmap

    @staticmethod
    def forward(x, w):
        return x @ w * float(x.detach().numpy().shape[1] / 16)


PROGRAMS = {
    "island": island,
    "nested": nested,
    "loss": loss,
    "plain": lambda w: (X @ w).sin(),
    "layers": layers,
    "factories": factories,
    "Function": lambda w: Product.apply(X, w),
    "Function with numpy": lambda w: Numpy.apply(X, w),
}

COMPILED = {
    "jit": A.jit,
    "aot_function": lambda f: A.aot_function(f, lambda gm, example_inputs: gm),
    "decomposed": lambda f: A.aot_function(
        f, "eager", decompositions={torch.ops.aten.mse_loss.default: squares}
    ),
}


def squares(x, y, reduction=1):
    return torch.dot((x - y).flatten(), (x - y).flatten()) / x.numel()  # which autocast would cast


def close(got, want):
    exact = want.dtype in (torch.float32, torch.float64)
    assert_same(got, want, atol=1e-5 if exact else 1e-2, rtol=1e-4 if exact else 2e-2)


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("mode", MODES)
def test_a_call(mode, program):
    f = PROGRAMS[program]
    plain = f(W)
    with MODES[mode]():
        want = f(W)
        calls = {name: compiled(f) for name, compiled in COMPILED.items()}
        calls |= {
            "grad_and_value": lambda w: A.grad_and_value(
                lambda w: (f(w).sum(), f(w)), has_aux=True
            )(w)[1][1],
            "vmap": lambda w: A.vmap(f)(torch.stack([w, w]))[1],
            "vmap of jit": lambda w: A.vmap(A.jit(f))(torch.stack([w, w]))[1],
            "jvp": lambda w: A.jvp(f, (w,), (w,))[0],
            "vjp": lambda w: A.vjp(f, w)[0],
            "linearize": lambda w: A.linearize(f, w)[0],
            "functionalize": A.functionalize(f),
        }
        for call in calls.values():
            close(call(W), want)
    for name in COMPILED:  # an entry of another mode does not answer
        close(calls[name](W), plain)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("mode", ["none", "autocast to bfloat16", "float64 by default"])
def test_a_backward_at_another_time(mode, program):
    """The derivative is that of the recording, whatever is on when it is asked for (plain
    autograd's own would change: the reference is a backward where nothing is on)."""
    f = PROGRAMS[program]

    def gradient(f, later="none", **options):
        w = W.clone().requires_grad_()
        with MODES[mode]():
            y = f(w)
        y = y.double().sum()
        with MODES[later]():
            return torch.autograd.grad(y, w, **options)[0]

    want = gradient(f)
    rough = (
        {"atol": 2e-2, "rtol": 2e-2}
        if "autocast" in mode or program == "nested"
        else {"atol": 1e-4, "rtol": 1e-4}
    )
    with MODES[mode]():
        y, vjp_fn = A.vjp(f, W)
        _, jvp_fn = A.linearize(f, W)
    tangent = jvp_fn(W)
    for compiled in COMPILED.values():
        g = compiled(f)
        for options in ({}, {"create_graph": True}):
            first = gradient(g, **options)
            assert_same(first, want, **rough)
            for later in MODES:
                if not options or later != "inference mode":  # where eager records no graph either
                    assert_same(gradient(g, later, **options), first, atol=0, rtol=0)
    for later in MODES:
        with MODES[later]():
            assert_same(vjp_fn(torch.ones_like(y))[0], want, **rough)
            assert_same(jvp_fn(W), tangent, atol=0, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_are_traced_without_modes(mode):
    f = lambda w: (
        torch.special.xlog1py(w.sigmoid(), w * w).cumsum(0).std(1) * w.logsumexp(0)
    ).sum()
    orders = lambda w: (
        A.grad(f)(w),
        A.vmap(A.grad(f))(torch.stack([w, w])),
        A.jvp(A.grad(f), (w,), (w,))[1],
    )
    w = rand(5, 5)
    want = orders(w)
    A.transforms.walk._fragments.clear()  # rules are traced anew
    with MODES[mode]():
        got = orders(w)
    assert_same(got, want)
    assert_same(orders(w), want)


def test_a_function_mode_may_change_its_mind():
    class Scale(TorchFunctionMode):
        by = 1

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return out.mul(self.by) if func is torch.sin else out

    g = A.jit(lambda x: torch.sin(x))
    with Scale() as mode:
        for mode.by in (1, 2, 3):
            assert_same(g(X), X.sin() * mode.by)
    assert_same(g(X), X.sin())


@pytest.mark.eager  # there are kernels in the place of these ops
def test_dispatch_modes_see_what_runs():
    from torch.utils.flop_counter import FlopCounterMode

    g, w = A.jit(lambda w: (X @ w).sin()), W.clone().requires_grad_()
    for _ in range(2):
        with Watch() as watch, FlopCounterMode(display=False) as counter:
            g(w).sum().backward()
        assert {torch.ops.aten.sin.default, torch.ops.aten.cos.default} <= set(watch.ops)
        assert counter.get_total_flops() == 2 * 2 * 4 * 16 * 16


def test_values_asked_for_are_those_of_the_recording():
    def f(w):
        with autocast(enabled=False):
            y = X @ w
        return w * y[0, 0].item()

    with autocast():
        want = f(W)
        assert_same(A.functionalize(f)(W), want)
        assert_same(A.vmap(f)(torch.stack([W, W]))[0], want)


def test_inference_mode():
    net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.0))
    g, x = A.jit(net), X.clone()
    with torch.inference_mode():
        made = torch.ones(4, 16)
        for t in (x, made):
            y = g(t)
            assert y.is_inference() and not y.requires_grad
        y, vjp_fn = A.vjp(torch.sin, made)
    assert_same(vjp_fn(made)[0], made.cos())
    assert_same(A.jit(torch.sin)(made), made.sin())
    g(x).sum().backward()
    assert net[0].weight.grad is not None
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        A.jit(lambda x: x.mul_(2))(made)


def test_a_compiler_compiles_and_runs_without_modes():
    seen = []

    def compiler(gm, example_inputs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return lambda *args: (seen.append(torch.is_autocast_enabled("cpu")), gm(*args))[1]

    w = W.clone().requires_grad_()
    with autocast():
        C.aot_function(island, compiler)(w).sum().backward()
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 4


def test_a_default_dtype_set_inside():
    def f(w):
        with default_dtype():
            y = (
                torch.ones(3),
                torch.full((2,), 1.5),
                torch.tensor(2.5),
                w.new_ones(2),
                torch.linspace(0, 1, 3),
            )
            z = A.grad(lambda w: (w * torch.ones(16)).sum())(w.double())
        return y, z, torch.ones(3), w.sum()

    want = f(W)
    for call in (A.jit(f), A.functionalize(f), A.jit(A.jit(f)), lambda w: A.make_fx(f)(w)(w)):
        assert_same(call(W), want)

    def divided(w):
        with default_dtype():
            return w + torch.arange(16) / 3

    with pytest.raises(
        A.errors.CaptureError, match=r"default dtype, which is another one here .*test_modes.py"
    ):
        A.jit(divided)(W)
    assert torch.get_default_dtype() is torch.float32


def test_kernels_of_attention_are_those_of_the_call():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = rand(1, 2, 8, 4)
    f = lambda q: F.scaled_dot_product_attention(q, q, q)
    g = A.jit(f)
    for _ in range(2):
        assert_same(g(q), f(q), atol=0, rtol=0)
        with sdpa_kernel(SDPBackend.MATH):
            assert_same(g(q), f(q), atol=0, rtol=0)
    assert g.captures == 2


def test_compiled_and_transformed_inside_a_region():
    inner = A.jit(lambda w: (X @ w).sin())
    by_sample = lambda w: A.vmap(lambda v: (X @ v).sin())(torch.stack([w, w]))

    def f(w):
        with autocast():
            y, z = inner(w), by_sample(w)
            with autocast(enabled=False):
                return y, z, inner(w), by_sample(w)

    want = (lambda y: (y, torch.stack([y, y])))((X.bfloat16() @ W.bfloat16()).sin())
    exact = (lambda y: (y, torch.stack([y, y])))((X @ W).sin())
    for call in (f, A.jit(f), A.functionalize(f)):
        for mode in ("none", "autocast to float16"):
            with MODES[mode]():
                got = call(W)
            [close(a, b) for a, b in zip(got, (*want, *exact))]

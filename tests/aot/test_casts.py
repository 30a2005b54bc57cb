"""Gradients of what autocast casts several times are added in the dtype in which eager adds them:
those of a leaf in the narrow one, for it is cast once, those of any other tensor in the dtype that
it was cast from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_function, aot_module, grad, jit

BODIES = {
    "matmul": lambda x, w: x @ x,
    "mm": lambda x, w: torch.mm(x, x.t()),
    "bmm": lambda x, w: torch.bmm(x[None], x[None]),
    "addmm": lambda x, w: torch.addmm(x, x, w),
    "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, x),
    "linear": lambda x, w: F.linear(F.linear(x, w), w),
    "a transposed weight": lambda x, w: F.linear(x, w) + F.linear(x, w.t()),
    "convolution": lambda x, w: (
        F.conv1d(x[None], w[..., None]) * F.conv1d(x.t()[None], w[..., None])
    ),
    "float32 ops": lambda x, w: (lambda h: h.exp() + h.softmax(-1) + F.layer_norm(h, (4,)))(x @ w),
    "a loop": lambda x, w: [x := torch.tanh(x @ w) for _ in range(4)][-1],
    "casts by hand": lambda x, w: (
        (x * 1).bfloat16() @ (w * 1).bfloat16() + (lambda y: y.half() + y.half())(x * 1)
    ),
    "a checkpoint": lambda x, w: checkpoint(lambda t: t @ w, x @ w, use_reentrant=False) @ w,
    "no_grad first": lambda x, w: quietly(x, w) + (x @ w) * (w @ x),
    "another dtype inside": lambda x, w: (x @ w, twice(x, w, torch.float16, cache_enabled=False))[
        1
    ],
}
HOWS = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager"),
    "closed over": lambda f: lambda x, w: jit(lambda x: f(x, w))(x),
}

pytestmark = pytest.mark.eager  # the dtype of a sum of gradients shows in its bits


def twice(x, w, dtype=torch.bfloat16, **options):
    with torch.autocast("cpu", dtype, **options):
        return (x @ w) * (w @ x)


@torch.no_grad()
def quietly(x, w):
    return x @ w


def inputs():
    make = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=make).requires_grad_() for _ in range(2)]


def gradients(f):
    x, w = inputs()
    out = f(x, w)
    return [out, *torch.autograd.grad(out.float().sin().sum(), [x, w], allow_unused=True)]


def equal(got, want):
    for mine, theirs in zip(got, want, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("computed", [False, True], ids=["leaves", "computed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("body", BODIES)
def test_each_op(body, dtype, computed):
    def f(x, w):
        with torch.autocast("cpu", dtype):
            return BODIES[body](*([x.tanh(), w * 1] if computed else [x, w]))

    for how in HOWS.values():
        equal(gradients(how(f)), gradients(f))


def test_a_cache_lasts_as_long_as_the_outermost_region():
    def product(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ w

    def parts(x, w):
        return product(x, w) * product(w, x)

    def whole(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return parts(x, w)

    for f in (parts, whole, lambda x, w: twice(x, w, cache_enabled=False)):
        equal(gradients(jit(f)), gradients(f))


def test_the_cache_may_be_switched_off_around_a_call():
    f = jit(lambda x, w: (x @ w) * (w @ x))
    for cached in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            got = gradients(f)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            want = gradients(lambda x, w: (x @ w) * (w @ x))
        equal(got, want)


def test_tied_weights_of_a_module():
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    net = nn.Sequential(linear, nn.Tanh(), linear, nn.LayerNorm(4), linear)
    found = []
    for how in (lambda m: m, lambda m: aot_module(m, "eager"), jit):
        x = inputs()[0]
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = how(net)(x)
        out.float().sin().sum().backward()
        found.append([out, x.grad, *[p.grad for p in net.parameters()]])
    for other in found[1:]:
        equal(other, found[0])


def off(f):
    with torch.autocast("cpu", enabled=False):
        return f()


def on(f, **options):
    with torch.autocast("cpu", torch.bfloat16, **options):
        return f()


#: ``(compiler, module, value)``: nested compiled functions and their surroundings use one weight
NESTED = {
    "outside and inside": lambda C, m, x: m(x) * C(m)(x),
    "inside and outside": lambda C, m, x: C(m)(x) * m(x),
    "inside twice": lambda C, m, x: C(m)(x) * C(lambda x: m(x).tanh())(x),
    "twice inside": lambda C, m, x: C(lambda x: m(x) * (x @ m.weight))(x),
    "an argument": lambda C, m, x: C(torch.matmul)(x, m.weight) * (x @ m.weight),
    "nested deeper": lambda C, m, x: C(lambda x: C(m)(x).tanh())(x) * m(x),
    "a region of its own": lambda C, m, x: C(lambda x: on(lambda: m(x)))(x) * m(x),
    "no gradients first": lambda C, m, x: torch.no_grad()(C(m))(x) * m(x) * C(m)(x),
    "casts that are not kept": lambda C, m, x: (
        C(lambda x: on(lambda: m(x) * (x @ m.weight), cache_enabled=False))(x) * m(x)
    ),
    "none": lambda C, m, x: off(lambda: C(m)(x)) * m(x),
    "written before": lambda C, m, x: (
        C(lambda x: (m.bias.data.mul_(2), m(x))[1])(x) * C(lambda x: m(x))(x)
    ),
}


@pytest.mark.parametrize("cached", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize("region", ["around the call", "in the function"])
@pytest.mark.parametrize("way", ["jit", "aot_function"])
@pytest.mark.parametrize("body", NESTED)
def test_nested_functions_share_casts(body, way, region, cached):
    def gradients(C):
        torch.manual_seed(0)
        m, x = nn.Linear(16, 16), torch.randn(8, 16, requires_grad=True)
        f = lambda x: NESTED[body](C, m, x)
        if region == "around the call":
            out = on(lambda: C(f)(x), cache_enabled=cached)
        else:
            out = C(lambda x: on(lambda: f(x), cache_enabled=cached))(x)
        out.float().sin().sum().backward()
        return [out, x.grad, m.weight.grad, m.bias.grad]

    equal(gradients(HOWS[way]), gradients(lambda f: f))


def test_a_nested_function_is_called_in_other_regions():
    torch.manual_seed(0)
    m, x = nn.Linear(16, 16), torch.randn(8, 16)

    def weights(C):
        inner, found = C(m), []
        f = C(lambda x: m(x) * inner(x))
        for region in (on, off, on, lambda f: on(f, cache_enabled=False), lambda f: f(), on):
            m.zero_grad()
            region(lambda: f(x)).float().sin().sum().backward()
            found.append(m.weight.grad.clone())
        return found

    equal(weights(jit), weights(lambda f: f))


def test_nothing_of_a_capture_is_left_in_the_cache():
    x, w = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        x @ w
        jit(lambda x: (x @ w) * (w @ x))(x).sum().backward()
        assert type(x @ w) is torch.Tensor and torch.is_autocast_cache_enabled()
    assert jit(lambda: torch.is_autocast_cache_enabled())() is True


def test_a_transform():
    x, w = inputs()
    got = grad(lambda x: twice(x.tanh(), w).float().sin().sum())(x)
    want = torch.autograd.grad(twice(x.tanh(), w).float().sin().sum(), x)[0]
    equal([got], [want])

"""Guards: a compiled function never gives the result that was right for another call."""

import functools
import itertools
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from aotfunc import aot_function, grad, jacrev, jit, jvp, linearize, vjp, vmap
from aotfunc.errors import CaptureError
from tests.inputs import f64
from tests.reference import assert_same

Pair = namedtuple("Pair", "left right")


class Counted:
    """``f``, and how often it was run by Python."""

    def __init__(self, f):
        self.f, self.runs = f, 0

    def __call__(self, *args, **kwargs):
        self.runs += 1
        return self.f(*args, **kwargs)


def sign_of(number):
    return torch.copysign(
        torch.ones((), dtype=torch.float64), torch.tensor(number, dtype=torch.float64)
    )


# arguments: pairs of calls that a careless key would take for the same
# --------------------------------------------

PAIRS = {
    "shape": (lambda x: x * x.shape[0], (f64(3),), (f64(4),)),
    "rank": (lambda x: x.sum(-1) + x.dim(), (f64(3, 1),), (f64(3),)),
    "dtype": (lambda x: x / 3, (torch.ones(3),), (torch.ones(3, dtype=torch.float64),)),
    "stride": (lambda x: x.as_strided((4,), (1,)), (f64(2, 2),), (f64(2, 2).t(),)),
    "offset": (lambda x: x.as_strided((2,), (1,), 0) + x, (f64(4)[:2],), (f64(4)[2:],)),
    "int and float": (
        lambda x, n: x * n if isinstance(n, float) else x + n,
        (f64(2), 1),
        (f64(2), 1.0),
    ),
    "int and bool": (lambda x, n: x * 3 if n is True else x + n, (f64(2), 1), (f64(2), True)),
    "zero and False": (lambda x, n: x * 3 if n is False else x + n, (f64(2), 0), (f64(2), False)),
    "signed zero": (lambda x, c: x * 0 + sign_of(c), (f64(2), 0.0), (f64(2), -0.0)),
    "signed zero of numpy": (
        lambda x, c: x * 0 + sign_of(c),
        (f64(2), np.float64(0.0)),
        (f64(2), np.float64(-0.0)),
    ),
    "signed zero, imaginary": (
        lambda x, c: x * 0 + sign_of(c.imag),
        (f64(2), complex(1, 0.0)),
        (f64(2), complex(1, -0.0)),
    ),
    "signed zero in a tuple": (
        lambda x, c: x * 0 + sign_of(c[0]),
        (f64(2), (0.0,)),
        (f64(2), (-0.0,)),
    ),
    "str": (lambda x, s: x.sum() if s == "sum" else x.mean(), (f64(3), "sum"), (f64(3), "mean")),
    "None": (lambda x, y=None: x if y is None else x * y, (f64(3), None), (f64(3), f64(3))),
    "tensor and number": (lambda x, y: x * y, (f64(3), 2.0), (f64(3), torch.tensor(2.0))),
    "tuple and list": (
        lambda x, s: x * len(s) + isinstance(s, list),
        (f64(2), (1, 2)),
        (f64(2), [1, 2]),
    ),
    "nesting": (
        lambda a: a[0] if isinstance(a[1], tuple) else a[1],
        ([_t := f64(2), (f64(2),)],),
        ([_t, f64(2)],),
    ),
    "dictionary order": (
        lambda d: next(iter(d.values())),
        ({"a": f64(2), "b": f64(2)},),
        ({"b": f64(2), "a": f64(2)},),
    ),
    "dictionary keys": (
        lambda d: d[1] if type(next(iter(d))) is int else d[1] * 2,
        ({1: f64(2)},),
        ({1.0: f64(2)},),
    ),
    "namedtuple": (
        lambda p: p[0] * isinstance(p, Pair),
        (Pair(f64(2), f64(2)),),
        ((f64(2), f64(2)),),
    ),
    "slice": (lambda x, s: x[s], (f64(4), slice(0, 2)), (f64(4), slice(2, 4))),
    "slice of bools": (
        lambda x, s: x[s] * isinstance(s.start, bool),
        (f64(4), slice(0, 2)),
        (f64(4), slice(False, 2)),
    ),
    "dtype argument": (lambda x, d: x.to(d), (f64(3), torch.float32), (f64(3), torch.float16)),
    "requires_grad": (
        lambda x: x * 2 if x.requires_grad else x * 3,
        (f64(3),),
        (f64(3).requires_grad_(),),
    ),
}


@pytest.mark.parametrize(
    "compiled", [jit, lambda f: aot_function(f, "eager")], ids=["jit", "aot_function"]
)
@pytest.mark.parametrize("name", PAIRS)
def test_two_calls(name, compiled):
    f, one, other = PAIRS[name]
    for first, second in ((one, other), (other, one)):
        g = compiled(f)
        for args in (first, second, first):
            assert_same(g(*args), f(*args))


def test_same_signature_is_captured_once():
    f = Counted(lambda p, x, n: {"y": p["a"] * x[0] + n})
    g = jit(f)
    for _ in range(3):
        g({"a": f64(3)}, [f64(3)], n=2)
    assert f.runs == 1


@pytest.mark.parametrize("make", [dict, OrderedDict])
def test_dictionaries(make):
    f = jit(lambda d: d["a"] - d["b"])
    d = make(a=f64(2), b=f64(2))
    assert_same(f(d), d["a"] - d["b"])


def test_keywords_and_defaults():
    def f(x, y=2.0, *rest, k=3.0, **more):
        return x * y + k + sum(rest) + sum(more.values())

    g, x = jit(f), f64(2)
    calls = [
        ((x,), {}),
        ((x, 3.0), {}),
        ((x,), {"y": 3.0}),
        ((x, 1.0, 2.0), {"k": 5.0}),
        ((x,), {"z": x}),
    ]
    for first, second in itertools.product(calls, calls):  # each after each other one
        for args, kwargs in (first, first, second):
            assert_same(g(*args, **kwargs), f(*args, **kwargs))


# what the function reaches
# -----------------------------------------------------------------------------------------

GLOBAL: object = 2.0


def uses_global(x):
    return x * GLOBAL


def uses_global_within(x):
    return (lambda y: y * GLOBAL)(x)


@pytest.mark.parametrize("f", [uses_global, uses_global_within])
@pytest.mark.parametrize("value", [3.0, -0.0, 2, True, torch.tensor(5.0)], ids=str)
def test_rebound_global(f, value, monkeypatch):
    x = torch.tensor([1.0, -2.0])
    g = jit(f)
    assert_same(g(x), f(x))
    monkeypatch.setitem(globals(), "GLOBAL", value)
    assert_same(g(x), f(x))


def test_global_defined_later(monkeypatch):
    f = lambda x: x * 5 if "LATER" in globals() and LATER else x  # noqa: F821
    g, x = jit(f), f64(2)
    assert_same(g(x), x)
    monkeypatch.setitem(globals(), "LATER", True)
    assert_same(g(x), x * 5)


def test_rebound_closure():
    s, table, w = 2.0, {"k": [1.0]}, f64(3)
    f = lambda x: x * s * table["k"][0] + w
    g, outer, gradient, x = (
        jit(f),
        jit(jit(f)),
        jit(grad(lambda x: (x * s * table["k"][0]).sum())),
        f64(3),
    )

    def check():
        for h in (g, outer):
            assert_same(h(x), f(x))
        assert_same(gradient(x), torch.full_like(x, s * table["k"][0]))

    check()
    s = 3.0
    check()
    table["k"][0] = 4.0
    check()
    w = f64(3)
    check()
    w.mul_(2)
    check()
    w.data = f64(1)
    check()
    w.data = torch.ones(3, dtype=torch.float16)
    check()


def test_rebound_defaults_and_code():
    def f(x, k=2.0, *, m=1.0):
        return x * k + m

    g, x = jit(f), f64(2)
    assert_same(g(x), f(x))
    f.__defaults__ = (3.0,)
    assert_same(g(x), f(x))
    f.__kwdefaults__ = {"m": 5.0}
    assert_same(g(x), f(x))
    f.__code__ = (lambda x, k=2.0, *, m=1.0: x - k - m).__code__
    assert_same(g(x), f(x))


def test_partial_method_and_callable_object():
    class Scale:
        def __init__(self, m):
            self.m = m

        def __call__(self, x):
            return self.m(x)

        method = __call__

    m, x = nn.Dropout(0.5), f64(8)
    for f in (functools.partial(lambda m, x: m(x), m), Scale(m).method, m.forward):
        m.eval()
        g = jit(f)
        assert_same(g(x), x)
        if not hasattr(f, "__self__") or f.__self__ is m:  # a module that is reached directly
            m.train()
            assert not torch.equal(g(x), x)
    assert_same(jit(Scale(nn.Tanh()))(x), x.tanh())


def test_jit_as_a_method():
    class Net:
        def __init__(self, k):
            self.k = k

        @jit
        def f(self, x):
            return x * self.k

    x = f64(2)
    for k in (2.0, 3.0):
        assert_same(Net(k).f(x), x * k)


# modules
# -------------------------------------------------------------------------------------------------


def test_modules():
    m = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(3))
    g, x = jit(m), torch.randn(4, 3)

    def check(x=x):
        torch.manual_seed(0)
        expected = m.eval()(x) if not m.training else m(x)
        if m.training:
            m[-1].reset_running_stats() if hasattr(m[-1], "reset_running_stats") else None
        torch.manual_seed(0)
        assert_same(g(x), expected)

    m.eval()
    check()
    m.train()
    check()
    m.eval()
    m[1] = nn.Tanh()  # no parameter changes
    check()
    m[0].weight = nn.Parameter(torch.randn(3, 3))
    check()
    with torch.no_grad():
        m[0].weight.mul_(2)
    check()
    m[0] = nn.Linear(3, 3)
    check()
    m[3].running_mean = torch.ones(3)
    check()
    m.double()
    check(x.double())
    m.float()
    check()
    m[3] = nn.Identity()
    check()


def test_frozen_parameter():
    m = nn.Linear(2, 2)
    g, x = jit(m), torch.randn(3, 2)
    g(x).sum().backward()
    m.zero_grad()
    m.weight.requires_grad_(False)
    g(x).sum().backward()
    assert m.weight.grad is None and m.bias.grad is not None


def test_optimizer_step_between_calls():
    m = nn.Linear(2, 1)
    opt, g, x = torch.optim.SGD(m.parameters(), 0.1), jit(m), torch.randn(5, 2)
    for _ in range(4):
        y = g(x)
        assert_same(y, m(x))
        opt.zero_grad()
        y.square().sum().backward()
        opt.step()
    assert len(g.entries) == 1


def test_nothing_is_kept_of_the_arguments():
    import gc
    import weakref

    g, x = jit(lambda x: x * 1.0), f64(3)
    seen = weakref.ref(x)
    g(x)
    del x
    gc.collect()
    assert seen() is None


# surroundings
# -------------------------------------------------------------------------------------------------


def test_grad_mode():
    g, x = jit(lambda x: x * 2 if torch.is_grad_enabled() else x * 3), f64(3).requires_grad_()
    assert g(x).requires_grad
    with torch.no_grad():
        y = g(x)
    assert not y.requires_grad
    with torch.inference_mode():
        assert not g(x).requires_grad
    assert g(x).requires_grad


def test_autocast():
    g, a, b = jit(lambda a, b: a @ b), torch.randn(2, 3), torch.randn(3, 2)
    assert g(a, b).dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert g(a, b).dtype == dtype
    assert g(a, b).dtype == torch.float32


def test_default_dtype_and_device():
    g = jit(lambda x: x + torch.zeros(3))
    assert g(torch.zeros(3)).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert g(torch.zeros(3, dtype=torch.float32)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert g(torch.zeros(3)).device.type == "meta"
    assert g(torch.zeros(3)).device.type == "cpu"


# aliasing of arguments that are written to
# ----------------------------------------------------------------------------


def test_written_arguments_that_share_memory():
    def f(a, b):
        a.mul_(2)
        return a + b

    def check(g, make):
        got, want = make(), make()
        assert_same(g(*got), f(*want))
        assert_same(got, want)

    apart, same = lambda: (torch.arange(3.0), torch.ones(3)), lambda: (t := torch.arange(3.0), t)
    whole = lambda: (t := torch.arange(4.0).view(2, 2), t.t())
    for order in ([apart, same, apart], [same, apart, same], [whole, same, whole]):
        g = jit(f)
        for make in order:
            check(g, make)


def test_closed_over_tensor_that_is_an_argument_too():
    w = torch.ones(3)

    def f(x):
        x.mul_(2)
        return x + w

    g = jit(f)
    assert_same(g(torch.ones(3)), torch.full((3,), 3.0))
    assert_same(g(w), torch.full((3,), 4.0))
    assert_same(g(torch.ones(3)), torch.full((3,), 4.0))


ASKING = {
    "item": lambda x, w: x * w.sum().item(),
    "float": lambda x, w: x * float(w[0]),
    "branch": lambda x, w: x * 2 if w[0] > 1 else x,
    "mask": lambda x, w: x[w > 0].sum() * x,
    "tolist": lambda x, w: x * w.tolist()[0],
    "numpy": lambda x, w: x * float(w.numpy()[0]),
}
AROUND = {
    "nothing": lambda f: f,
    "grad": lambda f: grad(lambda x: f(x).sum()),
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, x])),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
    "vjp": lambda f: lambda x: vjp(f, x)[1](x)[0],
    "jacrev": jacrev,
    "linearize": lambda f: lambda x: linearize(f, x)[1](x),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("asking", ASKING)
def test_values_of_closed_over_tensors_are_not_baked_in(asking, around):
    """They may change between the calls; outside of jit they are asked anew."""
    w, x = torch.tensor([0.5, 2.0]), torch.ones(2)
    f = AROUND[around](lambda x: ASKING[asking](x, w))
    first = f(x)
    w.copy_(torch.tensor([2.5, 3.0]))
    assert not torch.equal(first, f(x)) or asking == "mask"
    with pytest.raises(CaptureError, match="asked for"):
        jit(f)(x)

"""A Python number that is another one at each call of a compiled function: Python runs again, but
the program, of which it is an input, is compiled once and computes what eager does with the
number."""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from aotfunc import aot_function, grad, jit, vmap
from aotfunc.errors import CaptureError
from tests.capture.test_changing_numbers import PAIRS
from tests.reference import assert_same

NUMBERS = (0.3, 0.77, 10.1, 1e-3, 4.0, 123.456, 0.31, 0.32, 0.33)
float_dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Counted:
    """A compiler of one's own: how often it compiles."""

    def __init__(self):
        self.runs = 0

    def __call__(self, gm, inputs):
        self.runs += 1
        return gm


FUNCTIONS = {
    "step": lambda x, t: x - t * (x * x.sin()),
    "quotient": lambda x, t: (x / t).tanh() + t / (1 + x * x),
    "power": lambda x, t: t ** x.abs() + (t - x) * (x + t),
    "compared": lambda x, t: torch.where(x > t, x * t, x % t),
    "computed from": lambda x, t: (x * (t / 3) - (1 - t) * x.cos()) * t,
    "in place": lambda x, t: x.clone().mul_(t).sub_(t),
    "several results": lambda x, t: (x * t, (x * t).sum(), x.t() if x.dim() > 1 else x),
    "from one another": lambda x, t: (lambda h: (h, (h * t).sum(), h.view(-1)[1:] * t))(
        (x * t).sin()
    ),
}


def drawn(dtype, *shape):
    return torch.randn(
        shape or (3, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).to(dtype)


@pytest.mark.parametrize("dtype", float_dtypes)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_eager(name, dtype):
    f = FUNCTIONS[name]
    compiler = Counted()
    for compiled in (jit(f), aot_function(f), aot_function(f, compiler)):
        for t in (*NUMBERS, 7, -11, 0.5, 0.0, 1.0, 2, float("inf")):
            x, y = drawn(dtype).requires_grad_(), drawn(dtype).requires_grad_()
            got, want = compiled(x, t), f(y, t)
            assert_same(got, want, rtol=0, atol=0)
            total = lambda r: sum(o.float().sum() for o in (r if isinstance(r, tuple) else (r,)))
            total(got).backward()
            total(want).backward()
            assert_same(x.grad, y.grad)


def reached(where):
    """A function of ``x`` that reads the number from somewhere, and how to set it."""
    if where == "closure":
        rate = 0.0

        def set_rate(t):
            nonlocal rate
            rate = t

        return (lambda x: x - rate * x.sin()), set_rate
    if where == "list":
        rates = [0.0]
        return (lambda x: x - rates[0] * x.sin()), lambda t: rates.__setitem__(0, t)
    module = torch.nn.Module()
    module.rate = 0.0
    module.forward = lambda x: x - module.rate * x.sin()
    return module, lambda t: setattr(module, "rate", t)


@pytest.mark.parametrize("where", ["closure", "list", "attribute"])
def test_a_number_that_is_read(where):
    f, set_rate = reached(where)
    compiler = Counted()
    compiled = aot_function(f, compiler)
    x = drawn(torch.float32).requires_grad_()
    for t in NUMBERS:
        set_rate(t)
        (slope,) = torch.autograd.grad(compiled(x).sum(), x)
        assert_same(slope, torch.autograd.grad((x - t * x.sin()).sum(), x)[0])
    assert compiler.runs <= 4  # two halves with the number as a literal, two with it as an input


def test_it_is_compiled_twice_and_no_warning():
    compiler = Counted()
    compiled = aot_function(lambda p, x, *, lr: {k: v - lr * x for k, v in p.items()}, compiler)
    p = {"w": drawn(torch.float32), "b": drawn(torch.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(100):
            lr = 0.1 / (1 + 0.37 * i)
            got = compiled(p, p["w"], lr=lr)
            assert_same(got, {k: v - lr * p["w"] for k, v in p.items()}, rtol=0, atol=0)
    assert compiler.runs == 2


def test_what_is_looked_at_is_looked_at_again():
    def f(x, t, log):
        log.append(t)
        y = x * t if t > 0.5 else x / t
        for _ in range(int(10 * t)):
            y = y + t
        return y, f"{t:.2f}", t

    plain = lambda x, t: f(x, t, [])
    compiled = jit(plain)
    x = drawn(torch.float64)
    for t in (0.31, 0.32, 0.61, 0.62, 0.63, 0.33, 0.34, 0.71, 0.31):
        assert_same(compiled(x, t), plain(x, t), rtol=0, atol=0)


def test_numbers_that_only_agree_at_first():
    f = lambda x, s, t: (x * s + t).sin() / s
    compiled, x = jit(f), drawn(torch.float64)
    for s, t in PAIRS:
        assert_same(compiled(x, s, t), f(x, s, t), rtol=0, atol=0)


def test_what_requires_grad_may_change_too():
    f = FUNCTIONS["from one another"]
    compiled = jit(f)
    for t in NUMBERS:
        for needs in (False, True):
            x = drawn(torch.float64).requires_grad_(needs)
            got, want = compiled(x, t), f(x, t)
            assert_same(got, want)
            if needs:
                assert_same(
                    torch.autograd.grad(got[1], got[0]), torch.autograd.grad(want[1], want[0])
                )


@pytest.mark.parametrize("how", ["grad", "vmap", "jit", "grad of vmap"])
def test_inside_of_transforms(how):
    f = lambda x, t: (x * t).tanh() * t
    compiled = jit(f)
    wrap = {
        "grad": lambda f: lambda x, t: grad(lambda x: f(x, t).sum())(x),
        "vmap": lambda f: lambda x, t: vmap(lambda r: f(r, t))(x),
        "jit": lambda f: jit(lambda x, t: f(x, t).sum()),
        "grad of vmap": lambda f: lambda x, t: grad(lambda x: vmap(lambda r: f(r, t))(x).sum())(x),
    }[how]
    mine, plain = wrap(compiled), wrap(f)
    for t in NUMBERS:
        assert_same(mine(drawn(torch.float64), t), plain(drawn(torch.float64), t))


@pytest.mark.parametrize("dtype", float_dtypes)
def test_inductor(dtype):
    """Bit for bit what it computes with a literal; in low precision the number stays one."""
    f = FUNCTIONS["computed from"]
    compiled, x = jit(f, backend="inductor"), drawn(dtype, 7, 11)
    for t in NUMBERS[:4]:
        assert_same(compiled(x, t), jit(f, backend="inductor")(x, t), rtol=0, atol=0)
        if dtype in (torch.bfloat16, torch.float16):
            assert_same(compiled(x, t), f(x, t), rtol=0, atol=0)
    assert (
        dtype not in (torch.float32, torch.float64)
        or len({e.call for e in compiled.entries.values()}) == 2
    )


# ----- without another capture -------------------------------------------------------------------

TWENTY = [0.1 / (1 + 0.37 * i) for i in range(20)]
ONLY_COMPUTED_WITH = {
    "a step": lambda x, t: x - t * (x * x.sin()),
    "either side": lambda x, t: (t - x) * (x + t) + x / t - t / (4.1 + x * x),
    "a comprehension": lambda x, t: [y - t * y.sin() for y in (x, x + 1)],
    "a generator": lambda x, t: sum(t * y for y in (x, x.sin())),
    "a call among the operands": lambda x, t: t * torch.add(x, x.view(-1)[:1], alpha=2),
    "a loop": lambda x, t: [x := x - t * x for _ in range(3)][-1],
    "in place": lambda x, t: x.clone().sub_(t * x.sin()),
    "what is scaled": lambda x, t: torch.add(x, x.sin(), alpha=-t).addcdiv(x, x + 9, value=t),
    "scaled in place": lambda x, t: x.clone().add_(x.sin(), alpha=t).lerp_(x, t),
}


@pytest.mark.parametrize("way", [jit, aot_function])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("name", ONLY_COMPUTED_WITH)
def test_it_is_captured_twice(name, by_name, way):
    f = ONLY_COMPUTED_WITH[name]
    compiled = way(f)
    for t in TWENTY + [7 + i for i in range(20)]:
        x = drawn(torch.float32).requires_grad_()
        y = drawn(torch.float32).requires_grad_()
        got = compiled(x, t=t) if by_name else compiled(x, t)
        assert_same(got, want := f(y, t), rtol=0, atol=0)
        total = lambda r: sum(map(torch.sum, r)) if isinstance(r, list) else r.sum()
        total(got).backward()
        total(want).backward()
        assert_same(x.grad, y.grad)
    assert compiled.captures <= 4  # floats twice, ints twice


SPECIAL = [0.0, -0.0, 1.0, 1, 0, -1, 0.5, 2, True, False, 4, 4.0, 1e-300, 1e300]
SPECIAL += [float("inf"), -float("inf"), float("nan"), 2**53 + 2, -7, 5, 5.0, 12.75]


@pytest.mark.parametrize("dtype", [*float_dtypes, torch.int64])
@pytest.mark.parametrize("name", ONLY_COMPUTED_WITH)
def test_numbers_that_are_not_like_others(name, dtype):
    f = ONLY_COMPUTED_WITH[name]
    # whole registers: PyTorch rounds the product of alpha in bfloat16 and float16 only behind them
    x = drawn(torch.float64, 4, 16).mul(9).to(dtype)
    if name == "in place" and not dtype.is_floating_point:
        return
    compiled = jit(f)
    for t in [*TWENTY[:4], *SPECIAL, *TWENTY[4:6], *SPECIAL[::-1]]:
        try:
            want = f(x, t)
        except RuntimeError:  # overflow
            continue
        assert_same(compiled(x, t), want, rtol=0, atol=0)


class Scaled:
    """An operand of the user's that looks at the number."""

    def __init__(self, x):
        self.x = x

    def __mul__(self, t):
        return self.x * (t if type(t) is float and t > 0.03 else 3.0)

    def __rmul__(self, t):
        return self.x * math.floor(100 * t)


def in_place(x, t):
    y = z = x.clone()
    y *= t
    return y + z


def by_another_name(x, t):
    x = x + 1
    locals()["t"]
    return x * (t if x.dim() else t + 1)


W = torch.linspace(-1, 1, 12).view(3, 4)
ASKING = {
    "compared": lambda x, t: x * t if t > 0.05 else x / t,
    "in a closure": lambda x, t: (lambda y: y * t if t > 0.05 else y / t)(x),
    "read in C": lambda x, t: x * math.sqrt(t),
    "a text": lambda x, t: (x * t, f"{t:.3f}", str(t)),
    "a text made in C": lambda x, t: (x * t, "%.3f" % t),  # noqa: UP031
    "returned": lambda x, t: (x * t, t),
    "an argument": lambda x, t: torch.add(x, x, alpha=t) * t,
    "with a number": lambda x, t: x * (1 - t),
    "its type": lambda x, t: x * t if type(t) is float else x,
    "an operand that looks": lambda x, t: Scaled(x) * t,
    "an operand that looks, on the right": lambda x, t: t * Scaled(x),
    "an array": lambda x, t: x * float((np.ones(2) * t).sum()),
    "a number of numpy": lambda x, t: x * float(np.float64(2) * t),
    "a tensor from outside": lambda x, t: (W * t).sin() * x,
    "a value that is asked for": lambda x, t: x * t if (torch.ones(2) * t).sum() > 0.1 else x / t,
    "in place": in_place,
    "by another name": by_another_name,
    "bound anew": lambda x, t: [t := t * 2, x * t][-1],
    "in an inner transform": lambda x, t: grad(lambda y: (t * y * y).sum())(x),
    "equal to a literal": lambda x, t: x * t + 0.25 * x,
}


@pytest.mark.parametrize("way", [jit, aot_function])
@pytest.mark.parametrize("name", ASKING)
def test_what_asks_gets_its_own_answer(name, way):
    f, x = ASKING[name], drawn(torch.float64)
    compiled = way(f)
    for t in [0.25, *TWENTY, 0.25, *(10 * t for t in TWENTY), 4.0, 0.25]:
        try:
            want = f(x, t)
        except Exception as e:
            with pytest.raises(type(e)):
                compiled(x, t)
            continue
        try:
            got = compiled(x, t)
        except CaptureError:
            continue
        assert_same(got, want, rtol=0, atol=0)


def test_two_numbers_that_meet():
    f = lambda x, s, t: (x * s + t).sin() / s
    compiled, x = jit(f), drawn(torch.float64)
    for s in (0.3, 0.4, 0.7, 0.3, 0.9):
        for t in (0.3, 0.4, 0.7, 0.9, 0.11, 0.3):
            assert_same(compiled(x, s, t), f(x, s, t), rtol=0, atol=0)
    assert compiled.captures <= 8


def test_state_is_guarded_with_any_number():
    rate = [1.0]
    f = lambda x, t: x - t * x * rate[0]
    compiled, x = jit(f), drawn(torch.float64)
    for i, t in enumerate(TWENTY):
        rate[0] = float(i // 5 + 3.5)
        x = drawn(torch.float64, *((3, 4) if i % 2 else (5,)))
        assert_same(compiled(x, t), f(x, t), rtol=0, atol=0)


def test_a_name_that_goes_among_the_keywords():
    def f(x, t=0.3, /, **more):
        return x * t * (math.sqrt(more["t"]) if more else 1)

    compiled, x = jit(f), drawn(torch.float64)
    for t in TWENTY:
        assert_same(compiled(x, t=t), f(x, t=t), rtol=0, atol=0)


def test_it_is_said():
    def f(x, t, *, s):
        return x * t + s * x

    compiled = jit(f)
    for t, n in ((0.3, 3), (0.4, 3), (0.6, 5)):
        compiled(drawn(torch.float64, n), t, s=t / 7)
    text = str(compiled.explain())
    assert "argument t is any float" in text and "argument s is any float" in text
    assert text.endswith("argument x was float64[3], and is float64[5]")


class Keeping:
    """An operand of the user's that keeps the number."""

    last = None

    def __mul__(self, t):
        self.last = t
        return t


def test_an_operand_keeps_the_number():
    keeping = Keeping()
    f = lambda x, t: (x * t, keeping * t)
    compiled, x = jit(f), drawn(torch.float64)
    for t in TWENTY:
        assert_same(compiled(x, t), f(x, t), rtol=0, atol=0)
        assert type(compiled(x, t)[1]) is float
        assert type(keeping.last) is float and keeping.last == t


def test_many_threads():
    f = ONLY_COMPUTED_WITH["either side"]
    compiled, x = jit(f), drawn(torch.float64)

    def work(k):
        for i in range(50):
            t = 0.1 / (1 + 0.37 * i) + k
            assert_same(compiled(x, t), f(x, t), rtol=0, atol=0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

"""``while_loop(checkpoint="revolve")``: the order of steps is the best there is, what lives is
bounded by the slots, derivatives of the backward are those of a Python loop."""

import functools
import itertools
import weakref

import pytest
import torch

from aotfunc import (
    backends,
    cond,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    jvp,
    make_fx,
    scan,
    vmap,
    while_loop,
)
from aotfunc.capture.revolve import backwards
from aotfunc.errors import ArgumentError, RuleError
from aotfunc.extend import pointwise
from tests.reference import assert_same, grads, hess
from tests.sweeps import every

W = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.8, -0.6], [-0.4, 0.2, 0.9]], dtype=torch.float64)
X = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
H = torch.tensor([0.1, -0.05, 0.08], dtype=torch.float64)
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def by_loop(test, body, carry, **options):
    while test(carry):
        carry = body(carry)
    return carry


def grown(loop, w, x, h, slots=3):
    """A carry that counts, constants that are read, and a number of steps that depends on ``h``:
    from 0 to 23."""
    test = lambda c: ((c["h"] ** 2).sum() < 4) & (c["n"] < 23)
    body = lambda c: {"h": torch.sin(w @ c["h"]) * x + c["h"] * 1.05, "n": c["n"] + 1}
    carry = loop(test, body, {"n": torch.tensor(0), "h": h}, checkpoint="revolve", slots=slots)
    return carry["h"].cos().sum()


ours, plain = functools.partial(grown, while_loop), functools.partial(grown, by_loop)


@functools.cache
def fewest(steps, slots):
    """The least steps computed again, by trying all places for the next state that is kept."""
    if steps < 2 or slots == 1:
        return steps * (steps - 1) // 2
    places = range(1, steps)
    return min(k + fewest(steps - k, slots - 1) + fewest(k, slots) for k in places)


def test_the_order_is_the_best():
    for steps in range(45):
        for slots in range(1, 8):
            made, seen = itertools.count(), []
            backwards(steps, slots, 0, lambda k, made=made: (next(made), k + 1)[1], seen.append)
            assert seen == [*range(steps)][::-1]
            assert next(made) == fewest(steps, slots)


# ----- steps and memory --------------------------------------------------------------------------


def step_of(x):
    MADE.append(1)
    y = x * 1.01
    LIVING.add(y)
    PEAK[0] = max(PEAK[0], len(LIVING))
    return y


MADE, PEAK, LIVING = [], [0], weakref.WeakSet()
LIBRARY = torch.library.Library("test_revolve", "DEF")
LIBRARY.define("step(Tensor x) -> Tensor")
LIBRARY.impl("step", step_of, "CPU")
LIBRARY.impl("step", torch.empty_like, "Meta")
pointwise(torch.ops.test_revolve.step, lambda g, out, x: g * 1.01)


def counted(f, most, given):
    """How many steps ran, and carries lived, in the first and the second derivative of ``most``
    steps."""
    x, first = torch.tensor(0.3, dtype=torch.float64), grad(f)
    second = grad(lambda x, given: first(x, given).sin())
    slope = 2 * torch.tensor(1.01, dtype=torch.float64) ** most
    expected = slope * x, slope * (slope * x).cos()
    for derivative, value in zip((first, second), expected, strict=True):
        MADE.clear()
        PEAK[0] = 0
        assert_same(derivative(x, given), value, rtol=1e-9, atol=0)
        yield len(MADE), PEAK[0]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_steps_and_memory(slots):
    def f(x, most):
        body = lambda c: (torch.ops.test_revolve.step(c[0]), c[1] + 1)
        start = x * x, torch.tensor(0)
        loop = functools.partial(while_loop, checkpoint="revolve", slots=slots)
        return loop(lambda c: c[1] < most, body, start)[0].sum()

    for most in (20, 60):
        for order, (made, living) in enumerate(counted(f, most, torch.tensor(most))):
            assert made == most + (1 + order) * fewest(most, slots)
            assert living == slots + 1


# ----- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "scale"), every(2, [(3, 1), (1, 8), (3, 100), (40, 2)]))
def test_derivatives(slots, scale):
    args, wrt = (W, X, H * scale), (0, 1, 2)
    f = functools.partial(ours, slots=slots)
    assert_same(f(*args), plain(*args))
    reference = torch.func.jacrev(torch.func.grad(plain, wrt), wrt)(*args)
    first = torch.func.grad(plain, wrt)(*args)
    assert_same(grad(f, wrt)(*args), first, **TIGHT)
    for outer in (jacrev, jacfwd):
        assert_same(outer(grad(f, wrt), wrt)(*args), reference, **TIGHT)
    assert_same(jacrev(jacfwd(f, wrt), wrt)(*args), reference, **TIGHT)
    leaves = [a.clone().requires_grad_() for a in args]
    for run in (f, jit(f)):
        found = torch.autograd.grad(run(*leaves), leaves, create_graph=True)
        assert_same(found, first, **TIGHT)
        mixed = torch.autograd.grad(found[0].sum(), leaves)
        assert_same(mixed, tuple(r.sum((0, 1)) for r in reference[0]), **TIGHT)


KINKS = {
    "relu": torch.relu,
    "clamp": lambda x: x.clamp(0, 1),
    "amax": lambda x: x.amax() * x,
    "prod": lambda x: x + x[:2].prod(),
    "sort": lambda x: x.sort()[0] * x,
    "cummax": lambda x: x.cummax(0)[0] * x,
}


@pytest.mark.parametrize("name", every(2, KINKS))
def test_kinks(name):
    """Where forward and reverse mode have to choose they choose alike: at zeros, bounds, ties."""
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    body = lambda c: (KINKS[name](c[0]) * 0.9, c[1] + 1)
    found = []
    for loop in (while_loop, by_loop):
        x = torch.tensor([0.0, 1.0, 1.0, -0.5], dtype=torch.float64, requires_grad=True)
        start = x * x + x, torch.tensor(0)
        y = loop(lambda c: c[1] < 3, body, start, checkpoint="revolve", slots=2)[0]
        [first] = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
        found.append((first, torch.autograd.grad((first * weights.flip(0)).sum(), x)))
    assert_same(*found, **TIGHT)


def test_third_derivatives():
    f, g = (lambda h, f=f: f(W, X, h) for f in (ours, plain))
    third = torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(g)))(H)
    assert_same(jacrev(jacrev(jacrev(f)))(H), third, **TIGHT)


def test_each_sample_goes_back_from_its_own_end():
    batch = torch.stack([H, H * 8, H * 100, H * 2])
    one = lambda w, h: plain(w, X, h)
    f = lambda w, h: ours(w, X, h)
    for run in (f, jit(f)):
        got = vmap(grad(run, (0, 1)), (None, 0))(W, batch)
        pairs = [torch.func.grad(one, (0, 1))(W, h) for h in batch]
        assert_same(got, tuple(map(torch.stack, zip(*pairs, strict=True))), **TIGHT)
        together = grad(lambda w, run=run: vmap(run, (None, 0))(w, batch).sum())
        assert_same(together(W), sum(w for w, _ in pairs), **TIGHT)
    second = torch.stack([hess(lambda h: one(W, h), h) for h in batch])
    assert_same(vmap(hessian(lambda h: f(W, h)))(batch), second, **TIGHT)


@pytest.mark.parametrize("backend", ["cpp", lambda gm, example_inputs: gm])
def test_compiled(backend):
    if backend == "cpp" and not backends.auto.possible():
        pytest.skip("no compiler")
    f = lambda h: ours(W, X, h)
    assert_same(jit(grad(f), backend=backend)(H), grads(lambda h: plain(W, X, h))(H), **TIGHT)
    second = hess(lambda h: plain(W, X, h), H)
    assert_same(jit(hessian(f), backend=backend)(H), second, **TIGHT)
    inside = lambda loop: lambda h: loop_in_a_loop(loop, h)
    reference = torch.func.grad(inside(by_loop))(H)
    assert_same(jit(grad(inside(while_loop)), backend=backend)(H), reference, **TIGHT)


def loop_in_a_loop(loop, h):
    """The loop inside of a loop, beside a branch."""
    grow = lambda h: loop(
        lambda h: (h * h).sum() < 1, lambda h: h * 1.5 + h.sin(), h, checkpoint="revolve", slots=2
    )
    if loop is while_loop:
        step = lambda h, x: (cond(x > 0, lambda h: grow(h) * x, torch.sin, h), h.sum())
        h, ys = scan(step, h, X)
        return h.sum() + ys.sum()
    total = 0
    for x in X:
        h, total = grow(h) * x if x > 0 else h.sin(), total + h.sum()
    return h.sum() + total


def test_printed():
    gm = make_fx(grad(lambda h: ours(W, X, h)))(H)
    assert "operators_unwind(" in gm.code and "slots = 3" in gm.code
    assert "aten.add" in gm.unwind_body_2.code
    for scale in (1, 8, 100):
        expected = torch.func.grad(lambda h: plain(W, X, h))(H * scale)
        assert_same(gm(H * scale), expected, **TIGHT)
    again = make_fx(grad(lambda h: gm(h).sin().sum()))(H)
    reference = torch.func.grad(lambda h: torch.func.grad(lambda h: plain(W, X, h))(h).sin().sum())
    assert_same(again(H), reference(H), **TIGHT)


# ----- what is refused ---------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    """The sine, with another derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        [x] = ctx.saved_tensors
        return g * x.cos() * x


class Forward(Twice):
    @staticmethod
    def jvp(ctx, t):
        return t


def test_rules_of_the_users():
    """Reverse mode takes theirs as autograd does; what would need more of them is refused."""

    def f(loop, x, function=Twice):
        body = lambda c: (function.apply(c[0] + 1) * x, jit(torch.add)(c[1], 1))
        start = x, torch.tensor(0)
        return loop(lambda c: c[1] < 4, body, start, checkpoint="revolve", slots=2)[0].sum()

    leaf = H.clone().requires_grad_()
    [first] = torch.autograd.grad(f(by_loop, leaf), leaf, create_graph=True)
    [second] = torch.autograd.grad(first.sin().sum(), leaf)
    ours = grad(lambda x: f(while_loop, x))
    assert_same(ours(H), first.detach(), **TIGHT)
    assert_same(grad(lambda x: ours(x).sin().sum())(H), second, **TIGHT)
    words = r"second derivative of while_loop.*own rule.*max_steps"
    with pytest.raises(RuleError, match=words):
        hessian(lambda x: f(while_loop, x))(H)
    with pytest.raises(RuleError, match=words):
        grad(lambda x: grad(lambda x: f(while_loop, x, Forward))(x).sum())(H)


def test_hooks_of_steps():
    """A hook acts on cotangents, so the backward is no transpose of a loop that carries
    tangents."""

    def f(loop, x):
        def body(c):
            y = c[0] * x
            y.register_hook(lambda g: g * 2)
            return y.sin(), c[1] + 1

        start = x, torch.tensor(0)
        return loop(lambda c: c[1] < 3, body, start, checkpoint="revolve", slots=2)[0].sum()

    ours, leaf = functools.partial(f, while_loop), X.clone().requires_grad_()
    first = torch.func.grad(functools.partial(f, by_loop))(X)
    for run in (ours, jit(ours)):
        assert_same(grad(run)(X), first, **TIGHT)
        assert_same(torch.autograd.grad(run(leaf), leaf), (first,), **TIGHT)
        with pytest.raises(RuleError, match=r"through hook, whose own rule.*max_steps"):
            [found] = torch.autograd.grad(run(leaf), leaf, create_graph=True)
            torch.autograd.grad(found.sum(), leaf)
    for second in (hessian(ours), jit(jacrev(grad(ours)))):
        with pytest.raises(RuleError, match=r"through hook, whose own rule.*max_steps"):
            second(X)


def test_draws_are_refused():
    f = lambda x: while_loop(
        lambda x: x < 3, lambda x: x + torch.rand(()), x, checkpoint="revolve", slots=2
    )
    assert f(torch.tensor(0.0)) >= 3
    with pytest.raises(RuleError, match=r"draws random numbers.*draw them before the loop") as e:
        grad(f)(torch.tensor(0.0))
    assert "test_revolve.py" in str(e.value)


def test_draws_of_the_condition():
    """The backward runs no condition: it goes back from the step where the loop ended."""

    def f(x, loop=while_loop):
        test = lambda c: (c[1] < 9) & (torch.rand(()) < 0.8)
        body = lambda c: ((c[0] * x).sin(), c[1] + 1)
        start = x, torch.tensor(0)
        return loop(test, body, start, checkpoint="revolve", slots=2)[0].sum()

    for seed in range(3):
        found = []
        for derivative in (torch.func.grad(lambda x: f(x, by_loop)), grad(f), jit(grad(f))):
            torch.manual_seed(seed)
            found.append((derivative(X), torch.rand(())))
        assert_same(found[1], found[0], **TIGHT)
        assert_same(found[2], found[0], **TIGHT)
    slope = lambda x: grad(f)(x).sum()
    for second in (grad(slope), jit(grad(slope)), lambda x: jvp(slope, (x,), (x,))):
        with pytest.raises(RuleError, match=r"whose condition draws.*draw them before the loop"):
            second(X)


WRONG = {"often": 2}, {"checkpoint": "revolve"}, {"checkpoint": 3, "slots": 2}, {"slots": 2}
WRONG = [
    *WRONG[1:],
    {"checkpoint": "revolve", "slots": 0},
    {"checkpoint": "revolve", "slots": 1.5},
    {"checkpoint": "revolve", "slots": True},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_options_are_checked(options):
    with pytest.raises(ArgumentError, match="slots") as e:
        while_loop(lambda x: x < 3, lambda x: x + 1, torch.tensor(0.0), **options)
    assert "test_revolve.py" in str(e.value)


# ----- scans -------------------------------------------------------------------------------------


def rows(loop, w, h, xs, **options):
    """A carry that counts, constants, rows that are read and rows that are made."""

    def step(c, x):
        h = torch.sin(w @ c["h"]) * x + c["h"] * 0.5
        return {"h": h, "n": c["n"] + 1}, (h * x, x.exp().sum(), c["n"])

    carry, (y, z, _) = loop(step, {"h": h, "n": torch.tensor(0)}, xs, **options)
    return carry["h"].sin().sum() + (y * y).sum() + z.cos().sum()


XS = torch.stack([X, X * 0.3, -X, X.flip(0), X * 0.1, X * -0.7, X.cos()])
BOTH = functools.partial(rows, scan), functools.partial(rows, scan, checkpoint="revolve", slots=3)
OF_SCANS = {
    "grad": lambda f: grad(f, (0, 1, 2)),
    "grad of vmap": lambda f: grad(lambda w, h, xs: vmap(f, (None, 0, None))(w, xs, xs).sum()),
    "vmap of grad": lambda f: (
        lambda w, h, xs: vmap(grad(f, (0, 1, 2)), (None, 0, 1))(
            w, xs[:3], xs[:, None] * XS[:, :3, None]
        )
    ),
    "jacrev of grad": lambda f: jacrev(grad(f, (0, 1, 2)), (0, 1, 2)),
    "jacfwd of grad": lambda f: jacfwd(grad(f, (0, 1, 2)), (0, 1, 2)),
    "grad of jacfwd": lambda f: jacrev(jacfwd(f, (0, 1, 2)), (0, 1, 2)),
    "third": lambda f: jacrev(hessian(f), 2),
    "cpp": lambda f: jit(hessian(f, (0, 2)), backend="cpp"),
    "printed": lambda f: lambda *a: make_fx(hessian(f, 1))(*a)(*a),
    "printed, then differentiated": lambda f: (
        lambda *a: jacrev(make_fx(grad(f, (0, 2)))(*a), 1)(*a)
    ),
}


@pytest.mark.parametrize("reverse, unroll", [(False, 1), (True, 1), (True, 3)])
@pytest.mark.parametrize("name", every(4, OF_SCANS))
def test_scans(name, reverse, unroll):
    """The numbers of the scan that keeps values of every step."""
    plain, ours = [functools.partial(f, reverse=reverse, unroll=unroll) for f in BOTH]
    assert_same(OF_SCANS[name](ours)(W, H, XS), OF_SCANS[name](plain)(W, H, XS), **TIGHT)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_scans(length):
    for derivative in (grad, hessian):
        want, got = [derivative(f, 2)(W, H, XS[:length]) for f in BOTH]
        assert_same(got, want, **TIGHT)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_steps_and_memory_of_scans(slots):
    def f(x, xs):
        step = lambda h, r: (torch.ops.test_revolve.step(h) + r, ())
        return scan(step, x * x, xs, checkpoint="revolve", slots=slots)[0].sum()

    for most in (20, 60):
        xs = torch.zeros(most, dtype=torch.float64)
        for order, (made, living) in enumerate(counted(f, most, xs)):
            assert made == (1 + order) * fewest(most, slots)  # the value is not read
            assert living <= slots + 1


def test_scans_that_are_refused():
    step = lambda h, x: (h * x, torch.rand(()))
    with pytest.raises(RuleError, match=r"through scan.*draws random numbers") as e:
        grad(lambda h: scan(step, h, XS[:, 0], checkpoint="revolve", slots=2)[0])(X[0])
    assert "test_revolve.py" in str(e.value)
    twice = lambda h: scan(
        lambda h, x: (Twice.apply(h) * x, ()), h, XS, checkpoint="revolve", slots=2
    )
    assert grad(lambda h: twice(h)[0].sum())(X).shape == (3,)
    with pytest.raises(RuleError, match=r"second derivative of scan.*own rule.*scan\(...\)"):
        hessian(lambda h: twice(h)[0].sum())(X)
    for options in ({"checkpoint": "revolve"}, {"slots": 2}, {"checkpoint": 2, "slots": 2}):
        with pytest.raises(ArgumentError, match="scan: slots"):
            scan(step, X[0], XS[:, 0], **options)
    with pytest.raises(ArgumentError, match="slots must be a positive int"):
        scan(step, X[0], XS[:, 0], checkpoint="revolve", slots=0)
    with pytest.raises(ArgumentError, match="a policy or 'revolve'"):
        scan(step, X[0], XS[:, 0], checkpoint="often")

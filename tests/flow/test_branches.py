"""``cond``, ``switch``, ``while_loop`` and ``associative_scan``: one branch runs, a batch takes
nothing from branches that it does not take, loops end where they should, errors say what
differs."""

import pytest
import torch

import aotfunc
from aotfunc import (
    associative_scan,
    cond,
    grad,
    hessian,
    jit,
    jvp,
    linearize,
    make_fx,
    scan,
    switch,
    vjp,
    vmap,
    while_loop,
)
from aotfunc.errors import ArgumentError, CaptureError, RuleError
from aotfunc.extend import pointwise
from tests.reference import assert_same

X = torch.tensor([0.3, -0.8, 1.1, 0.0], dtype=torch.float64)
H = torch.tensor([0.5, -0.2], dtype=torch.float64)


RAN = []
LIBRARY = torch.library.Library("test_branches", "DEF")
LIBRARY.define("noted(Tensor x) -> Tensor")
LIBRARY.impl("noted", lambda x: RAN.append(1) or x.clone(), "CPU")
LIBRARY.impl("noted", torch.empty_like, "Meta")
pointwise(torch.ops.test_branches.noted, lambda g, out, x: g)


def test_one_branch_runs():
    noted = torch.ops.test_branches.noted
    f = lambda p, x: cond(p, lambda x: x * 2, lambda x: noted(x.sin()), x)
    for run in (f, jit(f), vmap(f, (None, 0))):
        run(torch.tensor(True), X)
        RAN.clear()
        assert_same(run(torch.tensor(True), X), X * 2)
        assert not RAN
        assert_same(run(torch.tensor(False), X), X.sin())
        assert RAN
    RAN.clear()
    assert_same(vmap(f)(torch.tensor([True] * 4), X), X * 2)
    assert not RAN  # no sample takes it


SAFE = {
    "log": (torch.log, lambda x: x * 2),
    "sqrt": (torch.sqrt, lambda x: x.square()),
    "divide": (lambda x: 1 / x, lambda x: x + 1),
    "norm": (lambda x: (x * x).sum().sqrt(), lambda x: x.sum() * 0),
}


@pytest.mark.parametrize("name", SAFE)
def test_nothing_leaks_from_a_branch_not_taken(name):
    good, other = SAFE[name]
    f = lambda x: cond(x > 0, good, other, x)
    taken = lambda x: good(x) if x > 0 else other(x)
    tangent = lambda f: lambda x: jvp(f, (x,), (x,))[1]
    for wrap in (lambda f: f, grad, lambda f: grad(grad(f)), tangent):
        assert_same(vmap(wrap(f))(X), torch.stack([wrap(taken)(x) for x in X]))
    together = lambda x: vmap(f)(x).sum()
    assert_same(grad(together)(X), torch.stack([grad(taken)(x) for x in X]))
    assert_same(hessian(together)(X).diag(), torch.stack([grad(grad(taken))(x) for x in X]))
    assert_same(jit(grad(together))(X), grad(together)(X))
    weights = lambda w: vmap(lambda x: cond(x > 0, lambda x: (w * x).log(), lambda x: w * x, x))(X)
    one = lambda w, x: (w * x).log() if x > 0 else w * x
    w = X[2]
    assert_same(grad(lambda w: weights(w).sum())(w), sum(grad(one)(w, x) for x in X))


def test_switch_is_clamped_and_a_batch_chooses():
    branches = [torch.sin, lambda x: x * 2, torch.exp]
    for i, k in ((-3, 0), (0, 0), (1, 1), (2, 2), (9, 2)):
        assert_same(switch(torch.tensor(i), branches, X), branches[k](X))
        assert_same(switch(i, branches, X), branches[k](X))
    index = torch.tensor([5, 1, 0, 2])
    f = lambda i, x: switch(i, branches, x)
    assert_same(vmap(f)(index, X), torch.stack([f(i, x) for i, x in zip(index, X)]))
    assert_same(vmap(f, (0, None))(index, X), torch.stack([f(i, X) for i in index]))
    assert_same(
        vmap(vmap(f, (0, None)), (None, 0))(index, X),
        vmap(vmap(f, (None, 0)), (0, None))(index, X).t(),
    )


def test_branches_close_over_tensors_and_return_trees():
    w = H.clone().requires_grad_()

    def f(p, x):
        yes = lambda x: {"a": w * x, "b": (x.sum(), None)}
        return cond(p, yes, lambda x: {"a": x.clone(), "b": (w.prod(), None)}, x)

    for p in (True, False):
        for pred in (p, torch.tensor(p), torch.tensor([float(p)])):
            out = f(pred, H)
            assert_same(out, {"a": w * H if p else H, "b": ((H.sum() if p else w.prod()), None)})
        (out["a"].sum() + out["b"][0]).backward()
    assert_same(w.grad, H + w.detach().flip(0))


def test_results_of_a_branch_are_not_its_arguments():
    out = cond(torch.tensor(True), lambda x: (x, x.view(2, 2)), lambda x: (x + 1, x.view(2, 2)), X)
    assert len({t.untyped_storage().data_ptr() for t in (*out, X)}) == 3


def test_residuals_share_their_places():
    f = lambda p, x: cond(p, lambda x: x.sin().exp(), lambda x: x.tanh() * x.cos(), x).sum()
    gm = make_fx(grad(f, 1))(torch.tensor(True), X)
    forward = next(m for m in gm.children() if isinstance(m, torch.fx.GraphModule))
    results = next(iter(reversed(forward.graph.nodes))).args[0]
    assert len(results) == 3  # the result, and the two that the second branch keeps
    for p in (True, False):
        assert_same(gm(torch.tensor(p), X), grad(f, 1)(p, X))


def test_trees_may_come_in_another_order():
    f = lambda p: cond(p, lambda: {"a": X, "b": X[0]}, lambda: {"b": X[1], "a": X * 2})
    assert_same(f(torch.tensor(False)), {"b": X[1], "a": X * 2})
    step = lambda c: {"n": c["n"] + 1, "x": c["x"] * 2}
    out = while_loop(lambda c: c["n"] < 3, step, {"x": X, "n": 0})
    assert_same(out, {"x": X * 8, "n": torch.tensor(3)})


def test_draws_in_a_loop_of_unknown_length():
    step = lambda c: (c[0] + torch.rand(()), c[1] + 1)
    f = lambda x: while_loop(lambda c: c[1] < 3, step, (x, torch.tensor(0)))[0]
    x = torch.zeros((), requires_grad=True)
    torch.manual_seed(1)
    out = f(x)
    torch.manual_seed(1)
    assert_same(out, sum(torch.rand(()) for _ in range(3)))
    assert_same(jvp(f, (x.detach(),), (x.detach() + 2,))[1], torch.tensor(2.0))
    with pytest.raises(RuleError, match="number of steps is not known"):
        grad(f)(x.detach())


def test_draws_in_branches():
    f = lambda p: cond(p, lambda: torch.rand(3), lambda: torch.zeros(3))
    torch.manual_seed(1)
    got = [f(torch.tensor(p)) for p in (False, True)]
    torch.manual_seed(1)
    assert_same(got, [torch.zeros(3), torch.rand(3)])


# ----- while_loop --------------------------------------------------------------------------------


def root(a):
    """The square root by Newton's method; from 1, in a number of steps that depends on ``a``."""
    far = lambda x: (x * x - a).abs() > 1e-12
    return while_loop(far, lambda x: (x + a / x) / 2, torch.ones_like(a))


def doublings(x, most=None):
    test = lambda c: c["x"] < 10
    return while_loop(test, lambda c: {"x": c["x"] * 2, "n": c["n"] + 1}, {"x": x, "n": 0}, most)


def test_each_sample_stops_at_its_own_step():
    x = torch.tensor([1.0, 9.0, 12.0, 3.0])
    out = vmap(doublings)(x)
    assert_same(
        out, {"x": torch.tensor([16.0, 18.0, 12.0, 12.0]), "n": torch.tensor([4, 1, 0, 2])}
    )
    assert_same(grad(lambda x: vmap(doublings)(x)["x"].sum())(x), torch.tensor([16.0, 2, 1, 4]))
    assert_same(vmap(lambda x: jvp(lambda x: doublings(x)["x"], (x,), (x,))[1])(x), out["x"])
    assert_same(vmap(grad(lambda x: doublings(x)["x"]))(x), torch.tensor([16.0, 2, 1, 4]))


@pytest.mark.parametrize("most", [1, 2, 4, 7])
def test_max_steps(most):
    x, n = torch.tensor(1.0), min(most, 4)
    assert_same(doublings(x, most), {"x": x * 2**n, "n": torch.tensor(n)})
    f = lambda x: doublings(x, most)["x"]
    for wrap in (lambda f: f, jit):
        assert_same(wrap(grad(f))(x), torch.tensor(2.0**n))
        assert_same(grad(wrap(f))(x), torch.tensor(2.0**n))
    assert_same(vmap(grad(f))(torch.tensor([1.0, 20.0])), torch.tensor([2.0**n, 1.0]))


def test_derivatives_of_a_root():
    a = torch.tensor([2.0, 9.0, 0.1], dtype=torch.float64)
    tight = {"rtol": 1e-9, "atol": 1e-12}
    assert_same(vmap(root)(a), a.sqrt(), **tight)
    assert_same(vmap(grad(root))(a), 0.5 / a.sqrt(), rtol=1e-5, atol=1e-6)
    for x in a:
        first, second = 0.5 * x**-0.5, -0.25 * x**-1.5
        assert_same(jvp(root, (x,), (x,))[1], first * x, rtol=1e-5, atol=1e-6)
        assert_same(linearize(root, x)[1](x), jvp(root, (x,), (x,))[1], **tight)
        assert_same(vjp(root, x)[1](x)[0], jvp(root, (x,), (x,))[1], **tight)
        assert_same(
            grad(grad(root))(x),
            grad(lambda y: jvp(root, (y,), (torch.ones_like(y),))[1])(x),
            **tight,
        )
        assert_same(grad(grad(root))(x), second, rtol=1e-3, atol=1e-3)
    leaf = a[0].clone().requires_grad_()
    root(leaf).backward()
    assert_same(leaf.grad, grad(root)(a[0]))


def test_reverse_mode_of_an_unbounded_loop_says_what_to_write():
    with pytest.raises(RuleError, match=r"number of steps is not known.*max_steps") as e:
        jit(grad(lambda x: doublings(x)["x"]))(torch.tensor(1.0))
    assert "test_branches.py" in str(e.value)
    assert_same(jit(lambda x: doublings(x)["x"])(torch.tensor(1.0)), torch.tensor(16.0))


def test_steps_that_are_too_many_do_not_leak():
    f = lambda x: while_loop(lambda y: y > 1, lambda y: (y - 1).sqrt(), x, max_steps=9)
    x = torch.tensor([30.0, 1.0, 3.0], dtype=torch.float64)

    def plain(y):
        while y > 1:
            y = (y - 1).sqrt()
        return y

    expected = torch.stack([torch.func.grad(plain)(y) for y in x])
    assert_same(vmap(grad(f))(x), expected)
    assert_same(grad(lambda x: vmap(f)(x).sum())(x), expected)
    assert torch.isfinite(vmap(grad(grad(f)))(x)).all()


def test_control_flow_in_control_flow():
    def f(x, xs):
        def step(c, row):
            small = lambda c: while_loop(lambda c: c.abs() < 1, lambda c: c * 1.5, c, 20)
            c = cond(row > 0, small, lambda c: c * row.cos(), c)
            return c, c

        return scan(step, x, xs)[1].sum()

    def plain(x, xs):
        total, c = 0, x
        for row in xs:
            if row > 0:
                while c.abs() < 1:
                    c = c * 1.5
            else:
                c = c * row.cos()
            total = total + c
        return total

    x, xs = X[0], torch.tensor([0.2, -1.0, 0.4, -0.3], dtype=torch.float64)
    for ours in (f, jit(f), make_fx(f)(x, xs)):
        assert_same(ours(x, xs), plain(x, xs))
        assert_same(grad(ours, (0, 1))(x, xs), torch.func.grad(plain, (0, 1))(x, xs))
    batch = torch.stack([xs, -xs, xs.flip(0)])
    got = vmap(grad(f, 1), (None, 0))(x, batch)
    assert_same(got, torch.stack([torch.func.grad(plain, 1)(x, row) for row in batch]))


# ----- associative_scan --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16, 21])
@pytest.mark.parametrize("reverse", [False, True])
def test_associative_scan(count, reverse):
    """Composition of affine maps, which does not commute, along the last dimension."""
    a, b = torch.randn(2, 3, count, dtype=torch.float64).unbind(0)
    after = lambda x, y: {"a": x["a"] * y["a"], "b": y["a"] * x["b"] + y["b"]}

    def by_loop(a, b):
        rows, found = list(zip(a.unbind(1), b.unbind(1))), []
        for x, y in reversed(rows) if reverse else rows:
            before = found[-1] if found else {"a": torch.ones(3), "b": torch.zeros(3)}
            found.append(after(before, {"a": x, "b": y}))
        found = found[::-1] if reverse else found
        return {k: torch.stack([f[k] for f in found], 1) for k in "ab"}

    ours = lambda a, b: associative_scan(after, {"a": a, "b": b}, reverse, dim=-1)
    tight = {"rtol": 1e-10, "atol": 1e-12}
    assert_same(ours(a, b), by_loop(a, b), **tight)
    scalar = lambda f: lambda a, b: f(a, b)["b"].sin().sum()
    expected = torch.func.grad(scalar(by_loop), (0, 1))(a, b)
    assert_same(grad(scalar(ours), (0, 1))(a, b), expected, **tight)
    assert_same(jit(grad(scalar(ours), (0, 1)))(a, b), expected, **tight)


# ----- errors ------------------------------------------------------------------------------------


ERRORS = {
    "predicate": (lambda: cond("yes", torch.sin, torch.cos, X), "pred must be a tensor .* a str"),
    "several": (lambda: cond(X > 0, torch.sin, torch.cos, X), r"one element, not bool\[4\]"),
    "structure": (
        lambda: cond(X[0] > 0, lambda: (X, X), lambda: X),
        r"equal structure.* returned float64\[4\], .* \(float64\[4\], float64\[4\]\)",
    ),
    "shape": (lambda: cond(X[0] > 0, lambda: X, lambda: X[:2]), r"float64\[2\].*float64\[4\]"),
    "index": (lambda: switch(X[0], [torch.sin], X), "must be an integer, not torch.float64"),
    "none": (lambda: switch(torch.tensor(0), [], X), "no branches"),
    "test": (
        lambda: while_loop(lambda c: c > 0, lambda c: c, X),
        r"must return a tensor with one element, not bool\[4\]",
    ),
    "a number": (lambda: while_loop(lambda c: True, lambda c: c, X), "one element, not bool"),
    "carry": (
        lambda: while_loop(lambda c: c.sum() > 0, lambda c: (c, c), X),
        r"it got float64\[4\] and returned \(float64\[4\], float64\[4\]\)",
    ),
    "most": (lambda: while_loop(torch.sum, torch.sin, X, max_steps=0), "positive int, not 0"),
    "dim": (lambda: associative_scan(torch.add, X, dim=1), "has no dimension 1"),
    "changes": (
        lambda: associative_scan(lambda a, b: (a, b), X),
        r"must return what it gets.*float64\[2\], not \(float64",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    run, words = ERRORS[name]
    with pytest.raises(ArgumentError, match=words) as e:
        run()
    assert "test_branches.py" in str(e.value) or name == "most"


def test_branches_do_not_write_outside():
    for write in (lambda: X.mul_(2), lambda: X.data.mul_(2)):
        with pytest.raises(CaptureError, match="writes to a tensor from outside"):
            cond(X[0] > 0, write, lambda: X + 1)
    with pytest.raises(CaptureError, match="writes to its argument"):
        cond(X[0] > 0, lambda x: x.mul_(2), lambda x: x, X)
    assert aotfunc.cond is cond and X[0] == 0.3


def test_a_loop_without_a_bound_beside_what_is_differentiated():
    def f(x, w):
        count = torch.tensor(0)
        step = lambda c: (c[0] + 1, c[1] * 2)
        return (x * while_loop(lambda c: c[0] < 3, step, (count, w))[1]).sin()

    x = torch.ones(3, requires_grad=True)
    y = jit(f)(x, torch.ones(3))
    y.sum().backward()
    assert_same(y, torch.full((3,), 8.0).sin())
    assert_same(x.grad, 8 * torch.full((3,), 8.0).cos())


def without_grad(w, h):
    with torch.no_grad():
        gate = (w * h).sigmoid()
    return (h * 2).sin() * gate


COUNT = torch.tensor(0)
#: bodies in which ``w`` is read under ``no_grad`` alone
UNUSED = {
    "cond": lambda w, h: cond(h[0] > 0, without_grad, lambda w, h: without_grad(w, h * 2), w, h),
    "cond of nothing": lambda w, h: h + cond(h[0] > 0, torch.sin, torch.cos, w.detach()),
    "while_loop": lambda w, h: while_loop(
        lambda c: c[1] < 3, lambda c: (without_grad(w, c[0]), c[1] + 1), (h, COUNT), max_steps=4
    )[0],
    "revolve": lambda w, h: while_loop(
        lambda c: c[1] < 3,
        lambda c: (without_grad(w, c[0]), c[1] + 1),
        (h, COUNT),
        checkpoint="revolve",
        slots=2,
    )[0],
    "scan": lambda w, h: scan(lambda h, x: (without_grad(w, h * x), None), h, h)[0],
    "scan by revolve": lambda w, h: scan(
        lambda h, x: (without_grad(w, h * x), None), h, h, checkpoint="revolve", slots=2
    )[0],
}


@pytest.mark.parametrize("name", UNUSED)
def test_what_no_branch_or_step_differentiates_has_no_gradient(name):
    """None, as autograd's, at second order, too."""
    w, h = (X[:2].clone().requires_grad_() for _ in range(2))
    out = jit(lambda w, h: UNUSED[name](w, h).sum())(w, h)
    first = torch.autograd.grad(out, (w, h), create_graph=True, allow_unused=True)
    assert first[0] is None and first[1] is not None
    if first[1].requires_grad:
        total = first[1].square().sum()
        assert torch.autograd.grad(total, (w, h), allow_unused=True)[0] is None


def test_a_branch_that_returns_one_tensor_twice():
    """Its results are one tensor; those of compiled code are, if all branches agree on it."""
    twice = lambda x: (lambda y: {"a": y, "b": [y, x * 3]})(x * 2)
    apart = lambda x: {"a": x.sin(), "b": [x.cos(), x * 1]}
    for run, branches, one in [
        (lambda f: f, (twice, apart), True),
        (lambda f: f, (apart, twice), False),
        (lambda f: jit(f), (twice, twice), True),
        (lambda f: jit(f), (twice, apart), False),
    ]:
        found = run(lambda x, branches=branches: cond(x.sum() > -99, *branches, x))(X)
        assert (found["a"] is found["b"][0]) is one
        assert_same(found, branches[0](X))
        found["b"][1].add_(1)
        assert_same(found["a"], branches[0](X)["a"])

"""``vmap(cond="map")``: each sample goes its own way alone, under every transform."""

import pytest
import torch

from aotfunc import backends, cond, grad, hessian, jit, jvp, make_fx, psum, vmap, while_loop
from aotfunc.errors import ArgumentError, RuleError
from aotfunc.extend import pointwise
from tests.flow.test_branches import SAFE
from tests.reference import assert_same

X = torch.tensor([0.3, -0.8, 1.1, 0.0], dtype=torch.float64)
BACKENDS = ["eager", *["cpp"] * backends.auto.possible()]

SEEN: list = []
LIBRARY = torch.library.Library("test_one_by_one", "DEF")
LIBRARY.define("seen(Tensor x) -> Tensor")
LIBRARY.impl("seen", lambda x: SEEN.append(x.tolist()) or x.clone(), "CPU")
LIBRARY.impl("seen", torch.empty_like, "Meta")
pointwise(torch.ops.test_one_by_one.seen, lambda g, out, x: g)


def mapped(f):
    return vmap(f, cond="map")


def tangent(f):
    return lambda x: jvp(f, (x,), (x,))[1]


@pytest.mark.parametrize("name", SAFE)
def test_branches(name):
    """Values and derivatives are those of each sample; nothing leaks from another branch."""
    good, other = SAFE[name]
    f = lambda x: cond(x > 0, good, other, x)
    taken = lambda x: good(x) if x > 0 else other(x)
    for wrap in (lambda f: f, grad, lambda f: grad(grad(f)), tangent):
        expected = torch.stack([wrap(taken)(x) for x in X])
        assert_same(mapped(wrap(f))(X), expected)
    for backend in BACKENDS:
        assert_same(jit(mapped(grad(f)), backend=backend)(X), mapped(grad(f))(X))
    together = lambda x: mapped(f)(x).sum()
    assert_same(grad(together)(X), torch.stack([grad(taken)(x) for x in X]))
    assert_same(hessian(together)(X).diag(), torch.stack([grad(grad(taken))(x) for x in X]))
    shared = lambda w: mapped(lambda x: cond(x > 0, lambda x: good(w * x), other, x))(X).sum()
    one = lambda w, x: good(w * x) if x > 0 else other(x) + 0 * w
    assert_same(grad(shared)(X[2]), sum(grad(one)(X[2], x) for x in X))


@pytest.mark.parametrize("inner", ["select", "map"])
@pytest.mark.parametrize("outer", ["select", "map"])
def test_nested_batches(inner, outer):
    f = grad(lambda x: cond(x > 0, lambda x: x.log(), lambda x: x * 2, x))
    batch = torch.stack([X, -X, X + 1])
    expected = torch.where(batch > 0, 1 / batch, 2.0)
    assert_same(vmap(vmap(f, cond=inner), cond=outer)(batch), expected)


def test_each_sample_runs_its_branch_alone():
    seen = torch.ops.test_one_by_one.seen
    f = lambda x: cond(x > 0, lambda x: seen(x).exp(), torch.sin, x)
    for wrap in (lambda f: f, grad, tangent):
        SEEN.clear()
        mapped(wrap(f))(X)
        assert SEEN == [0.3, 1.1]
    SEEN.clear()
    mapped(lambda x: cond(torch.tensor(True), lambda x: seen(x), torch.sin, x))(X)
    assert [X.tolist()] == SEEN  # all take one branch: as a batch


@pytest.mark.parametrize("how", [{"max_steps": 9}, {"checkpoint": "revolve", "slots": 2}], ids=str)
def test_loops_stop_at_their_own_step(how):
    seen = torch.ops.test_one_by_one.seen
    x = torch.tensor([0.5, 4.5, 6.0, 1.5], dtype=torch.float64)
    f = lambda x: while_loop(lambda c: c < 10, lambda c: seen(c) * 2 + 1, x, **how)
    for wrap in (lambda f: f, grad, tangent):
        assert_same(mapped(wrap(f))(x), torch.stack([wrap(f)(y) for y in x]))
    sines = vmap(grad(lambda x: f(x).sin()))(x)
    assert_same(grad(lambda x: mapped(f)(x).sin().sum())(x), sines)
    SEEN.clear()
    mapped(f)(x)
    assert SEEN == [0.5, 2, 5, 4.5, 6, 1.5, 4, 9]


@pytest.mark.parametrize("how", ["select", "map"])
def test_a_batch_of_no_samples(how):
    grow = lambda x: while_loop(lambda c: c < 9, lambda c: c * 2, x, checkpoint="revolve", slots=2)
    f = lambda x: cond(x > 0, grow, torch.sin, x)
    for wrap in (lambda f: f, grad, lambda f: grad(grad(f)), tangent):
        for run in (vmap(wrap(f), cond=how), vmap(wrap(grow), cond=how)):
            assert_same(run(X[:0]), X[:0])
    assert_same(grad(lambda x: vmap(f, cond=how)(x).sum())(X[:0]), X[:0])


def test_printed():
    code = make_fx(mapped(lambda x: cond(x > 0, torch.log, torch.sin, x)))(X).code
    assert "scan(scan_body, [], [], [gt, x], length = 4, reverse = False)" in code


def test_draws_and_sums():
    draw = lambda x: cond(x > 0, lambda x: x + torch.rand(()), lambda x: x, x)
    for randomness, error in (("error", "draws random numbers"), ("same", "draws for itself")):
        with pytest.raises(ArgumentError, match=error):
            vmap(draw, randomness=randomness, cond="map")(X)
    out = vmap(draw, randomness="different", cond="map")(X.abs() + 1)
    assert len(set((out - X.abs()).tolist())) == 4
    total = lambda x: cond(x > 0, lambda x: psum(x, "i"), lambda x: x, x)
    with pytest.raises(RuleError, match="axis 'i' tell each other"):
        vmap(total, axis_name="i", cond="map")(X)
    with pytest.raises(ArgumentError, match="'select' or 'map', not 'both'"):
        vmap(draw, cond="both")

"""Steps that need nothing of one another run in blocks on the C++ backend: the numbers are those
of a Python loop, and what could tell the difference keeps its steps."""

import itertools

import pytest
import torch

from aotfunc import backends, cond, grad, hessian, jit, map, scan, vmap, while_loop
from aotfunc.capture import blocks
from aotfunc.runtime.pipeline import Pipeline
from tests.reference import assert_same
from tests.sweeps import every

W = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
X = torch.randn(37, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

#: functions of closed-over numbers and a row
BODIES = {
    "elementwise": lambda w, x: (x * w[0]).sin() / (1 + x * x),
    "product": lambda w, x: (w @ x).tanh(),
    "number": lambda w, x: (w @ x).softmax(0).amax(),
    "0-dim": lambda w, x: x[0] * torch.tensor(2, dtype=torch.int32) + w[0, 0],
    "two results": lambda w, x: (x.cumsum(0), x.norm() * w),
    "constant": lambda w, x: w.exp(),
    "its row": lambda w, x: x,
    "part of its row": lambda w, x: (x[1:], x.view(2, 2).t()),
    "maximum": lambda w, x: (x * w[1]).max(0).values,
    "variance": lambda w, x: torch.nn.functional.layer_norm(x, (4,), w[0], w[1]),
    "a loop": lambda w, x: scan(lambda h, y: ((w @ h + y).tanh(), h.sum()), x, x)[1],
    "a map": lambda w, x: map(lambda y: (y * w[2] * x).sum(), x),
    "comparison": lambda w, x: torch.where(x > 0, x * w[0], 0.0),
}


@pytest.fixture
def small(monkeypatch):
    """Blocks of few steps: several, and steps left over. They run op by op, which is quick."""
    monkeypatch.setattr(blocks, "BLOCK", 2000)
    monkeypatch.setattr(Pipeline, "reassociates", lambda *_: True)


def by_loop(f, w, xs):
    rows = [f(w, x) for x in xs]
    one = isinstance(rows[0], torch.Tensor)
    return torch.stack(rows) if one else tuple(map_stack(rows))


def map_stack(rows):
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def total(ys):
    return sum((y * y.cos()).sum() for y in ([ys] if isinstance(ys, torch.Tensor) else ys))


@pytest.mark.parametrize(("name", "length"), every(3, itertools.product(BODIES, [37, 5, 36, 1])))
def test_numbers(name, length, small):
    f, xs = BODIES[name], X[:length]
    ours = lambda w, xs: map(lambda x: f(w, x), xs)
    plain = lambda w, xs: by_loop(f, w, xs)
    assert_same(jit(ours, backend="eager")(W, xs), plain(W, xs))
    loss, reference = lambda w, xs: total(ours(w, xs)), lambda w, xs: total(plain(w, xs))
    w, x = W.clone().requires_grad_(), xs.clone().requires_grad_()
    want = torch.autograd.grad(reference(w, x), (w, x), materialize_grads=True)
    assert_same(jit(grad(loss, (0, 1)), backend="eager")(W, xs), want)
    mine = torch.autograd.grad(jit(loss, backend="eager")(w, x), (w, x), materialize_grads=True)
    assert_same(mine, want)


@pytest.mark.parametrize("name", every(4, list(BODIES)))
def test_second_order(name, small):
    f, xs = BODIES[name], X[:9]
    ours = lambda w, xs: total(map(lambda x: f(w, x), xs))
    got = jit(hessian(ours, (0, 1)), backend="eager")(W, xs)
    plain = lambda w, xs: total(by_loop(f, w, xs))
    assert_same(got, torch.autograd.functional.hessian(plain, (W, xs)), rtol=1e-9, atol=1e-9)
    batch = torch.stack([xs, xs.cos()])
    many = jit(vmap(grad(ours, 1), (None, 0)), backend="eager")(W, batch)
    assert_same(many, torch.stack([torch.func.grad(plain, 1)(W, x) for x in batch]))


@pytest.mark.skipif(not backends.auto.possible(), reason="needs a compiler")
def test_compiled(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 2000)
    loss = lambda w, xs: total(map(lambda x: (w @ x).tanh(), xs))
    plain = lambda w, xs: total(torch.stack([(w @ x).tanh() for x in xs]))
    got = jit(grad(loss, (0, 1)), backend="cpp")(W, X)
    assert_same(got, torch.func.grad(plain, (0, 1))(W, X))


def lengths(f, *args):
    """Return the number of steps of each loop that runs ``f``; a block counts as one."""
    found = []

    def seen(program):
        program = old(program)
        found.extend([n.target.length for n in program.graph.nodes if "scan" in str(n.target)])
        return program

    old = blocks.in_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aotfunc.runtime.pipeline.in_blocks", seen)
        jit(f, backend="eager")(*args)
    return found


def test_what_is_in_blocks(small, monkeypatch):
    rows = torch.randn(100, 4)
    tanh = lambda xs: map(lambda x: x.tanh().exp(), xs)
    weights = lambda w: map(lambda x: (x * w).tanh(), rows).sum()
    [blocked] = lengths(tanh, rows)
    assert 1 < blocked < 25
    assert max(lengths(grad(weights), rows[0])) < 25  # it carries a sum
    assert lengths(lambda xs: map(torch.tanh, xs), rows) == []  # nothing lives in between
    monkeypatch.setattr(blocks, "BLOCK", 20000)
    assert lengths(tanh, rows) == []


KEPT = {
    "a draw": lambda x: x + torch.rand_like(x),
    "a branch": lambda x: cond(x[0] > 0, torch.sin, torch.cos, x),
    "a loop with an end": lambda x: while_loop(lambda y: y.sum() < 9, lambda y: y + 2, x),
    "an index": lambda x: x[x.argmax()[None]],
    "a factorisation": lambda x: torch.linalg.cholesky(torch.outer(x, x) + torch.eye(4) * 9),
    "ties": lambda x: x.round().topk(2).indices,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_its_steps(name, small):
    xs = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    assert lengths(lambda xs: map(KEPT[name], xs), xs) == [40]


#: steps of loops whose carries are no sums, or are read
CARRIES = {
    "a sum": lambda h, x: (h + x, None),
    "decay": lambda h, x: (h * 0.5 + x, None),
    "read": lambda h, x: (h + x, h),
    "returned": lambda h, x: (h + x, h + x),
    "twice": lambda h, x: (h + h, x),
    "sine": lambda h, x: (x + h.sin(), x),
    "scaled": lambda h, x: (torch.add(h, x, alpha=2), None),
    "broadcast": lambda h, x: (h + x.sum(), None),
}


@pytest.mark.parametrize("name", CARRIES)
def test_carries(name, small):
    step, h, xs = CARRIES[name], torch.zeros(4, dtype=torch.float64), X
    run = lambda xs: scan(step, h, xs)
    found = lengths(run, xs)
    assert found == ([] if name == "a sum" else [37])
    ys, got = [], jit(run, backend="eager")(xs)
    for x in xs:
        h, y = step(h, x)
        ys.append(y)
    assert_same(got, (h, None if y is None else torch.stack(ys)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize(("start", "row"), [*itertools.product([0.0, -0.0], repeat=2)])
def test_signs_of_zeros(start, row, dtype, small):
    h, xs = torch.full((2,), start, dtype=dtype), torch.full((80, 2), row, dtype=dtype)
    step = lambda h, x: (h + x, None)
    want = torch.view_as_real(h + xs[0]) if dtype.is_complex else h + xs[0]
    for begin in (lambda: h, lambda: torch.full((2,), start, dtype=dtype)):
        run = lambda xs, begin=begin: scan(step, begin(), xs)[0]
        assert max(lengths(run, xs), default=1) < 80
        got = jit(run, backend="eager")(xs)
        got = torch.view_as_real(got) if dtype.is_complex else got
        assert torch.equal(got.signbit(), want.signbit())


def test_whole_numbers_and_halves_are_summed_step_by_step(small):
    for dtype in (torch.int64, torch.bfloat16):
        xs = X.mul(9).to(dtype)
        assert lengths(lambda xs: scan(lambda h, x: (h + x, None), xs[0], xs)[0], xs) == [37]


def test_results_own_their_memory(small):
    xs = torch.randn(8, 4)
    got = jit(lambda xs: map(lambda x: (x, x), xs), backend="eager")(xs)
    assert len({xs.data_ptr(), *[y.data_ptr() for y in got]}) == 3

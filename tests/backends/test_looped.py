"""Loops whose steps are kernels alone run in native code: the numbers of a Python loop, at every
order, and nothing that a caller can see of the memory that it uses."""

import signal
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import aotfunc
from aotfunc import grad, hessian, jit, vmap
from aotfunc.backends.loops import looped, native
from aotfunc.runtime import pipeline
from tests.inputs import f32, f64
from tests.reference import assert_same, grads, hess, loop

F = torch.nn.functional


def python_scan(f, init, xs, length=None, reverse=False):
    count = len(xs) if length is None else length
    carry, ys = init, [None] * count
    for t in range(count)[:: -1 if reverse else 1]:
        carry, ys[t] = f(carry, None if xs is None else xs[t])
    return carry, tree_map(lambda *rows: torch.stack(rows), *ys)


def python_while(condition, body, carry, max_steps=None):
    carry, count = tree_map(torch.as_tensor, carry), 0
    while count != max_steps and condition(carry):
        carry, count = body(carry), count + 1
    return carry


#: the same loops in Python
PYTHON = SimpleNamespace(
    scan=python_scan,
    while_loop=python_while,
    cond=lambda yes, f, g, *operands: f(*operands) if yes else g(*operands),
)


def rnn(loops, w, xs):
    def step(h, x):
        h = torch.tanh(F.linear(h, w, x))
        return h, h

    return loops.scan(step, xs[:3] * 0.1, xs)


def gru(loops, w, xs):
    """Results that are parts of others, not contiguous."""

    def step(h, x):
        a, b, c, d = F.linear(torch.cat([h, h + x], -1), torch.cat([w, -w])).chunk(4, -1)
        h = torch.sigmoid(a) * b + torch.tanh(c + d)
        return h, (h.t(), b)

    wide = torch.cat([w, w.t()], 1)
    w = torch.cat([wide, wide * 0.5])
    return loops.scan(step, xs[:2] * 0.3, xs)


def exchanged(loops, w, xs):
    """What is carried next: another value, one value twice, a row, what never changes."""

    def step(carry, x):
        a, b, c, d, e = carry
        new = torch.sin(w @ a + x)
        return (b, new, new, x, e), (a, new, x, e.sum() * d, torch.ones(2))

    return loops.scan(step, (xs[0], xs[1], xs[2], xs[0], w), xs)


def shown(loops, w, xs):
    """Views as results, from the last step to the first."""

    def step(h, x):
        y = h[:, None] * torch.cos(w @ x)[None]
        return y[1].view(-1), (y.t(), y.unsqueeze(0), y.sum().reshape(1, 1), y[2:])

    return loops.scan(step, xs[0] * 0.5, xs, reverse=True)


def branches(loops, w, xs):
    def step(carry, x):
        h, n = carry
        y = loops.cond((n & 1) == 0, lambda h: h * 0.5 + x, lambda h: torch.tanh(w @ h), h)
        return (y, n + 1), (y.sum(), n)

    (h, _), ys = loops.scan(step, (xs[0], torch.tensor(0)), xs)
    return h, ys


def looked_up(loops, w, xs):
    """Positions that each step computes, which are checked before a kernel reads there."""

    def step(n, x):
        return (n * 3 + 1) & 3, (w.index_select(0, n) * x).sum()

    return loops.scan(step, torch.tensor([2]), xs)[1]


def until(loops, w, xs):
    def step(carry):
        h, n = carry
        return torch.tanh(w @ h + xs[0]), n + 1

    start = xs[0] * 0.01, torch.tensor(0)
    return loops.while_loop(lambda c: (c[0].abs().sum() < 1) & (c[1] < 30), step, start, 9)[0]


def never(loops, w, xs):
    return loops.while_loop(lambda x: x.sum() > 1e6, lambda x: w @ x, w @ xs[0], 5)


def without_rows(loops, w, xs):
    return loops.scan(lambda h, _: (torch.sin(w @ h), h.sum()), xs[0], None, length=7)


def nested(loops, w, xs):
    """Loops in the steps of a loop and in a branch."""

    def halved(h):
        return loops.while_loop(lambda h: h.abs().sum() > 0.3, lambda h: h * 0.5, h, 8)

    def step(h, x):
        inner = lambda a, b: (torch.sin(a + b) * h, (a.sum(), b))
        new, (sums, rows) = loops.scan(inner, w @ h, xs[:3] + x, reverse=True)
        new = loops.cond(new[0] > 0, halved, lambda h: h, new)
        return new, (sums, rows.sum(0), h)

    return loops.scan(step, xs[0], xs)


def numbers(loops, w, xs):
    """Carried numbers, which are no memory: exchanged, stacked as they were, read by a loop and by
    branches, and carried by a loop whose steps end early."""

    def step(carry, x):
        a, b, c, n = carry
        d, rows = loops.scan(lambda h, y: (h * y + b[0], h), a, x)
        new = loops.cond(n.sum() > 2, lambda a: a.sin() * w[0, 0], lambda a: a + c, a)
        e = loops.while_loop(lambda h: h.abs() > 0.1, lambda h: h * 0.5 * w[0, 1], d, 4)
        return (c, (e + new).reshape(1), a, n + 1), (a, b, rows, new, n)

    start = xs[0, 0] * 1.0, xs[1, :1] * 1.0, xs[2, 0] * 1.0, torch.tensor([[0]])
    return loops.scan(step, start, xs)


PROGRAMS = (rnn, gru, exchanged, shown, branches, looked_up, until, never, without_rows, nested)
each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)


def bound(program, loops):
    return lambda *args: program(loops, *args)


def loss(f):
    floats = lambda found: [t for t in tree_leaves(found) if t.is_floating_point()]
    return lambda *args: sum([t.sin().sum() for t in floats(f(*args))])


@pytest.fixture
def natively(monkeypatch):
    """Let a loop that runs in Python fail."""

    def run(target, bodies, *tensors):
        raise AssertionError(f"{target} runs in Python")

    monkeypatch.setattr(pipeline, "run_bodies", run)


@pytest.mark.parametrize("program", [*PROGRAMS, numbers], ids=lambda f: f.__name__)
def test_a_loop_gives_the_numbers_of_a_python_loop(program, natively):
    w, xs = f32(4, 4) * 0.5, f32(6, 4)
    f = jit(bound(program, aotfunc), backend="cpp")
    for _ in range(2):
        assert_same(f(w, xs), program(PYTHON, w, xs))


@each_program
def test_derivatives_of_a_loop(program):
    w, xs = f64(4, 4) * 0.5, f64(6, 4)
    f, reference = loss(bound(program, aotfunc)), loss(bound(program, PYTHON))
    compiled = lambda f: jit(f, backend="cpp")
    assert_same(compiled(grad(f))(w, xs), grads(reference)(w, xs))
    assert_same(compiled(hessian(f))(w, xs), hess(lambda w: reference(w, xs), w))
    ws = torch.stack([w, w * 0.7])
    batched = compiled(vmap(grad(f), (0, None)))(ws, xs)
    assert_same(batched, loop(grads(reference), (0, None))(ws, xs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.int32])
def test_other_dtypes(dtype, natively):
    def f(loops, xs):
        return loops.scan(lambda h, x: (h + x * 2, (h, (h > x).sum())), xs[0], xs)

    xs = (torch.randn(9, 5) * 9).to(dtype)
    assert_same(jit(bound(f, aotfunc), backend="cpp")(xs), f(PYTHON, xs))


def test_results_are_memory_of_their_own(natively):
    f = jit(bound(exchanged, aotfunc), backend="cpp")
    w, xs = f32(4, 4), f32(6, 4)
    want, inputs = exchanged(PYTHON, w, xs), (w.clone(), xs.clone())
    for t in tree_leaves(f(w, xs)):
        t.fill_(torch.nan)
    assert_same((w, xs), inputs)
    assert_same(f(w, xs), want)
    found = tree_leaves(f(w, xs))
    places = {t.untyped_storage().data_ptr() for t in (w, xs, *found)}
    assert len(places) == len(found) + 2


def test_arguments_as_they_come():
    """Parameters, other layouts, and what is not in memory."""
    w, xs = f64(4, 4), f64(6, 4)
    f = jit(bound(without_rows, aotfunc), backend="cpp")
    for v in (torch.nn.Parameter(w), w.t().contiguous().t(), w[:, ::1]):
        assert_same(f(v, xs), without_rows(PYTHON, w, xs))
    turned = torch.complex(w, -w).conj().imag
    assert turned.is_neg()
    assert_same(f(turned, xs), without_rows(PYTHON, w, xs))
    g = jit(lambda x: aotfunc.scan(lambda h, row: (h + row, h), x[0], x.t()), backend="cpp")
    x = f64(4, 4).t()
    assert_same(g(x), python_scan(lambda h, row: (h + row, h), x[0], x.t()))


def test_a_position_out_of_range_is_the_error_of_the_op():
    def f(table, n):
        return aotfunc.scan(lambda n, _: (n + 1, table.index_select(0, n)), n, None, length=4)[1]

    g = jit(f, backend="cpp")
    table = f32(5, 2)
    assert_same(g(table, torch.tensor([1])), table[1:5, None])
    with pytest.raises(IndexError):
        g(table, torch.tensor([3]))
    assert_same(g(table, torch.tensor([0])), table[:4, None])


@pytest.mark.parametrize("program", (rnn, branches), ids=lambda f: f.__name__)
def test_another_size_or_length_compiles_nothing(program, natively, monkeypatch):
    monkeypatch.setattr(native, "LOADED", {})
    f, texts = jit(bound(program, aotfunc), backend="cpp"), set()
    for n, length in ((3, 4), (5, 4), (9, 7)):
        w, xs = f32(n, n), f32(length, n)
        assert_same(f(w, xs), program(PYTHON, w, xs))
        texts.add(len(native.LOADED))
    assert len(texts) == 1 and f.captures == 3


def test_complex_numbers(natively):
    def f(loops, w, xs):
        z, zs = torch.complex(w[0], w[1]), torch.complex(xs, xs.flip(0))
        return loops.scan(lambda h, x: (h * x + z, (h * x).abs()), z, zs)

    w, xs = f64(4, 4), f64(6, 4)
    assert_same(jit(bound(f, aotfunc), backend="cpp")(w, xs), f(PYTHON, w, xs))


def test_several_threads(two_threads, natively):
    w, xs = f64(40, 40) * 0.1, f64(3, 40, 5000)
    f = lambda loops, w, xs: loops.scan(lambda h, x: (torch.sin(h + x), w @ h), xs[0], xs)
    assert_same(jit(bound(f, aotfunc), backend="cpp")(w, xs), f(PYTHON, w, xs))


def test_an_endless_loop_can_be_interrupted(natively):
    def stop(*_):
        raise TimeoutError

    f = jit(lambda x: aotfunc.while_loop(lambda x: x > 0, lambda x: x * 1.0, x), backend="cpp")
    assert f(torch.tensor(-1.0)) == -1
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError):
            f(torch.tensor(1.0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_what_native_code_does_not_run_runs_in_python(monkeypatch):
    """A step that calls an op of PyTorch's, and one of much memory."""
    monkeypatch.setattr(looped, "MOST", 1 << 12)
    xs = f64(3, 4, 4)

    sort = lambda loops, xs: loops.scan(lambda h, x: ((h + x).sort()[0], h), xs[0], xs)
    large = lambda loops, xs: loops.scan(lambda h, x: (h + x, h.sum()), xs[0], xs)
    for f, given in ((sort, xs), (large, f64(3, 40, 40))):
        assert_same(jit(bound(f, aotfunc), backend="cpp")(given), f(PYTHON, given))


def test_a_loop_keeps_no_argument_alive(natively):
    f = jit(bound(rnn, aotfunc), backend="cpp")
    w, xs = f32(4, 4), f32(6, 4)
    f(w, xs)
    gone = [weakref.ref(t) for t in (w, xs, *tree_leaves(f(w, xs)))]
    del w, xs
    assert not any(ref() is not None for ref in gone)

"""Functions that call transforms, compiled by torch.compile in one graph: values, gradients and
writes are those of the same function with torch.func's transforms, or with a loop."""

import copy
import itertools
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_structure

import aotfunc
from aotfunc import (
    custom_jvp,
    custom_vjp,
    custom_vmap,
    grad,
    hessian,
    jacrev,
    linearize,
    vjp,
    vmap,
)
from aotfunc.errors import ArgumentError, CaptureError
from tests.sweeps import every

BACKENDS = ("eager", "aot_eager")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # "Dynamo does not know how to trace the builtin ..."
        yield
    torch._dynamo.reset()


torch.manual_seed(0)
W = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
NET = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
X = torch.randn(5, 3, dtype=torch.float64)


def put(x, i, value):
    x = x.clone()
    x[i] = value
    return x * x[i]


def half_cut(a):
    with torch.no_grad():
        b = a * 2
    return (a * b).sum()


def descent(T):
    def f(x):
        for _ in range(3):
            x = x - 0.1 * T.grad(lambda a: (a @ W).sin().square().sum())(x)
        return x

    return f


def per_sample(T):
    def loss(p, a, b):
        return ((torch.func.functional_call(NET, p, (a,)) - b) ** 2).sum()

    return lambda x: T.vmap(T.grad(loss), in_dims=(None, 0, 0))(
        dict(NET.named_parameters()), x, x[:, :2]
    )


def pulled_back(T):
    def f(x):
        out, vjp_fn, aux = T.vjp(
            lambda a: ({"u": a * 3, "v": (a @ W).sin().sum(0)}, a + 1), x, has_aux=True
        )
        return out, vjp_fn({"u": x, "v": x[0]}), aux

    return f


def rows(T):
    def f(x):
        out, vjp_fn = T.vjp(lambda a: (a @ W).sin(), x[0])
        return T.vmap(vjp_fn)(torch.eye(3, dtype=x.dtype)), out

    return f


def under_no_grad(T):
    def f(x):
        with torch.no_grad():
            return T.grad(lambda a: (a @ W).sin().sum())(x)

    return f


def wave(a):
    return (a @ W).sin()


#: with T for aotfunc or torch.func
PROGRAMS = {
    "grad": lambda T: lambda x: T.grad(lambda a: wave(a).sum())(x) * 2 + x,
    "grad_and_value": lambda T: (
        lambda x: T.grad_and_value(
            lambda a, b: (wave(a).sum() + b.sum(), {"k": a * 2}), argnums=(0, -1), has_aux=True
        )(x, x * 2)
    ),
    "vmap": lambda T: (
        lambda x: T.vmap(lambda a, b: {"q": a @ W + b["z"]}, in_dims=(0, {"z": None}))(
            x, {"z": x[0]}
        )
    ),
    "dims": lambda T: (
        lambda x: T.vmap(lambda a: (a.sum(), a * x.sum()), in_dims=1, out_dims=(0, -1))(x)
    ),
    "twice": lambda T: lambda x: T.vmap(T.vmap(lambda a: a * W.sum(), in_dims=0), in_dims=1)(x),
    "vmap of grad": lambda T: lambda x: T.vmap(T.grad(lambda a: wave(a).sum()))(x),
    "per sample": per_sample,
    "module": lambda T: lambda x: (T.vmap(NET)(x), T.grad(lambda a: NET(a).square().sum())(x)),
    "jacrev": lambda T: (
        lambda x: T.jacrev(
            lambda a, b: ((a * b).sin(), {"d": a.sum()}), argnums=(0, 1), has_aux=True
        )(x[0], x[1])
    ),
    "jacfwd": lambda T: lambda x: T.jacfwd(lambda a: {"w": wave(a), "s": a.sum()})(x[0]),
    "hessian": lambda T: lambda x: T.vmap(T.hessian(lambda a: wave(a).sum()))(x),
    "jvp": lambda T: lambda x: T.jvp(lambda a: (wave(a), a * 2), (x,), (x * 2,)),
    "vjp": pulled_back,
    "vmap of vjp": rows,
    "functionalize": lambda T: lambda x: T.functionalize(lambda a: (a + 0).add_(1) * W.sum())(x),
    "no_grad inside": lambda T: lambda x: T.grad(half_cut)(x),
    "no_grad around": under_no_grad,
    "index": lambda T: lambda x: T.vmap(put)(x, torch.tensor([0, 1, 2, 0, 1]), x[:, 0]),
    "chunks": lambda T: lambda x: T.vmap(lambda a: a @ W, chunk_size=2)(x),
    "descent": descent,
}


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_gradients(name, backend):
    x = X.clone().requires_grad_()
    want = PROGRAMS[name](torch.func)(x)
    got = torch.compile(PROGRAMS[name](aotfunc), backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    places = [x, W, *NET.parameters()]
    grads = []
    for results in (tensors(got), tensors(want)):
        assert [t.requires_grad for t in results] == [t.requires_grad for t in tensors(want)]
        total = sum((t.sin().sum() for t in results if t.requires_grad), x.sum() * 0)
        grads.append(torch.autograd.grad(total, places, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_transformed_function_itself(backend):
    x, i, v = torch.randn(3, 5), torch.tensor([1, 0, 4]), torch.randn(3)
    want = torch.stack([put(a, b, c) for a, b, c in zip(x, i, v, strict=True)])
    torch.testing.assert_close(
        torch.compile(vmap(put), backend=backend, fullgraph=True)(x, i, v), want
    )
    cube = torch.compile(grad(lambda x: (x**3).sum()), backend=backend, fullgraph=True)
    torch.testing.assert_close(cube(v), 3 * v**2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linearize(backend):
    def f(x):
        out, jvp_fn = linearize(torch.sin, x)
        return out, jvp_fn(x * 2)

    x = torch.randn(3)
    torch.testing.assert_close(
        torch.compile(f, backend=backend, fullgraph=True)(x), (x.sin(), x.cos() * x * 2)
    )


def tripled():
    """A function whose rules say three times its derivative, in each mode and per sample."""

    def bwd(residuals, g):
        x, scale = residuals
        return 3 * g * x.cos() * scale, None

    f = custom_vjp(lambda x, scale=2.0: x.sin() * scale)
    f.defvjp(lambda x, scale: (f(x, scale), (x, scale)), bwd)
    h = custom_jvp(lambda x: x.sin())
    h.defjvp(lambda primals, tangents: (h(*primals), 3 * tangents[0] * primals[0].cos()))
    v = custom_vmap(lambda x: x.sin())
    v.def_vmap(lambda size, batched, x: (3 * x.sin(), True))
    return f, h, v


TRIPLED = tripled()
RULES = {
    "alone": ("aot_eager", lambda f: f),
    "second": ("eager", lambda f: hessian(lambda x: f(x).sum())),
    "per sample": ("aot_eager", lambda f: vmap(grad(lambda x: f(x).sum()))),
}


def test_rules_that_close_over_tensors_break_the_graph():
    """They read what the tensors hold at each call."""
    w = torch.full((3,), 2.0)
    f = custom_vjp(lambda x: (x * w).sin())
    f.defvjp(lambda x: ((x * w).sin(), x), lambda x, g: (3 * g * w,))
    x = torch.ones(3)
    values = torch.compile(lambda x: f(x) + 1, backend="eager")
    slopes = torch.compile(lambda x: grad(lambda x: f(x).sum())(x) + 1, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(values(x), (x * w).sin() + 1)
        torch.testing.assert_close(slopes(x), 3 * w + 1)
        w += 1


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rule", [0, 1, 2], ids=["custom_vjp", "custom_jvp", "custom_vmap"])
def test_functions_with_rules(rule, name):
    """A call is one node of the graph, under transforms, too."""
    backend, transform = RULES[name]
    f = transform(TRIPLED[rule])
    x, y = (X[0].clone().requires_grad_() for _ in "xy")
    got, want = torch.compile(lambda x: f(x) * 2, backend=backend, fullgraph=True)(x), f(y) * 2
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.sum(), a)[0] for out, a in ((got, x), (want, y))]
    torch.testing.assert_close(*grads)


Pair = namedtuple("Pair", "one other")
TREES = {
    "a dict": lambda x: {"a": x * 2, 3: x.sin()},
    "a list in a dict": lambda x: {"a": [x * 2, (x.sin(),)], "b": {}},
    "a tuple of trees": lambda x: ({"b": x * 2}, [x.sin()], x),
    "a named tuple": lambda x: Pair(x * 2, x.sin()),
    "nothing": lambda x: (x * 2, None),
}


@pytest.mark.parametrize(
    ("name", "backend"), every(3, itertools.product(TREES, ["eager", "aot_eager"]))
)
def test_trees_of_functions_with_rules(name, backend):
    """Results are trees of the same form, and derivatives those of the rule, twice."""
    tensors = lambda tree: [x for x in tree_leaves(tree) if x is not None]
    rule = custom_vjp(TREES[name])
    rule.defvjp(lambda x: (rule(x), x), lambda x, g: (3 * x * sum(tensors(g)),))
    x, y = (X[0].clone().requires_grad_() for _ in "xy")
    got, want = torch.compile(rule, backend=backend, fullgraph=True)(x), rule(y)
    assert tree_structure(got) == tree_structure(want)
    torch.testing.assert_close(tensors(got), tensors(want))
    again = backend == "eager"  # AOTAutograd has no second derivatives
    for a, out in ((x, got), (y, want)):
        total = sum((t * t).sum() for t in tensors(out))
        (a.first,) = torch.autograd.grad(total, a, create_graph=again)
        a.second = torch.autograd.grad(a.first.square().sum(), a)[0] if again else 0
    torch.testing.assert_close((x.first, x.second), (y.first, y.second))


def test_functions_with_rules_at_other_sizes_and_numbers():
    rule = custom_vjp(lambda x, k: {"a": x[:, 1:] * k} if len(x) < 5 else (x * k, x))
    rule.defvjp(lambda x, k: (rule(x, k), (x, k)), lambda kept, g: (kept[0] * kept[1], None))
    f = torch.compile(rule, backend="aot_eager", fullgraph=True)
    for n, k in ((3, 2), (4, 3), (6, 4), (6, 0.5), (3, 0.25)):
        x = torch.randn(n, 3, requires_grad=True)
        got, want = f(x, k), rule(x, k)
        torch.testing.assert_close(got, want)
        [gradient] = torch.autograd.grad(sum(t.sum() for t in tree_leaves(got)), x)
        torch.testing.assert_close(gradient, x * k)


def test_functions_with_rules_in_a_graph_of_parts():
    """Where Dynamo cannot read a call it breaks the graph, and says so with fullgraph."""

    def made(x):
        f = custom_vjp(lambda x: x * 2)
        f.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 9,))
        return f(x) + 1

    fields = custom_vjp(lambda x: OrderedDict(a=x * 2))
    fields.defvjp(lambda x: (fields(x), None), lambda _, g: (g["a"] * 9,))
    for f in (made, lambda x: fields(x)["a"] + 1):
        torch.testing.assert_close(torch.compile(f, backend="eager")(X), 2 * X + 1)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(f, backend="eager", fullgraph=True)(X)


def test_inductor():
    x = X.clone().requires_grad_()
    want, got = (
        PROGRAMS["per sample"](torch.func)(x),
        torch.compile(PROGRAMS["per sample"](aotfunc), fullgraph=True)(x),
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes(backend):
    norm, buffer = (
        torch.nn.BatchNorm1d(3).double().requires_grad_(False),
        torch.zeros(3, dtype=torch.float64),
    )
    other = copy.deepcopy(norm)

    def f(x):
        def loss(a):
            buffer.add_(1)
            return (norm(a) * a).sum() + (buffer * a).sum()

        g = grad(loss)(x)
        vmap(lambda a: a.mul_(2))(x)
        return g, x + 1

    x, before = X.clone(), X.clone().requires_grad_()
    (want,) = torch.autograd.grad((other(before) * before).sum() + before.sum(), before)
    got = torch.compile(f, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, (want, 2 * X + 1))
    torch.testing.assert_close(x, 2 * X)
    assert torch.equal(buffer, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(norm.state_dict(), other.state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_sizes_and_numbers(backend):
    f = torch.compile(
        lambda x, s: vmap(grad(lambda a: (a * s).sin().sum()))(x), backend=backend, fullgraph=True
    )
    for n, s in ((3, 0.1), (4, 0.2), (5, 0.3), (7, 0.4)):
        x = torch.randn(n, 3)
        torch.testing.assert_close(f(x, s), s * (x * s).cos())


def test_what_dynamo_cannot_read_runs_as_it_is():
    log = []

    def positive(a):
        log.append(tuple(a.shape))
        return a if a.abs().sum() > 0 else -a

    x = torch.randn(4, 3)
    f = torch.compile(
        lambda x: vmap(grad(lambda a: positive(a).sin().sum()))(x) + 1, backend="eager"
    )
    torch.testing.assert_close(f(x), x.cos() + 1)
    assert log == [(3,)]


@pytest.mark.parametrize(
    "ask",
    [
        lambda a, i: a[:i],
        lambda a, i: a[int(i)],
        lambda a, i: a * i.item(),
        lambda a, i: a * [2, 3][i],
        lambda a, i: a * (2, 3)[i + 0],
        lambda a, i: a * a.expand(2, 3).shape[i],
        lambda a, i: torch.zeros(i) + a.sum(),
        lambda a, i: a * torch.arange(i + 1).sum(),
    ],
)
def test_a_number_of_a_sample(ask):
    """Dynamo reads some index for the sample's; no other use of it may be baked in."""
    whole = torch.__version__ >= "2.13"  # before, list[i] is an error of Dynamo's own
    x, i = torch.randn(2, 3), torch.tensor([1, 1] if whole else [1, 0])
    with pytest.raises(CaptureError, match="differs between samples" if whole else None):
        torch.compile(vmap(ask), backend="eager", fullgraph=whole)(x, i)


def test_an_index_computed_from_a_sample():
    x, i = torch.randn(2, 3), torch.tensor([1, 0])
    f = torch.compile(vmap(lambda a, i: a[i] + a[i + 1] - a[-i]), backend="eager", fullgraph=True)
    rows = torch.arange(2)
    torch.testing.assert_close(f(x, i), x[rows, i] + x[rows, i + 1] - x[rows, -i])


@pytest.mark.parametrize(
    "f",
    [
        lambda a, i: W[i] * a,
        lambda a, i: W[i, 0] * a,
        lambda a, i: W[:, i // 2] * a,
        lambda a, i: W[i][i // 2] * a,
        lambda a, i: W[-i, i] * a,
        lambda a, i: grad(lambda a: (W[i] * a * a).sum())(a),
    ],
)
def test_an_index_into_what_is_no_sample(f):
    x, i = torch.randn(2, 3, dtype=torch.float64), torch.tensor([1, 2])
    got = torch.compile(lambda x, i: vmap(f)(x, i), backend="eager", fullgraph=True)(x, i)
    torch.testing.assert_close(got, torch.stack([f(x[0], 1), f(x[1], 2)]))


def test_errors_are_ours_and_leave_nothing_behind():
    x = torch.randn(3)
    with pytest.raises(ArgumentError, match="zero dimensions"):
        torch.compile(grad(lambda a: a), backend="eager", fullgraph=True)(x)
    for f in (torch.nn.functional.dropout, lambda a: x.add_(1) * a):
        with pytest.raises(CaptureError, match="runs the differentiated function again"):
            torch.compile(lambda a, f=f: vjp(f, a)[1](a), backend="eager", fullgraph=True)(
                torch.ones(3)
            )
    torch.testing.assert_close(jacrev(torch.sin)(x), x.cos().diag())


def decaying(x, rows):
    step = lambda c, r: ({"n": c["n"] + 1, "h": (W[:3, :3] @ c["h"] + r).tanh()}, c["h"] * c["n"])
    return aotfunc.scan(step, {"h": x, "n": torch.tensor(0)}, rows, reverse=True)


#: loops of a vector and rows
LOOPS = {
    "scan": decaying,
    "length": lambda x, rows: aotfunc.scan(lambda c, _: (c * x.sin(), None), x, length=4),
    "pairs": lambda x, rows: aotfunc.scan(
        lambda c, r: (c + r[0] * r[1], {"a": c.sum(), "b": None}),
        x,
        (rows, rows.cos()),
        checkpoint=2,
    ),
    "half": lambda x, rows: aotfunc.scan(lambda c, _: (c * 2, c), x, length=len(rows) // 2),
    "all": lambda x, rows: aotfunc.scan(lambda c, r: (c * r, None), x, rows, length=len(rows)),
    "some": lambda x, rows: aotfunc.map(torch.sin, rows, batch_size=len(rows) // 2),
    "index": lambda x, rows: aotfunc.scan(lambda c, i: (c + rows[i], c.sum()), x, torch.arange(3)),
    "map": lambda x, rows: aotfunc.map(lambda r: (r * x).softmax(0), rows),
    "batches": lambda x, rows: aotfunc.map(lambda r: ((r * x).sum(), r), rows, batch_size=2),
    "empty": lambda x, rows: aotfunc.map(torch.sin, rows[:0]),
    "associative": lambda x, rows: aotfunc.associative_scan(
        lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (rows.sigmoid(), rows * x)
    ),
    "along": lambda x, rows: aotfunc.associative_scan(torch.mul, rows, reverse=True, dim=-1),
    "nested": lambda x, rows: aotfunc.scan(
        lambda c, r: (aotfunc.map(lambda t: t * c[0], r).sin(), c), x, rows
    ),
    "in vmap": lambda x, rows: vmap(
        lambda r: aotfunc.scan(lambda c, t: (c * t.sin() + t, c), r.sum(), r)
    )(rows),
    "in grad": lambda x, rows: grad(lambda x: decaying(x, rows)[0]["h"].sum())(x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOOPS)
def test_loops(name, backend):
    f = LOOPS[name]
    x, rows = (torch.randn(n, dtype=torch.float64) for n in ((3,), (5, 3)))
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    grads = []
    for run in (compiled, f):
        x, rows = x.detach().requires_grad_(), rows.detach().requires_grad_()
        results = run(x, rows)
        total = sum((t.sin().sum() for t in tensors(results) if t.requires_grad), x.sum())
        grads.append((results, torch.autograd.grad(total, (x, rows), materialize_grads=True)))
    torch.testing.assert_close(*grads)
    other = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(compiled(x, other), f(x, other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_loops_that_dynamo_cannot_read_break_the_graph(backend):
    x, rows = torch.randn(3), torch.randn(5, 3)
    branching = lambda c, r: (aotfunc.cond(r.sum() > 0, torch.sin, torch.cos, c), c)
    until = lambda x: aotfunc.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x)
    for f in (lambda x: aotfunc.scan(branching, x, rows), until):
        torch.testing.assert_close(torch.compile(f, backend=backend)(x), f(x))
    other_tree = lambda x: aotfunc.scan(lambda c, r: ((c[0], r), None), [x, x], rows)
    with pytest.raises(ArgumentError, match="must return the carry with the structure"):
        torch.compile(other_tree, backend=backend)(x)


COUNT = torch.zeros(())


def written_outside(c, r):
    COUNT.add_(1)
    return c + r, None


#: loops that are refused, and the words of the error
REFUSED_LOOPS = {
    "written_outside .test_torch_compile": lambda x, rows: aotfunc.scan(written_outside, x, rows),
    "the numbers of steps differ": lambda x, rows: aotfunc.scan(written_outside, x, rows, 3),
    "must keep its shape and dtype: <lambda> .test_torch_compile": lambda x, rows: aotfunc.scan(
        lambda c, r: (c.double(), None), x, rows
    ),
    "xs has no dimension to go along": lambda x, rows: aotfunc.map(torch.sin, x.sum()),
    "xs has no dimension 2": lambda x, rows: aotfunc.associative_scan(torch.add, rows, dim=2),
    "must return what it gets": lambda x, rows: aotfunc.associative_scan(
        lambda a, b: a.sum(), rows
    ),
}


@pytest.mark.parametrize("words", REFUSED_LOOPS)
def test_errors_of_loops_name_the_function(words):
    f = torch.compile(REFUSED_LOOPS[words], backend="eager")
    with pytest.raises((ArgumentError, CaptureError), match=words):
        f(torch.randn(3), torch.randn(5, 3))
    assert not COUNT


def test_other_ways_in_break_the_graph():
    x = torch.randn(3)
    f = torch.compile(lambda x: aotfunc.make_fx(lambda a: a.sin())(x)(x) + 1, backend="eager")
    torch.testing.assert_close(f(x), x.sin() + 1)


def test_a_copy_of_a_function_with_rules_outlives_it():
    f = aotfunc.custom_vjp(torch.sin)
    f.defvjp(lambda x: (x.sin(), x), lambda x, g: (g * x.cos() * 2,))
    f = copy.deepcopy(f)
    x = torch.ones(3, requires_grad=True)
    torch.compile(lambda x: f(x) * 3, backend="eager", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, 6 * torch.ones(3).cos())

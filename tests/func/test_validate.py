"""``validate=True``: what is right passes, leaving no trace; what is wrong names the op and the
line."""

import importlib
import random
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import aotfunc
from aotfunc import aot_function, custom_vjp, grad, jit, jvp, linearize, vjp, vmap
from aotfunc.errors import ArgumentError, ValidationError
from aotfunc.extend import pointwise, vmap_of
from aotfunc.transforms.rules.table import writable_entry
from tests.sweeps import every

X = torch.linspace(-1, 1, 5)
NET = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))


@custom_vjp
def half(x):
    return x.sin()


half.defvjp(lambda x: (x.sin(), x), lambda x, g: (g / 2,))

# each transform as a function of f and x, to what is compared without validate
TRANSFORMS = {
    **{
        name: lambda f, x, name=name, **how: getattr(aotfunc, name)(f, **how)(x)
        for name in ("grad", "grad_and_value", "jacrev", "jacfwd", "hessian")
    },
    "vjp": lambda f, x, **how: vjp(f, x, **how)[1](torch.tensor(1.0)),
    "jvp": lambda f, x, **how: jvp(f, (x,), (x + 1,), **how),
    "linearize": lambda f, x, **how: linearize(f, x, **how)[1](x + 1),
    "vmap": lambda f, x, **how: vmap(f, randomness="same", **how)(torch.stack([x, x + 1])),
    "jit": lambda f, x, **how: of_compiled(jit(f, backend="eager", **how), x),
    "aot_function": lambda f, x, **how: of_compiled(aot_function(f, "eager", **how), x),
}


def of_compiled(f, x):
    x = x.clone().requires_grad_()
    result = f(x)
    return result.detach(), torch.autograd.grad(result, x)[0]


FUNCTIONS = {
    "formula": lambda x: (x.sin() * x.exp()).sum(),
    "a net": lambda x: NET(x).sum(),
    "a kink": lambda x: x.relu().sum() + x.abs().max(),
    "a jump": lambda x: (x.round() + x.floor()).sum(),
    "constants": lambda x: (x.detach() * x).sum(),
    "a rule of its own": lambda x: half(x).sum(),
    "a draw": lambda x: (x * torch.rand(5)).sum(),
    "a write": lambda x: torch.zeros(5).add_(x).mul_(x).sum(),
    "few digits": lambda x: x.bfloat16().softmax(0).square().sum().float(),
    "cancelling": lambda x: ((x + 1e4).log() - (x + 1e4).log().mean()).sum(),
    "statistics, which autograd takes for constants": lambda x: torch.native_layer_norm(
        x, [5], None, None, 1e-5
    )[2].sum(),
}


@pytest.mark.parametrize("transform, name", every(6, product(TRANSFORMS, FUNCTIONS)))
def test_what_is_right_passes(transform, name):
    results = []
    for how in ({}, {"validate": True}):
        torch.manual_seed(0)
        results.append(TRANSFORMS[transform](FUNCTIONS[name], X, **how))
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, results), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def wrong_rules():
    """Let ``sinh`` have a wrong derivative, and ``flip`` a wrong batching rule."""
    entries = [writable_entry(op.default) for op in (torch.ops.aten.sinh, torch.ops.aten.flip)]
    kept = [dict(vars(e)) for e in entries]
    aotfunc.clear_caches()
    pointwise(torch.ops.aten.sinh, lambda g, out, x: 2 * g * x)
    vmap_of(torch.ops.aten.flip)(lambda x, dims: torch.flip(x, dims))
    yield
    for e, before in zip(entries, kept, strict=True):
        vars(e).clear()
        vars(e).update(before)
    aotfunc.clear_caches()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_wrong_names_the_op(wrong_rules, transform):
    def f(x):
        y = x.sin() * 2
        return (y.flip(0) if transform == "vmap" else y.sinh()).sum(0).sin() * x.exp().sum()

    op = "flip" if transform == "vmap" else "sinh"
    x = torch.stack([X, X + 1]) if transform == "vmap" else X
    said = rf"validate=True\).* differs from .*first op .* is aten.{op}.default \(at .* in f: "
    with pytest.raises(ValidationError, match=said):
        TRANSFORMS[transform](f, x, validate=True)


def shrunk(x):
    return x.sin().sinh() * 0.5


LOOPS = {
    "vmap of grad": lambda x, **how: vmap(grad(lambda x: shrunk(x).sum()), **how)(x[:, None]),
    "jit of grad": lambda x, **how: jit(grad(lambda x: shrunk(x).sum()), **how)(x),
    "grad in a function": lambda x, **how: jit(
        lambda x: vmap(lambda x: grad(lambda x: shrunk(x).sum())(x) * 2)(x), **how
    )(x[:, None]),
    "grad in a loop": lambda x, **how: jit(
        lambda x: aotfunc.map(lambda r: grad(lambda r: shrunk(r).sum())(r), x), **how
    )(x[:, None]),
    "scan": lambda x, **how: grad(
        lambda x: aotfunc.scan(lambda c, r: (shrunk(c) + r, {"c": c}), x[0], x)[1]["c"].sum(),
        **how,
    )(x),
    "map": lambda x, **how: grad(lambda x: aotfunc.map(shrunk, x).sum(), **how)(x),
    "cond": lambda x, **how: grad(
        lambda x: aotfunc.cond(x[0] < 0, shrunk, torch.sin, x).sum(), **how
    )(x),
    "while_loop": lambda x, **how: grad(
        lambda x: aotfunc.while_loop(
            lambda c: c[1] < 2, lambda c: (shrunk(c[0]), c[1] + 1), (x, torch.tensor(0))
        )[0].sum(),
        **how,
    )(x),
    "associative_scan": lambda x, **how: grad(
        lambda x: aotfunc.associative_scan(lambda a, b: shrunk(a) + b, x).sum(), **how
    )(x),
}


@pytest.mark.parametrize("name", LOOPS)
def test_ops_in_loops_and_inner_transforms_are_named(wrong_rules, name):
    with pytest.raises(ValidationError, match=r"first op .* is aten\.sinh\.default \(at "):
        LOOPS[name](X, validate=True)


SECOND = {
    "hvp": lambda f, x, **how: aotfunc.hvp(lambda x: f(x).sum(), (x,), (x + 1,), **how),
    "ggn": lambda f, x, **how: aotfunc.ggn(f, lambda y: y.exp().sum(), x, x + 1, **how),
    "jet": lambda f, x, **how: aotfunc.jet(f, (x,), ([x + 1, None, x],), **how),
    "jet, unscaled": lambda f, x, **how: aotfunc.jet(
        f, (x,), ([x, x],), factorial_scaled=False, **how
    ),
    "laplacian": lambda f, x, **how: aotfunc.laplacian(f, **how)(x),
    "diag_hessian": lambda f, x, **how: aotfunc.diag_hessian(f, **how)(x),
    "sparse_jacobian": lambda f, x, **how: aotfunc.sparse_jacobian(f, **how)(x).to_dense(),
    "sparse_hessian": lambda f, x, **how: aotfunc.sparse_hessian(
        lambda x: (f(x) * x.roll(1)).sum(), **how
    )(x).to_dense(),
}


@pytest.mark.parametrize("name", SECOND)
def test_what_is_right_of_second_derivatives_passes(name):
    found, validated = (SECOND[name](shrunk, X, **how) for how in ({}, {"validate": True}))
    torch.testing.assert_close(found, validated, rtol=0, atol=0)


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_name_the_op(wrong_rules, name):
    with pytest.raises(ValidationError, match=r"first op .* is aten\.sinh\.default \(at "):
        SECOND[name](shrunk, X, validate=True)


def test_second_derivatives_that_are_wrong_themselves(monkeypatch):
    """The derivatives that it is made of are right."""
    right = aotfunc.api.jet.second_derivatives

    def wrong(*args):
        found, call = right(*args)
        return [[2 * x for x in parts] for parts in found], call

    monkeypatch.setattr(aotfunc.api.jet, "second_derivatives", wrong)
    for transform in (aotfunc.laplacian, aotfunc.diag_hessian):
        with pytest.raises(ValidationError, match="differs from that by first derivatives"):
            transform(shrunk, validate=True)(X)


def test_a_backend_that_is_wrong():
    def compiler(gm, inputs):
        for n in gm.graph.nodes:
            if n.target is torch.ops.aten.cos.default:
                n.target = torch.ops.aten.sin.default
        gm.recompile()
        return gm

    f = jit(lambda x: x.exp().cos() + 1, backend=compiler, validate=True)
    with pytest.raises(ValidationError, match=r"jit.*first op .* is aten\.cos\.default \(at "):
        f(X)
    right = jit(lambda x: x.exp() + 1, backend=compiler, validate=True)
    assert torch.equal(right(X), X.exp() + 1) and right.explain() is not None


def test_differences_are_asked_where_autograd_agrees():
    """PyTorch takes the probabilities of ``ctc_loss`` for normalised."""
    f = lambda p: F.ctc_loss(p, torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]))
    p = torch.randn(4, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValidationError, match="though it is autograd's, is not differences'"):
        grad(f, validate=True)(p)
    grad(lambda p: f(p.log_softmax(-1)), validate=True)(p)


def test_no_trace_is_left():
    """Running statistics, random numbers, written arguments: as after one call. Later calls are
    not compared."""
    norm, draws, count = torch.nn.BatchNorm1d(5), torch.Generator(), []

    def f(x):
        count.append(None)
        x.mul_(2)
        return (norm(x) * torch.rand(5) * torch.rand(5, generator=draws)).sum()

    f = jit(f, backend="eager", validate=True)
    x = torch.randn(6, 5)
    torch.manual_seed(0), draws.manual_seed(1)
    found, y = [], x.clone()
    for _ in range(2):
        found.append(f(y))
    after = len(count)
    f(y)
    assert len(count) == after and norm.num_batches_tracked == 3
    torch.manual_seed(0), draws.manual_seed(1)
    plain = torch.nn.BatchNorm1d(5)
    for k, result in enumerate(found, 1):
        want = plain(x * 2**k) * torch.rand(5) * torch.rand(5, generator=draws)
        torch.testing.assert_close(result, want.sum())
    torch.testing.assert_close(y, 8 * x)


class Positions(torch.nn.Module):
    """Make a table at the first call."""

    table = None

    def forward(self, x):
        if self.table is None:
            table = torch.zeros(5)
            table[::2] = 3
            self.table = table
        return (x * self.table).sum()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jit"])
def test_memory_made_inside_keeps_what_is_written_to_it(transform):
    net = Positions()
    found = TRANSFORMS[transform](net, X, validate=True)
    assert torch.equal(net.table, torch.tensor([3.0, 0, 3, 0, 3]))
    for a, b in zip(
        *map(torch.utils._pytree.tree_leaves, (found, TRANSFORMS[transform](net, X))), strict=True
    ):
        assert torch.equal(a, b)


class Mean(torch.nn.Module):
    """Bind a buffer anew, count in Python, and fill a cache."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.cache, self.calls = {}, 0

    def forward(self, x):
        self.mean = self.mean * 0.5 + x * 0.5
        self.calls += 1
        table = self.cache.setdefault(5, torch.ones(5))
        return (x * self.mean * table * self.calls).sum()


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "jit"])
def test_state_that_python_holds_is_that_after_one_call(transform):
    nets = Mean(), Mean()
    found = [
        torch.utils._pytree.tree_leaves(TRANSFORMS[transform](net, X, **how))
        for net, how in zip(nets, ({}, {"validate": True}), strict=True)
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert nets[1].calls == 1 and nets[1].mean.dtype == torch.float32
    assert torch.equal(nets[0].mean, nets[1].mean)
    assert nets[1].cache[5].dtype == torch.float32


def test_what_is_imported_inside_stays(tmp_path, monkeypatch):
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "__init__.py").write_text("TABLE = {}")
    part = "import some_package\nsome_package.TABLE[1] = 2.0"
    (tmp_path / "some_package" / "part.py").write_text(part)
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("some_package")

    def f(x):
        importlib.import_module("some_package.part")
        return (x * package.TABLE[1] * len(package.part.__name__)).sum()

    assert torch.equal(grad(f, validate=True)(X), grad(f)(X))


def test_lazy_modules_keep_their_weights():
    net = torch.nn.LazyLinear(3)
    found = jit(net, backend="eager", validate=True)(X)
    assert 0.01 < net.weight.abs().max() <= 5**-0.5 and net.in_features == 5
    torch.testing.assert_close(found, net(X))


@pytest.mark.parametrize("kind", [jit, grad], ids=["jit", "grad"])
def test_lazy_modules_count_a_batch_once(kind):
    ours, theirs = (torch.nn.LazyBatchNorm1d(dtype=X.dtype) for _ in "ab")
    x = X.expand(3, 5) * torch.arange(1, 4, dtype=X.dtype)[:, None]
    options = {"backend": "eager"} if kind is jit else {}
    kind(lambda x: ours(x).sin().sum(), validate=True, **options)(x)
    theirs(x)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_derivative_is_compared_where_none_is_recorded(mode):
    with mode():
        found = jit(torch.sin, backend="eager", validate=True)(torch.nn.Parameter(X))
    assert torch.equal(found, X.sin()) and not found.requires_grad


@pytest.mark.parametrize("look", [lambda z: z[1], lambda z: z, lambda z: z.t()[1:]])
def test_arguments_that_share_memory(look):
    def f(a, b):
        b.mul_(3)
        return a.sum()

    z, plain = torch.ones(3, 4), torch.ones(3, 4)
    found = jit(f, backend="eager", validate=True)(z, look(z))
    assert torch.equal(found, f(plain, look(plain))) and torch.equal(z, plain)


IDS = torch.tensor([0, 1, 2, 0])
# functions whose gradient by the weight is not that of their values
BY_DEFINITION = {
    "padding": lambda w: F.embedding(IDS, w, padding_idx=0),
    "frequency": lambda w: F.embedding(IDS, w, scale_grad_by_freq=True),
    "frequency, in bags": lambda w: F.embedding_bag(IDS[None], w, scale_grad_by_freq=True),
    "quantised": lambda w: torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -128, 127),
    "quantised, by scales": lambda w: torch.fake_quantize_per_channel_affine(
        w, torch.full((5,), 0.1), torch.zeros(5, dtype=torch.int), 0, -128, 127
    ),
}


@pytest.mark.parametrize("name", BY_DEFINITION)
def test_derivatives_by_definition(name):
    f = lambda w: BY_DEFINITION[name](w).square().sum()
    w = torch.linspace(-1, 1, 15).view(5, 3) + 0.02
    assert torch.equal(grad(f, validate=True)(w), grad(f)(w))
    of_compiled(jit(f, backend="eager", validate=True), w)


# differences with the first step say nothing of these
FAST = {
    "of large numbers": lambda x: (x * 1e6).sin().sum(),
    "of many waves": lambda x: (x.exp() * 3e5).sin().sum(),
    "of fine stairs": lambda x: ((x * 1e7).round() / 1e7).sum(),
    "of stairs on a slope": lambda x: (x * x + (x * 1e6).round() / 1e6).sum(),
}


@pytest.mark.parametrize("name", FAST)
def test_smaller_steps_where_differences_say_otherwise(name):
    x = torch.linspace(0.3, 1, 5)
    assert torch.equal(grad(FAST[name], validate=True)(x), grad(FAST[name])(x))

    class Tripled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * 3

    def wrong(x):
        x = Tripled.apply(x)
        return FAST[name](x) + x.sum()

    check = aotfunc.api.checks.Gradients(grad, wrong, {"argnums": 0})
    check.has_rules = lambda: False
    with pytest.raises(ValidationError, match="though it is autograd's"):
        check.first(wrong)(x)


def test_a_function_that_changes_what_it_reads():
    numbers = iter(range(100))
    with pytest.raises(ArgumentError, match="gives another result in a second run"):
        grad(lambda x: (x * next(numbers)).sum(), validate=True)(X)
    assert next(numbers) == 2
    random.seed(0), np.random.seed(0)
    found = grad(lambda x: (x * random.random() * np.random.rand()).sum(), validate=True)(X)
    after = random.random(), np.random.rand()
    random.seed(0), np.random.seed(0)
    torch.testing.assert_close(found, torch.full((5,), random.random() * np.random.rand()))
    assert after == (random.random(), np.random.rand())


def test_what_cannot_be_compared():
    with pytest.raises(ArgumentError, match="give validate to the outermost"):
        vmap(grad(torch.sin, validate=True))(X)
    with pytest.raises(ArgumentError, match="cannot be compared with a loop"):
        vmap(torch.sin, randomness="different", validate=True)(X)
    f = jit(lambda x: x[:3] * torch.ones(3), backend="eager", validate=True)
    with pytest.raises(RuntimeError):
        f(X[:2])
    assert torch.equal(f(X), X[:3])  # compared anew
    inner = grad(lambda x: x**3, validate=True)
    assert grad(inner, validate=True)(torch.tensor(2.0)) == 12  # run outside of it at first

    def fails(x):
        if not isinstance(x.sum(), aotfunc.trace.traced.Traced):
            raise OSError("no")
        return x.sum()

    with pytest.raises(ArgumentError, match="eager PyTorch raises OSError: no"):
        grad(fails, validate=True)(X)

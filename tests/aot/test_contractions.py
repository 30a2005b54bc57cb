"""Sums of products in another order: the same numbers up to rounding, without what is as large as
all gradients of all samples, and only where that costs less."""

from __future__ import annotations

import math
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from aotfunc import aot_function, functional_call, grad, jacfwd, jacrev, jit, vmap
from aotfunc.backends import Backend
from aotfunc.trace.node_views import calls_view
from aotfunc.transforms.contractions import choice
from tests.inputs import f32, f64

aten = torch.ops.aten


class Shown:
    """A backend that wants what "cpp" wants, runs graphs op by op, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list = []
        self.backend = Backend(self.compile, reassociates=True)

    def compile(self, gm, example_inputs):
        self.graphs.append(gm.graph)
        return gm.forward

    @property
    def values(self) -> list:
        nodes = [n for g in self.graphs for n in g.nodes if n.op == "call_function"]
        return [n for n in nodes if isinstance(n.meta["val"], Tensor) and not calls_view(n)]

    def largest(self) -> int:
        return max(n.meta["val"].numel() for n in self.values)

    def calls(self, *ops) -> int:
        return sum(n.target in ops for n in self.values)


@pytest.fixture
def always(monkeypatch):
    """Everything that can be computed otherwise is, at whatever cost."""
    monkeypatch.setattr(choice, "worthwhile", lambda group, cones, prices, products: set(prices))


def compiled(f, *args, tight=True):
    """The result compiled, after comparing it with that of the function itself."""
    shown = Shown()
    got, want = jit(f, backend=shown.backend)(*args), f(*args)
    assert_close(got, want, equal_nan=True, **({"rtol": 1e-9, "atol": 1e-11} if tight else {}))
    return shown


NORMS = {
    "pow": lambda g: g.flatten(1).pow(2).sum(1),
    "mul": lambda g: (g * g).sum(tuple(range(1, g.dim()))),
    "norm": lambda g: g.flatten(1).norm(dim=1) ** 2,
    "vector_norm": lambda g: torch.linalg.vector_norm(g, dim=tuple(range(1, g.dim()))) ** 2,
    "einsum": lambda g: torch.einsum("bi,bi->b", g.flatten(1), g.flatten(1)),
    "vmap": vmap(lambda g: g.flatten() @ g.flatten()),
}
CLIPPED = {
    "einsum": lambda s, g: torch.einsum("b,b...->...", s, g),
    "matmul": lambda s, g: (s @ g.flatten(1)).view(g.shape[1:]),
    "mul": lambda s, g: (g * s.view(-1, *[1] * (g.dim() - 1))).sum(0),
    "div": lambda s, g: (g / (1 / s).view(-1, *[1] * (g.dim() - 1))).sum(0),
    "tensordot": lambda s, g: torch.tensordot(s, g, 1),
    "vmap": lambda s, g: vmap(torch.mul)(s, g).sum(0),
}


def clipped_sum(model, loss, norm="pow", clip="einsum", kept=False):
    """DP-SGD of a module: the norms and the sums, and with ``kept`` the gradients."""

    def f(params, x, y):
        one = lambda p, x, y: loss(functional_call(model, p, (x[None],)), y[None])
        grads = vmap(grad(one), (None, 0, 0))(params, x, y)
        norms = sum(NORMS[norm](g) for g in grads.values()).sqrt()
        scale = 1 / (norms + 1e-6).clamp(min=1)
        sums = {k: CLIPPED[clip](scale, g) for k, g in grads.items()}
        return (norms, sums, grads) if kept else (norms, sums)

    return f


def parameters(model):
    return {k: p.detach() for k, p in model.double().named_parameters()}


def mlp(inside=80, width=60, outside=10, bias=True):
    layers = nn.Linear(inside, width, bias), nn.Tanh(), nn.Linear(width, outside, bias)
    model = nn.Sequential(*layers)
    return model, (parameters(model), f64(32, inside), torch.randint(outside, (32,)))


# ----- per-sample gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("clip", CLIPPED)
def test_norms_and_clipped_sums(norm, clip):
    model, args = mlp()
    shown = compiled(clipped_sum(model, F.cross_entropy, norm, clip), *args)
    assert shown.largest() == 80 * 60  # that of the largest result


@pytest.mark.parametrize("bias", [True, False])
def test_with_the_gradients_among_the_results(bias):
    """They are computed once, and the norms are still those of their factors."""
    model, args = mlp(bias=bias)
    shown = compiled(clipped_sum(model, F.cross_entropy, kept=True), *args)
    assert sum(n.meta["val"].numel() == 32 * 80 * 60 for n in shown.values) == 1
    squares = [n for n in shown.values if n.target in (aten.pow.Tensor_Scalar, aten.mul.Tensor)]
    assert max(n.meta["val"].numel() for n in squares) <= 32 * 80


def test_a_gradient_that_something_else_reads_is_computed_once():
    def f(a, b, s):
        g = a[:, :, None] * b[:, None, :]
        return (g * g).sum((1, 2)), (s[:, None, None] * g).sum(0), g.abs().amax()

    shown = compiled(f, f64(16, 40), f64(16, 50), f64(16))
    assert (
        sum(n.meta["val"].numel() == 16 * 40 * 50 for n in shown.values) <= 3
    )  # it, abs, times s


def test_sequences():
    """The norms by inner products of positions, while these are few."""
    layers = nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)
    model = nn.Sequential(*layers)
    f = clipped_sum(model, F.mse_loss)
    for length, small in ((6, True), (200, False)):
        shown = compiled(f, parameters(model), f64(8, length, 64), f64(8, length, 64))
        assert (8 * 64 * 96 in [n.meta["val"].numel() for n in shown.values]) is not small


def test_shared_weights():
    """The norm of a sum is not the sum of norms."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(40, 40)

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    model = Tied()
    compiled(clipped_sum(model, F.mse_loss), parameters(model), f64(16, 40), f64(16, 40))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 3, padding=1), (2, 7)),
    "2d": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 7, 6)),
    "3d": (nn.Conv3d(1, 3, 2, stride=2), (1, 4, 5, 4)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "one place": (nn.Conv2d(3, 5, 4), (3, 4, 4)),
    "one channel": (nn.Conv2d(1, 1, 3), (1, 5, 6)),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3, padding="same"), (3, 5, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("batch", [1, 4])
def test_convolutions(name, batch, always):
    """Norms by inner products of windows, sums as the weight gradient of a batch."""
    layer, shape = CONVOLUTIONS[name]
    loss = lambda out, y: (out.sin() * out).sum() * y.sum()
    f = clipped_sum(layer, loss)
    args = parameters(layer), f64(batch, *shape), f64(batch)
    compiled(f, *args)
    penalty = lambda p: (f(p, *args[1:])[0] * torch.arange(1.0, batch + 1)).sum()
    compiled(grad(penalty), args[0])


def test_transposed_convolutions(always):
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)
    loss = lambda out, y: out.square().sum() * y.sum()
    compiled(clipped_sum(layer, loss), parameters(layer), f64(3, 2, 4, 4), f64(3))


def test_a_network_of_convolutions():
    """Where there are few windows, nothing is as large as the gradients of all samples."""
    pool = nn.MaxPool2d(2)
    deep = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(32, 64, 3, padding=1)
    model = nn.Sequential(*deep, nn.ReLU(), pool, nn.Flatten(), nn.Linear(256, 30))
    args = parameters(model), f64(16, 3, 8, 8), torch.randint(30, (16,))
    assert compiled(clipped_sum(model, F.cross_entropy), *args).largest() < 16 * 32 * 64 * 9


def test_a_transformer_block():
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    shown = compiled(
        clipped_sum(model, F.mse_loss), parameters(model), f64(8, 9, 64), f64(8, 9, 64)
    )
    assert shown.largest() < 8 * 64 * 64


MODELS = {
    "convolutions": (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 2, stride=2)),
    "groups": (nn.Conv2d(3, 6, 3, groups=3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 5)),
    "instances": (nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(108, 5)),
    "one": (nn.Flatten(), nn.Linear(108, 1), nn.Linear(1, 1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_layers(name, always):
    model = nn.Sequential(*MODELS[name])
    x = f64(5, 3, 6, 6)
    loss = lambda out, y: (out * out).sum() * y.sum()
    compiled(clipped_sum(model, loss), parameters(model), x, f64(5))


def test_embeddings(always):
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(24, 3))
    x, y = torch.randint(11, (5, 4)), torch.randint(3, (5,))
    compiled(clipped_sum(model, F.cross_entropy), parameters(model), x, y)


@pytest.mark.parametrize(
    "batch, inside, width", [(1, 4, 3), (4, 1, 3), (4, 3, 1), (1, 1, 1), (0, 4, 3)]
)
def test_sizes(batch, inside, width, always):
    model = nn.Sequential(nn.Linear(inside, width), nn.Tanh(), nn.Linear(width, 3))
    y = torch.randint(3, (batch,))
    compiled(clipped_sum(model, F.cross_entropy), parameters(model), f64(batch, inside), y)


def test_tangent_kernels():
    """The products of Jacobians of pairs of samples."""
    f = lambda p, x: ((x @ p["w"] + p["b"]).tanh() @ p["v"]).sum()
    p = {"w": f64(60, 50), "b": f64(50), "v": f64(50, 3)}

    def kernel(p, x, y):
        a, b = (vmap(grad(f), (None, 0))(p, z) for z in (x, y))
        return sum(a[k].flatten(1) @ b[k].flatten(1).t() for k in p)

    assert compiled(kernel, p, f64(20, 60), f64(24, 60)).largest() <= 24 * 60


def test_gradients_through_norms():
    """A penalty on the norms of per-sample gradients, differentiated by parameters."""
    model, (params, x, y) = mlp()
    penalty = lambda p: clipped_sum(model, F.cross_entropy)(p, x, y)[0].sum()
    assert compiled(grad(penalty), params).largest() < 32 * 80 * 60
    by_autograd, shown = {k: p.requires_grad_() for k, p in params.items()}, Shown()
    losses = aot_function(penalty, shown.backend)(by_autograd), penalty(by_autograd)
    got, want = (torch.autograd.grad(loss, by_autograd.values()) for loss in losses)
    assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert shown.largest() < 32 * 80 * 60


def test_derivatives_of_compiled_functions(always):
    model, (params, x, y) = mlp(6, 5, 3)
    f = clipped_sum(model, F.cross_entropy)
    loss = lambda g: lambda w: g({**params, "0.weight": w}, x, y)[1]["0.weight"].sum()
    fast = jit(f, backend=Shown().backend)
    w = params["0.weight"]
    assert_close(grad(loss(fast))(w), grad(loss(f))(w), rtol=1e-9, atol=1e-11)
    assert_close(jacrev(grad(loss(fast)))(w), jacrev(grad(loss(f)))(w), rtol=1e-8, atol=1e-10)


# ----- other products ---------------------------------------------------------------------------


def test_chains_of_matrices():
    """A vector is multiplied last where that saves products of matrices."""
    a, b, v = f64(60, 60), f64(60, 60), f64(60)
    assert compiled(lambda: a @ b @ v).largest() == 60
    assert compiled(lambda a, b, x: a @ b @ x, a, b, f64(60, 1)).largest() == 60
    assert compiled(lambda x, y: (x @ y.t()).sum(), f64(90, 50), f64(80, 50)).largest() <= 50


def test_common_factors():
    outer = lambda x, s: (x * s[:, None]).sum(1)
    x, s = f64(50, 60), f64(50)
    compiled(outer, x, s)
    expanded = (
        lambda x: x[:, None].expand(-1, 300, -1).sum(1),
        lambda x: x.expand(9, -1, -1).mean(),
    )
    for f in expanded:
        assert compiled(f, x).largest() <= 50 * 60


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x * x * 2).sum(0),
        lambda x: (x * x).sum(-1, keepdim=True),
        lambda x: (x * x).mean(0),
        lambda x: (x * x).sum(dim=[]),
        lambda x: torch.linalg.vector_norm(x * x, dim=0),
        lambda x: torch.cosine_similarity(x, x * 2, dim=0),
    ],
)
def test_numbers_without_dimensions(f):
    """They have a dimension 0 to sum over all the same."""
    x = torch.tensor(3.0)
    torch.testing.assert_close(jit(f, backend="cpp")(x), f(x))


def test_no_rewriting_without_a_gain():
    x, w, b = f64(20, 30), f64(30, 40), f64(40)

    def step(w, b):
        h = torch.softmax(x @ w * 0.3 + b, -1)
        return (h @ w.t() - x).square().mean() + (w * w).sum()

    shown = compiled(grad(step, (0, 1)), w, b)
    exact = Shown()
    jit(grad(step, (0, 1)), backend=exact.backend, exact=True)(w, b)
    assert str(shown.graphs[0]) == str(exact.graphs[0])


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed, always):
    """Chains of views, products and sums of random shapes: every value that can be is computed as
    the sum of products that it is."""
    draw = random.Random(seed)
    args = [
        f64(*[draw.choice((1, 2, 3, 4, 6)) for _ in range(draw.randint(0, 4))]) for _ in range(4)
    ]

    def split(x):
        d = draw.randrange(x.dim())
        k = draw.choice([k for k in range(1, x.shape[d] + 1) if x.shape[d] % k == 0])
        return x.reshape(*x.shape[:d], k, x.shape[d] // k, *x.shape[d + 1 :])

    def merged(x):
        d = draw.randrange(x.dim())
        return x.flatten(d, min(d + 1, x.dim() - 1))

    def with_another(x, others):
        y = draw.choice(others)
        try:
            return x * y if draw.random() < 0.7 else x / (y.square() + 1)
        except RuntimeError:
            return x * y.sum()

    def matrices(x):
        x = x.reshape(-1, *x.shape[-2:])
        return x @ x.transpose(1, 2) if draw.random() < 0.5 else x.mT @ x

    steps = {
        "permute": lambda x: x.permute(*draw.sample(range(x.dim()), x.dim())),
        "split": split,
        "merge": merged,
        "sum": lambda x: x.sum(draw.randrange(x.dim()), keepdim=draw.random() < 0.3),
        "mean": lambda x: x.mean(draw.randrange(x.dim())),
        "square": lambda x: x**2,
        "norm": lambda x: torch.linalg.vector_norm(x, dim=draw.randrange(x.dim())),
        "expand": lambda x: x[None].expand(draw.choice((1, 2, 5)), *x.shape),
        "scale": lambda x: -0.5 * x / 3,
    }
    program = [draw.choice([*steps, "matrices", "times", "times"]) for _ in range(12)]
    state = draw.getstate()

    def f(*args):
        draw.setstate(state)
        values = list(args)
        for step in program:
            x = draw.choice(values[-3:])
            if step == "times":
                x = with_another(x, values)
            elif step == "matrices":
                x = matrices(x) if x.dim() >= 2 else x
            elif x.dim() or step in ("square", "scale", "expand"):
                x = steps[step](x)
            if x.numel() < 2000:
                values.append(x)
        return values[len(args) :: 2]

    compiled(f, *args)


# ----- non-finite values, precision, the switch -------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_not_finite(bad):
    """What they make non-finite is non-finite; the norms of other samples are as they were."""
    model, (params, x, y) = mlp()
    x[3, 5] = bad
    f = clipped_sum(model, F.cross_entropy)
    norms, sums = jit(f, backend=Shown().backend)(params, x, y)
    want, want_sums = f(params, x, y)
    assert_close(norms.isfinite(), want.isfinite())
    assert_close(norms[norms.isfinite()], want[want.isfinite()])
    assert not norms[3].isfinite() and norms.isfinite().sum() == 31
    if math.isnan(bad):
        assert_close(sums, want_sums, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_factors_that_are_not_finite(bad):
    """Products of the same factors: where some are infinite and others 0, they are NaN in any
    order."""
    a, b, s = f64(16, 40), f64(16, 50), f64(16)
    a[2], b[2, :7], s[2] = 0, bad, 1
    a[3, 3] = bad
    compiled(lambda a, b, s: torch.einsum("b,boi->oi", s, a[:, :, None] * b[:, None]), a, b, s)


def test_a_gradient_of_zero_by_inner_products(always):
    """Rounding does not make a square negative, of which the root would be NaN."""
    a = f32(64, 4, 30)
    a, b = torch.cat([a, -a], 1), torch.ones(64, 8, 20)
    squares = lambda a, b: (a.mT @ b).square().sum((1, 2))
    for f in (
        lambda a, b: torch.linalg.vector_norm(a.mT @ b, dim=(1, 2)),
        lambda a, b: (squares(a, b) * b[0, 0, 0]).sqrt(),
        lambda a, b: (3 * squares(a, b) / b[0, 0, 0]).sqrt(),
    ):
        assert jit(f, backend=Shown().backend)(a, b).isfinite().all()


def test_low_precision_and_integers_stay_as_they_are(always):
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.complex64):
        args = [torch.ones(4, 5).to(dtype), torch.ones(4, 6).to(dtype)]
        compiled(lambda a, b: ((a[:, :, None] * b[:, None]) ** 2).sum((1, 2)), *args, tight=False)


def test_results_have_memory_and_strides_of_their_own(always):
    def f(x, y):
        z = x.expand(1, *x.shape).sum(0)
        return z, (x[..., None] * y).sum(-1), (x.t() @ y).t()

    x, y = f64(4, 1), f64(4, 6)
    got, want = jit(f, backend=Shown().backend)(x, y), f(x, y)
    assert_close(got, want)
    assert [t.stride() for t in got] == [t.stride() for t in want]
    assert len({t.data_ptr() for t in (x, y, *got)}) == 5


def test_exact():
    """On by default for the C++ backend only, and never with ``exact``; that is kept in copies."""
    model, args = mlp()
    f = clipped_sum(model, F.cross_entropy)
    shown = Shown()
    jit(f, backend=shown.backend, exact=True)(*args)
    assert shown.largest() == 32 * 80 * 60
    plain = Backend(shown.compile)
    aot_function(f, plain)(*args)
    assert shown.largest() == 32 * 80 * 60
    for exact in (True, False):
        copy = pickle.loads(pickle.dumps(jit(torch.sin, backend="cpp", exact=exact)))
        assert copy.pipeline.exact is exact


def test_through_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("AOTFUNC_CACHE_DIR", str(tmp_path))
    model, args = mlp()
    f = clipped_sum(model, F.cross_entropy)
    for exact in (False, True):
        assert_close(jit(f, backend="cpp", exact=exact)(*args), f(*args), rtol=1e-9, atol=1e-11)


# ----- identity matrices ------------------------------------------------------------------------

WEIGHTS = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
IDENTITIES = {
    "on the left": (lambda w, v: (torch.eye(6, dtype=w.dtype) @ w).sin(), 0),
    "on the right": (lambda w, v: (w.T @ torch.eye(6, dtype=w.dtype)).sin(), 0),
    "of batches": (lambda w, v: torch.eye(6, dtype=w.dtype).expand(3, 6, 6) @ w.sin(), 0),
    "twice": (lambda w, v: torch.eye(6, dtype=w.dtype) @ torch.eye(6, dtype=w.dtype) @ v, 0),
    "between": (lambda w, v: w @ torch.eye(6, dtype=w.dtype) @ v, 1),
    "squared": (lambda w, v: (torch.eye(6, dtype=w.dtype) @ w).square().sum(), 0),
    "a row of it": (lambda w, v: torch.eye(6, dtype=w.dtype)[2:3] @ w, 1),
    "its sum": (lambda w, v: torch.eye(6, dtype=w.dtype).sum(0) @ v, None),
    "its trace": (lambda w, v: (torch.eye(6, dtype=w.dtype) * w).sum(), None),
    "in two dimensions": (
        lambda w, v: torch.eye(6, dtype=w.dtype).view(6, 2, 3).flatten(1) @ w.sin(),
        0,
    ),
    "a part": (lambda w, v: torch.eye(4, 6, dtype=w.dtype) @ w.sin(), 1),
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_a_product_with_an_identity_is_the_other_factor(case):
    f, products = IDENTITIES[case]
    shown = compiled(f, *WEIGHTS)
    if products is not None:
        assert shown.calls(aten.mm.default, aten.bmm.default) == products


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_a_jacobian_multiplies_no_identity(transform):
    w, v = WEIGHTS
    f = transform(lambda x: (torch.tanh(x @ w) @ v).view(2, 2))
    shown = compiled(f, torch.randn(6, dtype=torch.float64))
    assert shown.calls(aten.mm.default) == 2


def test_the_other_factor_is_copied():
    """A result shares no memory with an argument, nor with another result."""
    f = jit(lambda w: (torch.eye(6, dtype=w.dtype) @ w, torch.eye(6, dtype=w.dtype) @ w), "cpp")
    w = WEIGHTS[0].clone()
    for one in f(w):
        one.add_(1)
    assert_close(w, WEIGHTS[0], rtol=0, atol=0)
    assert_close(f(w)[0], w, rtol=0, atol=0)
    w = WEIGHTS[0]
    assert jit(jacrev(lambda x: x @ w))(w[0]).data_ptr() != w.data_ptr()


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.expand(3, 4).sum(0),
        lambda x: x[None].sum(0, keepdim=True).mean(0),
        lambda x: -x.expand(3, 4).sum(0),
        lambda x: (-x.abs()).sum(),
        lambda x: (x.expand(3, 4).sum(0) * -2.0) * x.abs(),
        lambda x: x.expand(3, 4).sum(0) * torch.full((4,), -2.0),
        lambda x: x.expand(3, 4).sum(0) / torch.tensor(-2.0),
        lambda x: (x[:, None] @ torch.ones(1, 4)).sum(1),
        lambda x: (x[:, None] * torch.full((4,), -1.0)).sum(1),
        lambda x: (x[:, None] * torch.ones(4)).mean(0),
        lambda x: x.expand(3, 4).sum(0).expand(2, 4).sum(0),
    ],
)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_sums_of_zeros_have_the_sign_of_sums(f, zero, always):
    x = torch.full((4,), zero)
    got, want = jit(f, backend="cpp")(x), f(x)
    assert got.tolist() == want.tolist()
    assert got.signbit().tolist() == want.signbit().tolist()

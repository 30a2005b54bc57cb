"""Sparse Jacobians and Hessians against dense ones, and the patterns that they find."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse

from aotfunc import (
    custom_jvp,
    custom_vjp,
    grad,
    hessian,
    jacrev,
    jit,
    map,
    scan,
    sparse_hessian,
    sparse_jacobian,
    vmap,
)
from aotfunc.api.sparse import Entries
from aotfunc.errors import ArgumentError, CaptureError
from aotfunc.transforms.sparsity.plans import by_symmetry, fewest
from tests.sweeps import every, seeds

D, C = torch.float64, torch.complex128
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, dtype=D, generator=GENERATOR)
FEW = torch.randn(12, 12, dtype=D, generator=GENERATOR) * (
    torch.rand(12, 12, generator=GENERATOR) < 0.2
)
PLACES = torch.randperm(12, generator=GENERATOR)
STENCIL = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=D)[None, None]


def hidden(x, y):
    z = x.roll(1) * x
    with torch.no_grad():
        z.mul_(y)
    return z * z


# a function, and how many entries the pattern has beyond those that are not zero
JACOBIANS = {
    "shifted products": (lambda x: x[1:] * x[:-1], 0),
    "elementwise": (torch.sin, 0),
    "a sparse matrix": (lambda x: torch.tanh(FEW @ x), 0),
    "indices": (lambda x: x[PLACES] * x, 0),
    "differences": (lambda x: (x.roll(1) - 2 * x + x.roll(-1)) ** 2, 0),
    "sums": (lambda x: x.view(3, 4).sum(1) * 2, 0),
    "means": (lambda x: x.view(3, 4).mean(1).exp(), 0),
    "softmax": (lambda x: x.view(3, 4).softmax(1), 0),
    "products of rows": (lambda x: x.view(3, 4).prod(1), 0),
    "maxima": (lambda x: x.view(3, 4).amax(0), 8),
    "a stencil": (lambda x: F.conv2d(x.view(1, 1, 3, 4), STENCIL, padding=1) ** 2, 0),
    "strides": (lambda x: F.conv1d(x.view(1, 1, 12), torch.ones(2, 1, 3, dtype=D), stride=2), 0),
    "groups of a stencil": (
        lambda x: F.conv2d(x.view(1, 2, 2, 3), STENCIL.repeat(4, 1, 1, 1), padding=1, groups=2),
        0,
    ),
    "a filter": (lambda x: F.conv1d(X[:8].view(1, 2, 4), x.view(3, 2, 2), padding=1), 12),
    "a filter and its images": (
        lambda x: F.conv_transpose1d(x[:4].view(1, 2, 2), x[4:].view(2, 2, 2)),
        8,
    ),
    "averages of windows": (lambda x: F.avg_pool2d(x.view(1, 3, 4), (2, 3), 1, (1, 0)), 0),
    "adaptive averages": (lambda x: F.adaptive_avg_pool1d(x.view(1, 2, 6), 4), 0),
    "maxima of windows": (lambda x: F.max_pool1d(x.view(1, 12), 3, 2, dilation=2), 8),
    "norms of windows": (lambda x: F.lp_pool1d(x.view(1, 12), 2, 3), 0),
    "resized": (
        lambda x: F.interpolate(x.view(1, 1, 12), 9, mode="linear", align_corners=True),
        None,
    ),
    "resized images": (
        lambda x: F.interpolate(x.view(1, 1, 2, 6), (3, 4), mode="bilinear", antialias=True),
        None,
    ),
    "distances": (lambda x: torch.cdist(x[:6].view(3, 2), x[6:].view(3, 2)), 0),
    "distances of pairs": (lambda x: F.pdist(x.view(4, 3)), 0),
    "samples of an image": (
        lambda x: F.grid_sample(
            x[:4].view(1, 1, 2, 2), x[4:8].view(1, 1, 2, 2).tanh(), align_corners=True
        ),
        0,
    ),
    "inverses": (lambda x: torch.linalg.inv(x.view(3, 2, 2)), 0),
    "products added": (lambda x: torch.addmv(x[:3], x[3:9].view(3, 2), x[9:11]), 0),
    "a renormed matrix": (lambda x: torch.renorm(x.view(3, 4), 2, 0, 0.1), 0),
    "maxima of places": (
        lambda x: torch.zeros(5, dtype=D).scatter_reduce(0, PLACES % 5, x, "amax"),
        9,
    ),
    "losses of samples": (
        lambda x: F.cross_entropy(x.view(3, 4), torch.arange(3), reduction="none"),
        0,
    ),
    "parts of memory": (lambda x: torch.as_strided_scatter(x, X[:2], (2,), (2,), 1), None),
    "windows of memory": (lambda x: x.view(3, 4).t().as_strided((5, 3), (2, 1)) ** 2, None),
    "written with no derivative": (lambda x: hidden(x, X), 0),
    "transposed": (
        lambda x: F.conv_transpose2d(x.view(1, 2, 2, 3), STENCIL.expand(2, 2, 3, 3)),
        0,
    ),
    "joined": (lambda x: torch.cat([x[:3], x[6:] * 2]), 0),
    "stacked": (lambda x: torch.stack([x, x**2]), 0),
    "scattered": (lambda x: torch.zeros(5, dtype=D).index_add(0, PLACES % 5, x * x), 0),
    "branches": (lambda x: torch.where(x > 0, x, x**2), 0),
    "padded": (lambda x: F.pad(x, (1, 2)), 0),
    "dense": (lambda x: x / x.norm(), 0),
    "norms of rows": (lambda x: x.view(3, 4).norm(dim=1), 0),
    "rows of norm one": (lambda x: F.normalize(x.view(3, 4), dim=0), 0),
    "deviations": (lambda x: torch.cat(torch.std_mean(x.view(3, 4), 1, keepdim=True)), 0),
    "sorted rows": (lambda x: x.view(3, 4).sort(1)[0], 36),
    "largest of rows": (lambda x: x.view(3, 4).topk(2, 1)[0], 18),
    "layer norm": (lambda x: F.layer_norm(x.view(3, 4), [4], FEW[0, :4], FEW[1, :4]), None),
    "layer norm, by its weight": (lambda x: F.layer_norm(X.view(3, 4), [4], x[:4], x[4:8]), 0),
    "group norm": (lambda x: F.group_norm(x.view(1, 6, 2), 3, x[:6]), None),
    "statistics": (
        lambda x: torch.cat(torch.native_layer_norm(x.view(3, 4), [4], x[:4], None, 1)[1:]),
        None,
    ),
    "statistics of groups": (
        lambda x: torch.native_group_norm(x.view(1, 6, 2), None, None, 1, 6, 2, 3, 1)[2],
        0,
    ),
    "statistics of one": (
        lambda x: torch.native_layer_norm(X.view(3, 4), [4], x[:4], None, 1)[1] * x[:3],
        None,
    ),
    "batch norm": (lambda x: F.batch_norm(x.view(4, 3), None, None, training=True), 0),
    "batch norm of a trained net": (
        lambda x: F.batch_norm(x.view(4, 3), FEW[0, :3], FEW[1, :3] + 1, x[:3]),
        0,
    ),
    "matrices": (lambda x: x.view(3, 4) @ x.view(4, 3), 0),
    "batches": (lambda x: torch.bmm(x.view(2, 2, 3), x.view(2, 3, 2)), 0),
    "a square": (lambda x: torch.dot(x, x).view(1), 0),
    "a square by vdot": (lambda x: torch.vdot(x, x).view(1), 0),
    "cross products": (lambda x: torch.linalg.cross(x.view(4, 3), x.flip(0).view(4, 3)), None),
    "a matrix and a vector": (lambda x: x.view(3, 4) @ x[:4], 0),
    "an affine map": (lambda x: F.linear(x.view(3, 4), FEW[:2, :4] + 1, FEW[0, :2]), 0),
    "split": (
        lambda x: sum(a * b for a, b in zip(x.split(4), x.flip(0).split(4), strict=True)),
        0,
    ),
    "constant": (lambda x: torch.ones(3, dtype=D), 0),
    "written": (lambda x: x.clone().index_put_((PLACES[:3],), x[:3] * x[3:6]), None),
    "a part of complex values": (lambda x: torch.complex(x, x.flip(0)).imag * 2, 12),
    "conjugates": (lambda x: torch.complex(x, x.roll(1)).conj()[:5].resolve_conj().imag, 5),
    "complex products": (lambda x: (torch.complex(x, x.flip(0)) * (1 + 2j)).real, 0),
    "pairs as complex values": (lambda x: torch.view_as_complex(x.view(6, 2)).roll(1).abs(), 0),
    "complex squares": (lambda x: torch.view_as_real((x + 1j * x.roll(1)) ** 2), None),
    "a complex matrix": (lambda x: torch.view_as_real((FEW + 1j * FEW.T) @ x.to(C)), None),
    "a spectrum": (lambda x: torch.fft.rfft(x).abs(), None),
    "a compiled function": (lambda x: jit(lambda x: x[1:] * x[:-1])(x), 0),
    "a batch of gradients": (lambda x: vmap(grad(lambda x: x**3))(x), 0),
}


@pytest.mark.parametrize("name", JACOBIANS)
def test_jacobians(name):
    f, more = JACOBIANS[name]
    found, expected = sparse_jacobian(f)(X), jacrev(f)(X)
    torch.testing.assert_close(found.to_dense(), expected)
    assert more is None or found._nnz() == (expected != 0).sum() + more


HESSIANS = {
    "Rosenbrock": (
        lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(),
        34,
    ),
    "elementwise": (lambda x: x.sin().sum(), 12),
    "a ring": (lambda x: ((x.roll(1) - x) ** 4).sum(), 36),
    "a chain": (lambda x: sum(((x[i] - x[i + 1]) ** 2 + 1) ** -3 for i in range(11)), 34),
    "dense": (lambda x: x.norm(), 144),
    "an arrow": (lambda x: (x[0] * x[1:]).sin().sum(), 34),
    "a star of stars": (lambda x: (x[:3].repeat_interleave(3) * x[3:] ** 2).sum() * 2, 27),
    "a grid": (lambda x: sum((x.view(3, 4).diff(dim=d) ** 4).sum() for d in (0, 1)), 46),
    "norms of rows": (lambda x: x.view(3, 4).norm(dim=1).sin().sum(), 48),
    "layer norm": (lambda x: F.layer_norm(x.view(3, 4), [4]).pow(3).sum(), 48),
    "group norm": (lambda x: F.group_norm(x.view(1, 6, 2), 3).pow(3).sum(), 48),
    "batch norm": (
        lambda x: F.batch_norm(x.view(4, 3), None, None, training=True).exp().sum(),
        48,
    ),
    "batch norm of a trained net": (
        lambda x: (
            F.batch_norm(x.view(4, 3), X[:3], X[:3].exp(), x[:3], x[3:6]).pow(3).sum()
            + F.batch_norm(x.view(4, 3), X[:3], X[:3].exp()).pow(3).sum()
        ),
        None,
    ),
    "absolute values of complex ones": (
        lambda x: torch.complex(x[:6], x[6:]).abs().exp().sum(),
        24,
    ),
    "a network": (
        lambda x: (
            F.avg_pool2d(
                F.conv2d(
                    F.conv2d(x.view(1, 1, 3, 4), STENCIL, padding=1).tanh(), STENCIL, padding=1
                ),
                (1, 2),
            )
            .pow(2)
            .sum()
        ),
        None,
    ),
    "entropies": (
        lambda x: F.cross_entropy(x.view(3, 4), torch.arange(3)),
        48,
    ),
    "log softmax": (lambda x: x.view(3, 4).log_softmax(1).square().sum(), 48),
}


@pytest.mark.parametrize("name", HESSIANS)
def test_hessians(name):
    f, entries = HESSIANS[name]
    found = sparse_hessian(f)(X)
    torch.testing.assert_close(found.to_dense(), hessian(f)(X))
    assert entries is None or found._nnz() == entries


@pytest.mark.parametrize(
    "name, products", [("an arrow", 2), ("a star of stars", 2), ("a chain", 3), ("a grid", 5)]
)
def test_a_symmetric_matrix_needs_fewer_products(name, products):
    f, _ = HESSIANS[name]
    entries = Entries("sparse_hessian", grad(f), 0, (X,), {})
    assert entries.plan("test", by_symmetry).n_products <= products


@pytest.mark.parametrize("seed", seeds(3))
def test_star_colourings(seed):
    """Every entry of random symmetric matrices is read where it stands alone."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 40))
    matrix = rng.random((size, size)) * (rng.random((size, size)) < rng.random() * 0.3)
    matrix = matrix + matrix.T
    plan = by_symmetry(sparse.coo_array(matrix != 0))
    read = (matrix @ np.eye(plan.n_products)[plan.columns.colours])[plan.columns[:1:-1]]
    assert np.array_equal(read, matrix[plan.row, plan.col])


def test_derivatives_that_are_not_symmetric():
    """A rule of the user's may have any Jacobian: no entry is read from its mirror image."""

    @custom_vjp
    def product(x):
        return (x[1:] * x[:-1]).sum()

    product.defvjp(
        lambda x: (product(x), x), lambda x, g: (g * torch.cat([x[1:] ** 2, x[:1] * x[-1:]]),)
    )
    torch.testing.assert_close(sparse_hessian(product)(X).to_dense(), hessian(product)(X))


def two_rows(x):
    return torch.cat([x[1:] * x[0], x.sum()[None], x[:-1] * x[1:]])


@pytest.mark.parametrize("f, products", [(two_rows, 4), (lambda x: two_rows(x)[11:], 3)])
def test_full_rows_and_columns(f, products):
    """A row that holds everything takes one product from the left."""
    entries = Entries("sparse_jacobian", f, 0, (X,), {})
    assert entries.plan("test", fewest).n_products == products
    for chunk_size in (None, 1):
        found = sparse_jacobian(f, chunk_size=chunk_size)(X)
        torch.testing.assert_close(found.to_dense(), jacrev(f)(X))


def test_colouring_is_linear():
    """The time of an arrow's plans grows with its entries, not with their square."""
    n = 1 << 13
    hub, other = np.zeros(n, int), np.arange(n)
    at = np.concatenate([hub, other, other]), np.concatenate([other, hub, other])
    arrow = sparse.coo_array((np.ones(3 * n, bool), at), (n, n))
    arrow.sum_duplicates()
    start = time.process_time()
    assert (by_symmetry(arrow).n_products, fewest(arrow).n_products) == (2, 3)
    assert time.process_time() - start < 4


RULES = {
    "custom_vjp": "vjp",
    "custom_jvp": "jvp",
    "a Function": "function",
    "a rule of zeros": "zeros",
    "a hook": "hook",
    "a compiled rule": "compiled",
}


@pytest.mark.parametrize("name", RULES)
def test_rules_with_another_pattern(name):
    """Entries are those of the user's rule, where its function has none, too."""
    f = with_rule(RULES[name])
    torch.testing.assert_close(sparse_jacobian(f)(X).to_dense(), jacrev(f)(X))
    g = lambda x: f(x).pow(3).sum()
    torch.testing.assert_close(sparse_hessian(g)(X).to_dense(), hessian(g)(X))


def with_rule(kind):
    back = lambda x, g: g + (g * x).roll(1)
    if kind == "hook":

        def hooked(x):
            y = x * 2
            y.register_hook(lambda g: g.roll(1))
            return y * y

        return hooked
    if kind in ("function", "zeros"):

        class Other(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * 2 if kind == "function" else torch.ones_like(x)

            @staticmethod
            def backward(ctx, g):
                return back(*ctx.saved_tensors, g)

        return Other.apply
    if kind == "jvp":
        f = custom_jvp(lambda x: x.detach().round())
        f.defjvp(lambda primals, tangents: (f(*primals), back(*primals, *tangents)))
        return f
    f = custom_vjp(lambda x: x * 2)
    f.defvjp(lambda x: (x * 2, x), lambda x, g: (back(x, g),))
    return jit(f, backend="eager") if kind == "compiled" else f


BLOCKS = torch.randn(4, 3, dtype=D, generator=GENERATOR)
STRUCTURED = {
    "apart": lambda x: (x.prod(1) * x.sin().sum(1)).sum(),
    "coupled": lambda x: (x.sin() * x.roll(1, 0)).prod(1).sum(),
    "all together": lambda x: x.norm() ** 3,
    "numbers": lambda x: x.sum(1).roll(1).cos().sum() + (x[0] * x[1]).sum() ** 2,
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_parts_of_hessians(name):
    f = STRUCTURED[name]
    whole, x = hessian(f)(BLOCKS), BLOCKS
    close = torch.testing.assert_close
    each = torch.arange(4)
    close(hessian(f, structure="blocks")(x), whole[each, :, each])
    close(hessian(f, structure="blocks", chunk_size=2)(x), whole[each, :, each])
    close(hessian(f, structure="sparse")(x).to_dense(), whole)
    diagonal = whole.view(12, 12).diagonal().view(4, 3)
    close(hessian(f, structure="diagonal")(x), diagonal)
    close(hessian(lambda s, x: s * f(x), 1, structure="diagonal")(2.0, x), 2 * diagonal)
    close(jit(hessian(f, structure="diagonal"), backend="eager")(x), diagonal)
    close(vmap(hessian(f, structure="diagonal"))(x[None]), diagonal[None])
    column = lambda x: f(x.view(4, 3))
    close(hessian(column, structure="blocks")(x.flatten()), diagonal.flatten())
    y = x.clone().requires_grad_()
    (third,) = torch.autograd.grad(hessian(f, structure="blocks")(y).sum(), y)
    close(third, grad(lambda x: hessian(f)(x)[each, :, each].sum())(x))


def test_structures_that_there_are_not():
    f = lambda x: x.square().sum()
    with pytest.raises(ArgumentError, match="structure must be one of diagonal, blocks, sparse"):
        hessian(f, structure="band")
    with pytest.raises(ArgumentError, match="excludes has_aux, holomorphic and validate"):
        hessian(f, structure="blocks", has_aux=True)
    with pytest.raises(ArgumentError, match="no dimension"):
        hessian(f, structure="blocks")(X[0])
    with pytest.raises(ArgumentError, match="must be one real tensor"):
        hessian(lambda x: f(x[0]), structure="diagonal")((X, X))
    with pytest.raises(CaptureError, match="call it outside"):
        jit(hessian(f, structure="blocks"))(X)


def test_few_products_for_many_entries():
    """A band of three needs three products with the Jacobian at any size."""
    calls = []

    def f(x):
        calls.append(x.shape)
        return x.roll(1) * x * x.roll(-1)

    x = torch.randn(3000, dtype=D)
    found = sparse_jacobian(f)(x).coalesce()
    assert found._nnz() == 9000
    rows, columns = found.indices()
    assert ((rows - columns + 1) % 3000).max() == 2


def test_patterns_follow_values():
    """Indices and zeros of matrices are looked at in each call."""
    index, matrix = torch.tensor([0, 1]), torch.eye(3, dtype=D)
    f = lambda x: torch.cat([x[index], matrix @ x])
    x = torch.arange(3, dtype=D)
    for _ in range(2):
        for g in (f, jit(f, backend="eager")):
            torch.testing.assert_close(sparse_jacobian(g)(x).to_dense(), jacrev(f)(x))
        index += 1
        matrix[0, 2] = 5


@pytest.mark.parametrize("make", [sparse_jacobian, lambda f: sparse_hessian(grad_of(f))])
def test_single_inside_of_double(make):
    """A function may compute in float32 where its argument is float64."""
    f = lambda x: x[1:].float() * 2 * x[:-1].float()
    dense = jacrev(f) if make is sparse_jacobian else hessian(grad_of(f))
    torch.testing.assert_close(make(f)(X).to_dense(), dense(X), check_dtype=False)


def grad_of(f):
    return lambda x: f(x).square().sum()


RANDOM = {
    "a random matrix": (lambda x: F.dropout(torch.ones(12, 12, dtype=D), 0.7) @ x, 144),
    "its products": (lambda x: (F.dropout(FEW, 0.3) * 2).T @ x.sin() + x, 144),
    "dropout": (lambda x: F.dropout(x, 0.5) * x, 12),
    "factors": (lambda x: x * torch.rand(12, dtype=D) * x.roll(1), 24),
    "random places": (lambda x: x[torch.randperm(12)] * x, 144),
    "random branches": (lambda x: torch.where(torch.rand(12, dtype=D) > 0.5, x, x.roll(1)), 24),
    "a random filter": (lambda x: F.conv1d(x[None], torch.rand(1, 1, 3, dtype=D).round()), 30),
    "random scales": (lambda x: torch.bernoulli(torch.rand(12, 12, dtype=D)).mv(x), 144),
    "random places to write": (
        lambda x: torch.zeros(5, dtype=D).index_add(0, torch.randint(5, (12,)), x * x),
        60,
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_patterns_hold_for_every_draw(name):
    """A pattern does not depend on what is drawn, and finding it draws nothing."""
    f, entries = RANDOM[name]
    for seed in range(3):
        torch.manual_seed(seed)
        expected, after = jacrev(f)(X), torch.get_rng_state()
        torch.manual_seed(seed)
        found = sparse_jacobian(f)(X)
        torch.testing.assert_close(found.to_dense(), expected)
        assert found._nnz() == entries
        assert torch.equal(torch.get_rng_state(), after)
        torch.manual_seed(seed)
        expected = hessian(grad_of(f))(X)
        torch.manual_seed(seed)
        torch.testing.assert_close(sparse_hessian(grad_of(f))(X).to_dense(), expected)


def test_patterns_follow_the_argument():
    f = lambda x: x.cummax(0)[0].sum()
    for x in (X, -X, X.flip(0)):
        torch.testing.assert_close(sparse_hessian(f)(x).to_dense(), hessian(f)(x))
        torch.testing.assert_close(sparse_jacobian(grad(f))(x).to_dense(), hessian(f)(x))


def test_rows_where_there_are_fewer():
    f = lambda x: torch.stack([x.sum(), x[:2].prod()])
    torch.testing.assert_close(sparse_jacobian(f)(X).to_dense(), jacrev(f)(X))
    torch.testing.assert_close(sparse_jacobian(f, chunk_size=1)(X).to_dense(), jacrev(f)(X))


def test_arguments_and_shapes():
    f = lambda p, x, scale: (p["w"] * x * scale)[:, None]
    p = {"w": X[:4]}
    found = sparse_jacobian(f, 1)(p, X[4:8].clone(), scale=2.0)
    assert found.shape == (4, 1, 4)
    torch.testing.assert_close(found.to_dense(), jacrev(f, 1)(p, X[4:8], scale=2.0))
    y = X.clone().requires_grad_()
    sparse_jacobian(torch.sin)(y).to_dense().sum().backward()
    torch.testing.assert_close(y.grad, -X.sin())


def test_errors():
    with pytest.raises(CaptureError, match="depend on values, which other transforms do not have"):
        jit(sparse_jacobian(torch.sin))(X)
    with pytest.raises(ArgumentError, match="must return one real floating tensor"):
        sparse_jacobian(lambda x: (x, x))(X)
    with pytest.raises(ArgumentError, match="argument 0 must be one real tensor"):
        sparse_jacobian(torch.sin)(X.to(torch.complex128))
    with pytest.raises(ArgumentError, match="zero dimensions"):
        sparse_hessian(torch.sin)(X)


@custom_vjp
def mixing(x):
    return x.sin()


mixing.defvjp(lambda x: (x.sin(), None), lambda _, g: (g.sum() + 0 * g,))


def diffused(x, steps):
    """Return the heat equation after so many explicit steps, as a loop."""
    step = lambda u, _: (u + 0.1 * F.pad(u[2:] - 2 * u[1:-1] + u[:-2], (1, 1)), None)
    return scan(step, x, length=steps)[0]


#: a function of 12 numbers with a loop in it, and its number of entries
LOOPS = {
    "a map": (lambda x: map(lambda y: y.sin() * y, x), 12),
    "a map of rows": (lambda x: map(lambda y: y.flip(0) * y[0], x.view(4, 3)), 20),
    "a sum of rows": (lambda x: scan(lambda h, y: (h + y, None), X[:3], x.view(4, 3))[0], 12),
    "two steps of a stencil": (lambda x: diffused(x, 2), 1 + 4 + 8 * 5 + 4 + 1),
    "sums so far": (lambda x: scan(lambda h, y: (h * y, h), X[0] * 0 + 1, x)[1], 12 * 11 // 2),
    "in reverse": (
        lambda x: scan(lambda h, y: (h + y, h), X[0] * 0, x, reverse=True)[1],
        12 * 11 // 2,
    ),
    "a loop in a loop": (
        lambda x: map(lambda y: scan(lambda h, z: (h * z, h), y[0], y)[1], x.view(4, 3)),
        4 * (1 + 1 + 2),
    ),
    "a rule in a map": (lambda x: map(mixing, x.view(4, 3)), 4 * 9),
    "a rule in many steps": (lambda x: map(mixing, x.view(4, 3).repeat(10, 1)), 40 * 9),
    "a detached row": (lambda x: map(lambda y: y.detach() * y.sum(), x.view(4, 3)), 36),
    "a compiled loop": (jit(lambda x: diffused(x, 1)), 10 * 3 + 2),
    "many steps, which stay a loop": (lambda x: diffused(x, 60), 144),
}


@pytest.mark.parametrize("name", every(2, LOOPS))
def test_loops(name):
    f, entries = LOOPS[name]
    dense = jacrev(f)(X)
    found = sparse_jacobian(f)(X)
    torch.testing.assert_close(found.to_dense(), dense)
    assert (dense != 0).sum() <= found._nnz()
    assert found._nnz() == entries
    loss = lambda x: (f(x) ** 2).sum()
    torch.testing.assert_close(sparse_hessian(loss)(X).to_dense(), hessian(loss)(X))


def test_a_function_runs_once():
    """Products by columns and by rows are of one recording, and what it writes is written once."""
    runs, buffer, x = [], torch.zeros(6), torch.arange(1.0, 7)

    def f(x):
        runs.append(x)
        buffer.add_(1)
        return torch.cat([x * x, x.sum()[None] ** 2])  # a full row

    result = sparse_jacobian(f)(x)
    assert len(runs) == 1 and buffer.eq(1).all()
    expected = torch.cat([2 * x.diag(), 2 * x.sum().expand(1, 6)])
    torch.testing.assert_close(result.to_dense(), expected)
    runs.clear()
    hessian(lambda x: f(x).sum(), structure="blocks")(x)
    assert len(runs) == 1 and buffer.eq(2).all()

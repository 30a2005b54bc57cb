"""Taylor mode and what it gives, against towers of ``jvp`` and explicit Hessians."""

import math

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves

import aotfunc
from aotfunc import (
    diag_hessian,
    ggn,
    grad,
    hessian,
    hvp,
    jacrev,
    jet,
    jit,
    jvp,
    laplacian,
    make_fx,
    vjp,
    vmap,
)
from aotfunc.errors import ArgumentError, RuleError
from aotfunc.graph import n_ops
from tests.ops.table import NO_FUNCTION, RANDOM
from tests.sweeps import every

D = torch.float64
W = torch.randn(4, 4, dtype=D, generator=torch.Generator().manual_seed(5))


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def tower(f, x, derivatives):
    """The derivatives of ``f`` along the curve, each by a jvp of the one before."""
    terms = [(k, c) for k, c in enumerate(derivatives, 1) if c is not None]
    h = lambda t: f(sum((c * (t**k / math.factorial(k)) for k, c in terms), x))
    found = []
    for _ in derivatives:
        h = along(h)
        found.append(h(torch.zeros((), dtype=D)))
    return found


def along(h):
    return lambda t: jvp(h, (t,), (torch.ones_like(t),))[1]


FUNCTIONS = {
    "sums": lambda x: x + 2 * x - x.mean(),
    "mlp": lambda x: torch.tanh(W @ torch.tanh(W @ x)).sum(),
    "quotient": lambda x: torch.sin(x) / (2 + torch.cos(x)),
    "quotient of numbers": lambda x: 1 / (3 + x * x),
    "whole powers": lambda x: x**2 + x**3 - x**7,
    "powers": lambda x: (x * x + 1) ** 1.7 + (x * x + 1) ** -2,
    "branches": lambda x: torch.where(x > 0, x**2, x.sin()).maximum(x.exp() - 2),
    "matrices": lambda x: torch.linalg.inv(torch.outer(x, x) + 3 * torch.eye(4, dtype=D)),
    "written": lambda x: x.clone().mul_(x).add_(x).sin_(),
    "a compiled function": lambda x: jit(lambda x: x.sin() * x)(x),
    "a gradient": lambda x: grad(lambda x: (x.sin() * x).sum())(x),
    "a batch": lambda x: vmap(lambda x: torch.tanh(W @ x))(torch.stack([x, x * x])),
    "norms": lambda x: torch.nn.functional.layer_norm(x, (4,)) * torch.softmax(x, 0),
    "attention of views": lambda x: torch.nn.functional.scaled_dot_product_attention(
        *(torch.outer(x, y).view(1, 1, 4, 4) for y in (x, x.sin(), x.cos()))
    ),
    "detached": lambda x: x.detach() * x,
    "integers": lambda x: x * (x * 10).long(),
    "complex": lambda x: torch.tanh(x + 1j) * torch.sigmoid(x * 1j - 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    f, x = FUNCTIONS[name], numbers(4)
    everywhere = [numbers(4, seed=k) for k in range(1, 6)]
    for derivatives in (everywhere, [everywhere[0], None, None, None, None]):
        value, found = jet(f, (x,), (derivatives,))
        torch.testing.assert_close(value, f(x))
        torch.testing.assert_close(found, tower(f, x, derivatives))


OPS = [
    op
    for op in op_db
    if op.supports_forward_ad
    and D in op.dtypes
    and op.name.replace(".", "_") not in NO_FUNCTION | RANDOM
]


@pytest.mark.filterwarnings("ignore")  # of deprecated ops
@pytest.mark.parametrize("op", every(3, OPS), ids=lambda op: op.full_name)
def test_ops(op):
    small = (s for s in op.sample_inputs("cpu", D) if isinstance(s.input, torch.Tensor))
    sample = next((s for s in small if 0 < s.input.numel() <= 200), None)
    if sample is None:
        pytest.skip("no small sample")
    f = lambda x: op(x, *sample.args, **sample.kwargs)
    x = sample.input
    derivatives = [numbers(*x.shape, seed=k) for k in range(1, 4)]
    try:
        expected = tower(f, x, derivatives)
    except (ArgumentError, RuleError, RuntimeError) as error:
        pytest.skip(f"no tower: {error}")
    for found, reference in zip(
        tree_leaves(jet(f, (x,), (derivatives,))[1]), tree_leaves(expected), strict=True
    ):
        if reference.is_floating_point():
            torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-8, equal_nan=True)


def test_order_ten():
    one = torch.ones((), dtype=D)
    derivatives = [one] + [None] * 9
    x = torch.tensor(0.3, dtype=D)
    for f, k_th in (
        (torch.exp, lambda k: x.exp()),
        (torch.sin, lambda k: torch.sin(x + k * math.pi / 2)),
        (torch.log, lambda k: (-1) ** (k - 1) * math.factorial(k - 1) / x**k),
        (torch.sqrt, lambda k: x ** (0.5 - k) * math.prod(0.5 - j for j in range(k))),
    ):
        for k, found in enumerate(jet(f, (x,), (derivatives,))[1], 1):
            torch.testing.assert_close(found, torch.as_tensor(k_th(k), dtype=D))


def test_long_programs():
    def f(x):
        for _ in range(150):
            x = torch.sin(x) * 1.01
        return x

    x, one = numbers(2), torch.ones(2, dtype=D)
    found = jet(f, (x,), ([one, None],))[1][1]
    torch.testing.assert_close(found, tower(f, x, [one, None])[1])


@pytest.mark.parametrize(
    ("f", "unrolled"),
    [
        (lambda x: aotfunc.map(torch.sin, x), torch.sin),
        (
            lambda x: aotfunc.scan(lambda c, y: (c * y, y), x[0], x)[0],
            lambda x: x[0] * x[0] * x[1] * x[2] * x[3],
        ),
    ],
)
def test_loops(f, unrolled):
    x, terms = numbers(4), [numbers(4), None, torch.ones(4, dtype=D)]
    torch.testing.assert_close(jet(f, (x,), (terms,))[1], tower(unrolled, x, terms))


def test_graphs_grow_with_the_square_of_the_order():
    def nodes(order):
        one = torch.ones(4, dtype=D)
        f = lambda x: jet(FUNCTIONS["mlp"], (x,), ([one] + [None] * (order - 1),))[1]
        return len(make_fx(f)(numbers(4)).graph.nodes)

    assert nodes(16) / nodes(8) < 4.5


def test_trees_and_several_primals():
    f = lambda p, y: {"out": p["a"] * y, "sum": [p["a"].sum(), p["b"] ** 2]}
    p = {"a": numbers(3), "b": numbers(seed=1)}
    d = {"b": numbers(seed=2), "a": numbers(3, seed=3)}
    value, found = jet(f, (p, numbers(3, seed=4)), ([d, None], [None, numbers(3, seed=5)]))
    assert value.keys() == found[0].keys() == found[1].keys()
    torch.testing.assert_close(found[1]["sum"][1], 2 * d["b"] ** 2)
    torch.testing.assert_close(found[1]["out"], p["a"] * numbers(3, seed=5))
    assert found[0]["out"].equal(d["a"] * numbers(3, seed=4))


def test_coefficients_instead_of_derivatives():
    x, one = torch.zeros((), dtype=D), torch.ones((), dtype=D)
    terms = jet(torch.exp, (x,), ([one, None, None],), factorial_scaled=False)[1]
    torch.testing.assert_close([t.item() for t in terms], [1.0, 1 / 2, 1 / 6])


@pytest.mark.parametrize("p", [0, 0.0, 3.5, 65.0])
def test_powers_of_zero(p):
    """Coefficients below the exponent are zero there, not zero by zero."""
    x, f = torch.tensor([0.0, 1.0], dtype=D), lambda x: x**p
    torch.testing.assert_close(
        jet(f, (x,), ([torch.ones_like(x), None, None],))[1],
        tower(f, x, [torch.ones_like(x), None, None]),
    )
    third = jacrev(lambda x: diag_hessian(lambda x: f(x).sum())(x).sum())(x)
    torch.testing.assert_close(third, torch.tensor([0, p * (p - 1) * (p - 2)], dtype=D))


def test_under_transforms():
    x, v = numbers(4), numbers(4, seed=1)
    third = lambda x: jet(FUNCTIONS["mlp"], (x,), ([v, None, None],))[1][2]
    by_tower = lambda x: tower(FUNCTIONS["mlp"], x, [v, None, None])[2]
    batch = torch.stack([x, v])
    for through in (
        grad,
        hessian,
        jit,
        lambda f: jit(grad(f)),
        lambda f: lambda x: vmap(f)(batch),
    ):
        torch.testing.assert_close(through(third)(x), through(by_tower)(x))
    y = x.clone().requires_grad_()
    third(y).backward()
    torch.testing.assert_close(y.grad, grad(by_tower)(x))
    f = aotfunc.custom_vjp(torch.sin)
    f.defvjp(lambda x: (x.sin(), x), lambda x, g: (g * x.cos(),))
    torch.testing.assert_close(
        jet(f, (x,), ([v, None, None],)), jet(torch.sin, (x,), ([v, None, None],))
    )


NET = torch.nn.Sequential(
    torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.LayerNorm(6), torch.nn.Linear(6, 6)
).double()
SCALARS = {
    "mlp": lambda x: torch.tanh(W @ torch.tanh(W @ x)).sum(),
    "layers": lambda x: NET(x.expand(3, 4).cumsum(0)).softmax(-1).prod(),
    "quotient": lambda x: (x / (1 + x.outer(x).relu()).diagonal()).sum(),
    "powers": lambda x: (x**2).sum() * (x.abs() ** 3.5).sum() + x.norm(),
    "several results": lambda x: torch.nn.functional.cross_entropy(
        (W @ x)[None], torch.tensor([1])
    ),
    "inverse": lambda x: torch.linalg.inv(x.outer(x) + x.diag() + torch.eye(4, dtype=D)).sum(),
    "complex": lambda x: ((x + 1j * x.cos()) ** 2 * (x - 2j)).real.sum(),
    "branch": lambda x: aotfunc.cond(x[0] > 9, torch.sin, lambda x: x * x.exp(), x).prod(),
    "loop": lambda x: aotfunc.scan(lambda c, row: ((c * row).sin(), None), x, x.outer(x))[0].sum(),
    "cut": lambda x: (x.detach() * x * x.sin()).sum(),
    "linear": lambda x: x.sum(),
    "constant": lambda x: torch.ones((), dtype=D),
    "one element": lambda x: x.exp().prod().reshape(1, 1),
}


@pytest.mark.parametrize("name", SCALARS)
def test_diagonals_of_scalars(name):
    f, x = SCALARS[name], numbers(4)
    diagonal = lambda h: h.diagonal(dim1=-1, dim2=-2).movedim(-1, 0)
    want = diagonal(hessian(f)(x))
    torch.testing.assert_close(diag_hessian(f)(x), want)
    torch.testing.assert_close(jit(diag_hessian(f, chunk_size=3))(x), want)
    batch = torch.stack([x, x.sin()])
    torch.testing.assert_close(vmap(diag_hessian(f))(batch)[0], want)
    torch.testing.assert_close(
        grad(lambda x: diag_hessian(f)(x).sin().sum())(x),
        grad(lambda x: diagonal(hessian(f)(x)).sin().sum())(x),
    )


def test_a_diagonal_takes_one_product_a_layer_but_the_first():
    f = lambda x: torch.tanh(W @ torch.tanh(W @ torch.tanh(W @ x))).sum()
    nodes = make_fx(diag_hessian(f))(numbers(4)).graph.nodes
    assert len([n for n in nodes if n.target is torch.ops.aten.mm.default]) == 2


@pytest.mark.parametrize("transform", [laplacian, diag_hessian])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_second_derivatives_write_once(transform, chunk_size):
    calls = torch.zeros(())

    def f(x):
        x.mul_(2)
        calls.add_(1)
        return (x**3).sum()

    x = numbers(3)
    want = transform(lambda x: ((2 * x) ** 3).sum())(x)
    given = x.clone()
    torch.testing.assert_close(transform(f, chunk_size=chunk_size)(given), want)
    torch.testing.assert_close((given, calls), (2 * x, torch.ones(())))


def test_laplacian_and_diagonal():
    x, f = numbers(4), FUNCTIONS["mlp"]
    whole = hessian(f)(x)
    torch.testing.assert_close(laplacian(f)(x), whole.trace())
    torch.testing.assert_close(laplacian(f, chunk_size=3)(x), whole.trace())
    torch.testing.assert_close(diag_hessian(f)(x), whole.diagonal())
    torch.testing.assert_close(grad(laplacian(f))(x), grad(lambda x: hessian(f)(x).trace())(x))
    batch = numbers(3, 4)
    torch.testing.assert_close(
        jit(vmap(laplacian(f)))(batch), torch.stack([laplacian(f)(x) for x in batch])
    )
    of_tree = lambda x: {"y": torch.sin(x) * x.sum(), "z": (x**3).sum()}
    found, expected = laplacian(of_tree)(x), hessian(of_tree)(x)
    torch.testing.assert_close(found["y"], expected["y"].diagonal(dim1=1, dim2=2).sum(-1))
    torch.testing.assert_close(found["z"], expected["z"].trace())
    matrix = numbers(2, 3)
    torch.testing.assert_close(
        diag_hessian(lambda x: (x**3 * x.sum()).sum())(matrix),
        hessian(lambda x: (x.view(2, 3) ** 3 * x.sum()).sum())(matrix.view(-1))
        .diagonal()
        .view(2, 3),
    )


def test_products_with_hessians():
    x, v, f = numbers(4), numbers(4, seed=1), FUNCTIONS["mlp"]
    gradient, product = hvp(f, (x,), (v,))
    torch.testing.assert_close((gradient, product), (grad(f)(x), hessian(f)(x) @ v))
    two = hvp(lambda x, y: (x * y**2).sum(), (x, v), (v, x))[1]
    torch.testing.assert_close(two, (2 * v * x, 2 * v * v + 2 * x * x))
    net = lambda w: torch.tanh(numbers(5, 4) @ w)
    loss = lambda y: (y**2 * y.exp()).sum()
    jacobian, curvature = jacrev(net)(x), hessian(loss)(net(x))
    torch.testing.assert_close(ggn(net, loss, x, v), jacobian.mT @ curvature @ jacobian @ v)


@pytest.mark.parametrize(
    "primals, series, words",
    [
        ((numbers(2),), ([],), "must have one length, at least 1"),
        ((numbers(2),), (), "series must hold a list for each primal"),
        ((numbers(2), numbers(2)), ([None], [None, None]), "must have one length"),
        ((numbers(2),), ([numbers(3)],), r"derivative 1 of x \(argument 0\) has shape \[3\]"),
        ((numbers(2),), ([[numbers(2)]],), "does not have the structure of its primal"),
        ((torch.arange(2),), ([None],), "dtype torch.int64"),
    ],
)
def test_errors(primals, series, words):
    with pytest.raises(ArgumentError, match=words):
        jet(lambda x, *_: x.sin(), primals, series)


@pytest.mark.parametrize("transform", [laplacian, diag_hessian])
def test_second_derivatives_by_complex_numbers(transform):
    z = torch.complex(numbers(3), numbers(3).cos())
    with pytest.raises(ArgumentError, match=r"argument.* is complex; take that of lambda u, v:"):
        transform(lambda z: z.abs().square().sum())(z)
    with pytest.raises(ArgumentError, match="is complex"):
        jit(transform(lambda z: (z**3).sum()))(z)
    by_part = lambda u: torch.exp(1j * u).sum()  # a complex result has both parts
    parts = [transform(lambda u, f=f: f(by_part(u)))(z.real) for f in (torch.real, torch.imag)]
    torch.testing.assert_close(transform(by_part)(z.real), torch.complex(*parts))


def test_products_with_matrices_by_complex_numbers():
    """They are derivatives along a line of real parameters."""
    z, v = torch.complex(numbers(3), numbers(3).cos()), torch.complex(numbers(3).sin(), numbers(3))
    f = lambda z: (z.abs() ** 4).sum() + (z * z.sin()).real.sum()
    step = 1e-6
    want = (grad(f)(z + step * v) - grad(f)(z - step * v)) / (2 * step)
    torch.testing.assert_close(hvp(f, (z,), (v,))[1], want, rtol=1e-6, atol=1e-6)
    model = lambda z: z * z.cos()
    pushed = jvp(model, (z,), (v,))[1]
    want = vjp(model, z)[1](jvp(grad(f), (model(z),), (pushed,))[1])[0]
    torch.testing.assert_close(ggn(model, f, z, v), want)
    _, (first, second) = jet(model, (z,), ([v, None],))
    along = lambda t: model(z + t * v)
    torch.testing.assert_close(first, (along(step) - along(-step)) / (2 * step), rtol=1e-6, atol=0)
    step = 1e-4
    want = (along(step) - 2 * along(0) + along(-step)) / step**2
    torch.testing.assert_close(second, want, rtol=1e-5, atol=1e-5)


def test_a_laplacian_has_fewer_ops_than_the_trace():
    weights = [numbers(4, 4) for _ in range(3)]
    for activation in (torch.tanh, torch.sigmoid, torch.nn.functional.softplus):

        def f(x, activation=activation):
            for w in weights:
                x = activation(w @ x)
            return x.sum()

        by_trace = make_fx(lambda x, f=f: hessian(f)(x).trace())(numbers(4)).graph
        assert n_ops(make_fx(laplacian(f))(numbers(4)).graph) < n_ops(by_trace)


def test_laplacians_of_networks():
    """Every kind of op between the products of first derivatives and the result."""
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.LayerNorm(6), torch.nn.Linear(6, 6)
    ).double()
    image = lambda x: torch.nn.functional.avg_pool2d(
        torch.nn.functional.conv2d(x.view(1, 1, 2, 2).sin(), W.view(1, 1, 4, 4)[..., :1, :1]), 2
    ).squeeze()
    for f in (
        lambda x: net(x.expand(3, 4).cumsum(0)).softmax(-1).prod(),
        lambda x: image(x) * torch.cat([x, x * x]).amax(),
        lambda x: (x / (1 + x.outer(x).mm(x.outer(x)).relu()).diagonal()).sum(),
        lambda x: x.sum(),
        lambda x: torch.ones((), dtype=D),
    ):
        x = numbers(4)
        expected = hessian(f)(x).trace()
        torch.testing.assert_close(laplacian(f)(x), expected)
        torch.testing.assert_close(jit(laplacian(f, chunk_size=3))(x), expected)
    with_parameters = lambda w, x: torch.tanh(w @ x).sum()
    torch.testing.assert_close(
        grad(lambda w: laplacian(with_parameters, 1)(w, numbers(4)))(W),
        grad(lambda w: hessian(with_parameters, 1)(w, numbers(4)).trace())(W),
    )


V = numbers(4, seed=8)


@pytest.mark.parametrize(
    ("f", "shape", "all_axes"),
    [
        (lambda x: torch.tanh(W @ torch.tanh(W @ x)), (4,), True),
        (lambda x: torch.tanh(x @ W).exp().prod(), (4,), True),
        (lambda x: torch.tanh(x @ W.t()) @ V, (1, 4), True),
        (lambda x: torch.tanh(W @ x).sum(0), (4, 1), True),
        (lambda x: torch.tanh(W @ x).prod(), (4, 2), False),
        (lambda x: torch.tanh(x @ V), (3, 4), False),
        (lambda x: torch.tanh(x @ W).sum(1), (3, 4), False),
        (lambda x: torch.tanh(x @ x.t()).sum(), (1, 4), False),
        (lambda x: torch.tanh(x @ (W[:3, :3] * x[0]) @ x), (3,), False),
        (lambda x: torch.nn.functional.linear(x, W, V).sin(), (1, 4), True),
    ],
)
def test_products_with_all_axes_are_matrices(f, shape, all_axes):
    """No matrix is multiplied with all unit vectors."""
    x = numbers(*shape)
    count = x.numel()
    flat = lambda x: f(x.view(shape)).reshape(-1)
    expected = torch.stack(
        [
            torch.autograd.functional.hessian(lambda x, i=i: flat(x)[i], x.view(-1)).trace()
            for i in range(flat(x).numel())
        ]
    ).view(f(x).shape)
    torch.testing.assert_close(laplacian(f)(x), expected)
    torch.testing.assert_close(laplacian(f, chunk_size=count - 1)(x), expected)
    torch.testing.assert_close(
        grad(lambda x: laplacian(f)(x).sum())(x), jacrev(lambda x: laplacian(f)(x).sum())(x)
    )
    if all_axes:
        nodes = make_fx(laplacian(f))(x).graph.nodes
        assert not [n for n in nodes if n.target is torch.ops.aten.eye.default]


SQUARES = {
    "square": lambda x: (x * x).sin() * x,
    "two factors": lambda x: x.sin() * x.cos() * x,
    "broadcast": lambda x: x.sum() * x * W,
    "a number of another dtype": lambda x: x.float() * torch.tensor(2.5, dtype=D) * x[0],
    "signs": lambda x: (1 - x * x) * (2 - x.exp()) * -x,
    "quotient": lambda x: (x.sin() * x) / (2 + x * x),
    "large and small factors": lambda x: (x * 1e10) * (x * 1e10) - (x * 1e-200) * x**2 * 1e215,
    "complex": lambda x: ((x + 1j * x.cos()) ** 2 * (x - 2j)).real,
}


@pytest.mark.parametrize("name", SQUARES)
def test_sums_of_products(name):
    f, x, v = SQUARES[name], numbers(4), numbers(4, seed=3)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if "dtype" in name else {}
    for order in (2, 3, 5):
        along = lambda x, order=order: jet(f, (x,), ([v, *[None] * (order - 1)],))[1][-1]
        want = lambda x, order=order: tower(f, x, [v, *[None] * (order - 1)])[-1]
        torch.testing.assert_close(along(x), want(x), **tolerance)
    torch.testing.assert_close(jit(along)(x), want(x), **tolerance)
    second = lambda g: jacrev(grad(lambda x: g(x).sum().to(D)))(x)
    along = lambda x: jet(f, (x,), ([v, None, None],))[1][-1]
    want = lambda x: tower(f, x, [v, None, None])[-1]
    torch.testing.assert_close(second(along), second(want), **tolerance)


def test_nodes_beside_a_tower():
    x, v = numbers(4), numbers(4, seed=1)
    net = lambda x: torch.tanh(W @ torch.tanh(W @ torch.tanh(W @ x))).sum()
    count = lambda f: len(make_fx(f)(x, v).graph.nodes)
    one = torch.ones((), dtype=D)

    def nested(x, v, k):
        if k == 0:
            return lambda t: net(x + t * v)
        return lambda t: jvp(nested(x, v, k - 1), (t,), (one,))[1]

    taylor = count(lambda x, v: jet(net, (x,), ([v, *[None] * 5],))[1][-1])
    assert taylor <= 0.5 * count(lambda x, v: nested(x, v, 6)(one * 0))

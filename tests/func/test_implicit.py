"""``custom_root`` and ``custom_linear_solve`` against explicit solutions; ``linear_transpose``,
``closure_convert`` and ``eval_shape``."""

import functools
import gc
import weakref

import pytest
import torch

import aotfunc
from aotfunc import (
    closure_convert,
    custom_linear_solve,
    custom_root,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    jvp,
    scan,
    vmap,
)
from aotfunc.errors import ArgumentError, CaptureError

D = torch.float64


def dense(matvec, b):
    """Solve by the matrix."""
    return torch.linalg.solve(jacfwd(matvec)(b), b)


def conjugate_gradients(matvec, b):
    x, r = torch.zeros_like(b), b
    p = r
    for _ in range(b.shape[0] + 2):
        ap = matvec(p)
        alpha = r @ r / (p @ ap)
        x, new = x + alpha * p, r - alpha * ap
        p, r = new + (new @ new) / (r @ r + 1e-300) * p, new
    return x


def along(f, x, t):
    return jvp(f, (x,), (t,))[1]


def newton(f, x):
    for _ in range(30):
        x = x - dense(functools.partial(along, f, x), f(x))
    return x


def data():
    g = torch.Generator().manual_seed(1)
    a = torch.randn(3, 3, dtype=D, generator=g)
    return a @ a.mT + torch.eye(3, dtype=D), torch.randn(3, dtype=D, generator=g)


def solved(a, b):
    return torch.linalg.solve(a, b)


SOLVERS = {
    "dense": lambda a, b: custom_linear_solve(lambda v: a @ v, b, dense, dense),
    "symmetric": lambda a, b: custom_linear_solve(
        lambda v: (a + a.mT) @ v / 2, b, dense, symmetric=True
    ),
    "cg": lambda a, b: custom_linear_solve(
        lambda v: (a + a.mT) @ v / 2, b, conjugate_gradients, symmetric=True
    ),
    "root": lambda a, b: custom_root(lambda x: a @ x - b, torch.zeros_like(b), newton, dense),
}
#: closing over the matrix that is differentiated: what a solver reads has no derivative there
SOLVERS["by the matrix"] = lambda a, b: custom_linear_solve(
    lambda v: a @ v, b, lambda _, b: solved(a, b), lambda _, b: solved(a.mT, b)
)
THROUGH = {
    "value": lambda f: f,
    "grad": lambda f: grad(lambda a, b: f(a, b).square().sum(), (0, 1)),
    "jvp": lambda f: lambda a, b: jvp(f, (a, b), (torch.eye(3, dtype=D), b.cos()))[1],
    "jacrev": lambda f: lambda a, b: jacrev(f, (0, 1))(a, b),
    "jacfwd": lambda f: lambda a, b: jacfwd(f, (0, 1))(a, b),
    "hessian": lambda f: (
        lambda a, b: hessian(lambda b, s: f(a * s, b).sum(), (0, 1))(b, torch.tensor(2.0, dtype=D))
    ),
    "vmap": lambda f: lambda a, b: vmap(f, (None, 0))(a, torch.stack([b, 2 * b])),
    "vmap of grad": lambda f: (
        lambda a, b: vmap(grad(lambda a, b: f(a, b).sum(), (0, 1)))(
            torch.stack([a, 2 * a]), torch.stack([b, b])
        )
    ),
    "grad of grad": lambda f: (
        lambda a, b: grad(lambda a: grad(lambda a: f(a, b).sum())(a).square().sum())(a)
    ),
    "jvp of jvp": lambda f: (
        lambda a, b: along(lambda a: along(lambda a: f(a, b), a, a.cos()), a, a)
    ),
    "jit": lambda f: jit(grad(lambda a, b: f(a, b).sum(), (0, 1))),
}


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("solver", SOLVERS)
def test_linear_equations(solver, through):
    a, b = data()
    reference = solved
    if solver in ("symmetric", "cg"):
        reference = lambda a, b: solved((a + a.mT) / 2, b)
    found, expected = THROUGH[through](SOLVERS[solver])(a, b), THROUGH[through](reference)(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def counted(matvec, b):
    return dense(matvec, b), {"count": torch.full((), 7), "scaled": 2 * b, "name": "dense"}


WITH_AUX = {
    "linear": lambda a, b: custom_linear_solve(lambda v: a @ v, b, counted, counted, has_aux=True),
    "root": lambda a, b: custom_root(
        lambda x: a @ x - b,
        torch.zeros_like(b),
        lambda f, x: (
            newton(f, x),
            {"count": torch.full((), 7), "scaled": 2 * b, "name": "newton"},
        ),
        dense,
        has_aux=True,
    ),
}


@pytest.mark.parametrize("through", ["grad", "jvp", "vmap", "grad of grad", "jit"])
@pytest.mark.parametrize("name", WITH_AUX)
def test_aux_has_no_derivative(name, through):
    """What a solver says of itself is there in every transform."""

    def f(a, b):
        x, aux = WITH_AUX[name](a, b)
        assert aux["name"]
        return x + aux["scaled"] * aux["count"] - 14 * b.detach()

    a, b = data()
    found, expected = THROUGH[through](f)(a, b), THROUGH[through](solved)(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_under_autograd():
    found = []
    for f in (SOLVERS["dense"], SOLVERS["root"], solved):
        a, b = (t.requires_grad_() for t in data())
        first = torch.autograd.grad(f(a, b).square().sum(), (a, b), create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))])
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_complex_equations():
    a = torch.randn(3, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    a, b = a + 3 * torch.eye(3), a[0]

    def by_matrix(matvec, b):
        columns = [matvec(e) for e in torch.eye(3, dtype=b.dtype)]
        return torch.linalg.solve(torch.stack(columns, -1), b)

    ours = lambda a, b: custom_linear_solve(lambda v: a @ v, b, by_matrix, by_matrix)
    loss = lambda f: lambda a, b: torch.view_as_real(f(a, b)).square().sum()
    torch.testing.assert_close(grad(loss(ours), (0, 1))(a, b), grad(loss(solved), (0, 1))(a, b))
    tangents = (a.conj(), b * 2)
    torch.testing.assert_close(jvp(ours, (a, b), tangents), jvp(solved, (a, b), tangents))


def test_root_of_a_nonlinear_function_of_a_tree():
    """x with x + w tanh(x) = b, and the deepest derivatives through a loop instead."""

    def by_root(p):
        return custom_root(
            lambda x: x + p["w"] @ torch.tanh(x) - p["b"], torch.zeros(3, dtype=D), newton, dense
        )

    def by_loop(p):
        x = torch.zeros(3, dtype=D)
        for _ in range(200):
            x = p["b"] - p["w"] @ torch.tanh(x)
        return x

    a, b = data()
    p = {"w": a / (4 * a.norm()), "b": b}
    torch.testing.assert_close(jacfwd(by_root)(p), jacfwd(by_loop)(p))
    torch.testing.assert_close(
        grad(lambda p: by_root(p).sum())(p), grad(lambda p: by_loop(p).sum())(p)
    )
    second = lambda f: hessian(lambda b: f({"w": p["w"], "b": b}).sum())(b)
    torch.testing.assert_close(second(by_root), second(by_loop))


def test_what_solve_reads_is_not_differentiated():
    def root(step):
        def solve(f, x):
            for _ in range(100):
                x = x - step * f(x)
            return x

        return custom_root(
            lambda x: x - 2, torch.tensor(0.0), solve, lambda g, y: y / g(y * 0 + 1)
        )

    step = torch.tensor(0.5, requires_grad=True)
    assert root(step) == 2 and not root(step).requires_grad


def test_errors():
    a, b = data()
    with pytest.raises(ArgumentError, match="give transpose_solve, or symmetric=True"):
        grad(lambda b: custom_linear_solve(lambda v: a @ v, b, dense).sum())(b)
    with pytest.raises(ArgumentError, match="they must have one structure"):
        custom_root(lambda x: (x, x), b, lambda f, x: f(x)[0], dense)
    with pytest.raises(ArgumentError, match=r"the solver must return \(x, aux\), not"):
        custom_root(lambda x: x - b, b, newton, dense, has_aux=True)
    with pytest.raises(ArgumentError, match="is not linear"):
        aotfunc.linear_transpose(torch.sin, b)
    with pytest.raises(CaptureError, match="writes to"):
        aotfunc.closure_convert(lambda x: b.add_(x), b.clone())


def test_linear_transpose():
    a, b = data()
    transposed = aotfunc.linear_transpose(lambda x, y: (a @ x + y, {"s": y.sum()}), b, b)
    x, y = transposed((b, {"s": torch.tensor(2.0, dtype=D)}))
    torch.testing.assert_close((x, y), (a.mT @ b, b + 2))
    convolved = lambda x: torch.nn.functional.conv1d(x, torch.ones(1, 1, 2))
    (back,) = aotfunc.linear_transpose(convolved, torch.zeros(1, 1, 4))(torch.ones(1, 1, 3))
    assert back.tolist() == [[[1, 2, 2, 1]]]


def test_closure_convert():
    w, index = torch.tensor([2.0, 3.0]), torch.tensor([1])
    pure, tensors = aotfunc.closure_convert(lambda x: {"y": x * w[index]}, torch.tensor(1.0))
    assert [t.tolist() for t in tensors] == [[2, 3], [1]]
    assert grad(lambda w: pure(torch.tensor(5.0), w, index)["y"].sum())(w).tolist() == [0, 5]

    def outer(w):  # what it reads is a value of the transform around
        pure, tensors = aotfunc.closure_convert(lambda x: x * w, torch.ones(2))
        return pure(torch.ones(2), *[t * 2 for t in tensors]).sum()

    assert grad(outer)(w).tolist() == [2, 2]


def test_eval_shape():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    out = aotfunc.eval_shape(lambda x, n: {"y": net(x), "n": n + 1}, torch.zeros(2, 3), 4)
    assert out["y"].shape == (2, 4) and out["y"].is_meta and out["n"] == 5
    big = torch.empty(1 << 20, 1 << 20, device="meta", dtype=torch.bfloat16)
    assert aotfunc.eval_shape(torch.mm, big, big).dtype is torch.bfloat16


def invert(g, y):
    return y / g(torch.ones_like(y))


#: the guess is in the equation, the matrix closes over the right hand side
OVERLAPPING = {
    "root": (
        lambda b, x: custom_root(
            lambda y: y * (1 + x * x) - b, b, lambda g, _: b / (1 + x * x), invert
        ),
        lambda b, x: b / (1 + x * x),
    ),
    "solve": (
        lambda b, x: custom_linear_solve(lambda y: y * (b + x), b, invert, symmetric=True),
        lambda b, x: b / (b + x),
    ),
}


@pytest.mark.parametrize("f, same", OVERLAPPING.values(), ids=OVERLAPPING)
def test_what_a_function_closes_over_is_no_argument(f, same):
    b, x = torch.tensor([3.0, 5.0]), torch.tensor([0.5, 2.0])
    close = torch.testing.assert_close
    for through in (f, lambda b, x: jit(f)(b, x), lambda b, x: vmap(f)(b[:, None], x)[:, 0]):
        for whole in (jacrev, jacfwd, hessian):
            close(whole(through, (0, 1))(b, x), whole(same, (0, 1))(b, x))
    looped = lambda x: scan(lambda c, _: (f(c, x), None), x, None, length=2)[0]
    close(hessian(looped)(x), hessian(lambda x: same(same(x, x), x))(x))


def test_a_tensor_that_is_closed_over_and_passed_is_two_values():
    w = torch.tensor([3.0, 5.0])
    pure, tensors = closure_convert(lambda y: y * w, w)
    assert tensors[0] is w
    torch.testing.assert_close(pure(w - 1, w + 1), (w - 1) * (w + 1))


@pytest.mark.parametrize("through", [lambda f: f, grad, jacfwd, hessian, jit])
def test_what_an_equation_closes_over_is_freed(through):
    def root(a, b):
        f = lambda x: x * a - b.sum()
        return custom_root(f, torch.ones((), dtype=D), newton_of_numbers, invert)

    def solution(a, b):
        return custom_linear_solve(lambda x: x * a, b, invert, symmetric=True).sum()

    def call(f):
        a = torch.tensor(3.0, dtype=D)
        through(lambda b: f(a, b))(torch.ones(2, dtype=D))
        return weakref.ref(a)

    gc.disable()
    try:
        assert [call(f)() for f in (root, solution)] == [None, None]
    finally:
        gc.enable()


def newton_of_numbers(f, x):
    return x - invert(functools.partial(along, f, x), f(x))


def test_functions_that_are_captured_alike_are_equal():
    w, x = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])
    of = lambda n: closure_convert(lambda x: (x, {"y": x * w, "n": n}, x[:]), x)[0]
    assert of(1) == of(1) != of(2)
    same, tree, view = of(1)(x, w)
    assert same is x and view is not x and view.data_ptr() == x.data_ptr()
    assert tree["n"] == 1 and torch.equal(tree["y"], x * w)

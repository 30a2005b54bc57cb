"""jacrev, jacfwd and hessian: trees in and out, argnums, aux, chunks, keyword arguments."""

import pytest
import torch
from torch.testing import assert_close

from aotfunc import hessian, jacfwd, jacrev, jit, jvp, linearize, vmap
from aotfunc.errors import AotfuncError, ArgumentError, ValidationError
from tests.inputs import f32, f64
from tests.reference import assert_same, hess, jacobian, loop

JACOBIANS = {"jacrev": jacrev, "jacfwd": jacfwd}
both = pytest.mark.parametrize("jac", JACOBIANS.values(), ids=JACOBIANS)

FUNCTIONS = {
    "pointwise": (torch.sin, lambda: f64(3)),
    "scalar out": (lambda x: (x * x).sum(), lambda: f64(3)),
    "scalar in": (lambda x: torch.stack([x, x * x]), lambda: f64()),
    "scalar to scalar": (lambda x: x**3, lambda: f64()),
    "matrix in and out": (lambda x: x @ x.t(), lambda: f64(2, 3)),
    "view": (lambda x: x.t().reshape(-1)[1:4], lambda: f64(2, 3)),
    "softmax": (lambda x: torch.softmax(x, 0), lambda: f64(4)),
    "constant": (lambda x: torch.ones(2, dtype=torch.float64), lambda: f64(3)),
    "identity": (lambda x: x, lambda: f64(3)),
    "empty": (lambda x: x * 2, lambda: f64(0)),
    "cumsum and flip": (lambda x: x.cumsum(0).flip(0), lambda: f64(4)),
}


@both
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_a_loop(name, jac):
    f, make = FUNCTIONS[name]
    x = make()
    if name == "empty":
        assert jac(f)(x).shape == (0, 0)
    elif name == "constant":
        assert_same(jac(f)(x), torch.zeros(2, 3, dtype=torch.float64))
    else:
        assert_same(jac(f)(x), jacobian(f, x))


@both
def test_argnums_and_trees(jac):
    f = lambda p, x: {"y": p["w"] @ x, "z": x.sum()}
    p, x = {"w": f64(2, 3)}, f64(3)
    eye = torch.eye(2, dtype=torch.float64)
    dy_dw = torch.einsum("ij,k->ijk", eye, x)
    dz_dw = torch.zeros(2, 3, dtype=torch.float64)
    assert_same(jac(f, argnums=0)(p, x), {"y": {"w": dy_dw}, "z": {"w": dz_dw}})
    assert_same(jac(f, argnums=1)(p, x), {"y": p["w"], "z": torch.ones_like(x)})
    assert_same(
        jac(f, argnums=(0, 1))(p, x),
        {"y": ({"w": dy_dw}, p["w"]), "z": ({"w": dz_dw}, torch.ones_like(x))},
    )
    assert_same(jac(f, argnums=(1,))(p, x), {"y": (p["w"],), "z": (torch.ones_like(x),)})


@both
def test_tuple_out(jac):
    x = f64(3)
    assert_same(jac(lambda x: (x.sin(), x.cos()))(x), (torch.diag(x.cos()), torch.diag(-x.sin())))


@both
def test_has_aux(jac):
    x = f64(3)
    assert_same(
        jac(lambda x: (x.sin(), {"a": x * 2}), has_aux=True)(x),
        (torch.diag(x.cos()), {"a": x * 2}),
    )


@both
def test_aux_need_not_be_tensors(jac):
    x = f64(3)
    assert jac(lambda x: (x.sin(), "note"), has_aux=True)(x)[1] == "note"


@both
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100, None])
def test_chunk_size(jac, chunk_size):
    f = lambda x: (x[:, None] * x).sin().sum(0)
    x = f64(5)
    assert_same(jac(f, chunk_size=chunk_size)(x), jacobian(f, x))


@both
def test_keyword_arguments(jac):
    x = f64(3)
    assert_same(
        jac(lambda x, *, scale: scale * x)(x, scale=2.0), 2 * torch.eye(3, dtype=torch.float64)
    )


@both
def test_two_differentiated_arguments_of_other_shapes(jac):
    a, b = f64(2, 3), f64(3)
    got = jac(lambda a, b: a @ b, argnums=(0, 1))(a, b)
    expected = (jacobian(lambda a: a @ b, a), jacobian(lambda b: a @ b, b))
    assert_same(got, expected)


@both
def test_under_vmap(jac):
    x = f64(4, 3)
    assert_same(vmap(jac(torch.tanh))(x), torch.diag_embed(1 - torch.tanh(x) ** 2))


@both
def test_float32_stays(jac):
    assert jac(torch.sin)(f32(3)).dtype == torch.float32


C = torch.randn(2, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
HOLOMORPHIC = {
    "formula": lambda z: (C @ z).sin() * z[0],
    "scalar": lambda z: z.exp().prod() + (z**3).sum(),
    "constant": lambda z: C[:, 0],
    "matrix": lambda z: torch.linalg.inv(z[:, None] * z + torch.diag(z + 3)),
    "by parts": lambda z: torch.complex(z.real, z.imag) * z,
}


def along_the_real_axis(f, z):
    """The complex derivative, by autograd of the real and the imaginary part."""
    parts = lambda x: torch.view_as_real(f(torch.complex(x, z.imag)))
    j = torch.autograd.functional.jacobian(parts, z.real, create_graph=True)
    return torch.view_as_complex(j.movedim(-2, -1).contiguous())


@both
@pytest.mark.parametrize("name", HOLOMORPHIC)
def test_holomorphic(name, jac):
    f, z, w = HOLOMORPHIC[name], C[0] + 1, C[1]
    j = jac(f, holomorphic=True)
    expected = along_the_real_axis(f, z)
    assert_same(j(z), expected)
    assert_same(jac(f, holomorphic=True, chunk_size=2)(z), expected)
    assert_same(jit(j, backend="eager")(z), expected)
    both = torch.stack([z, w])
    assert_same(vmap(j)(both), torch.stack([expected, along_the_real_axis(f, w)]))
    second = along_the_real_axis(lambda z: along_the_real_axis(f, z), z)
    assert_same(hessian(f, holomorphic=True)(z), second)
    assert_same(jac(j, holomorphic=True)(z), second)
    assert_same(jvp(j, (z,), (w,))[1], second @ w)


@both
def test_what_is_not_holomorphic(jac):
    z = C[0]
    with pytest.raises(ArgumentError, match=r"argument 0.* is complex; say holomorphic=True"):
        jac(torch.sin)(z)
    with pytest.raises(ArgumentError, match=r"holomorphic=True\): argument 0 has dtype torch.fl"):
        jac(torch.sin, holomorphic=True)(z.real)
    with pytest.raises(ArgumentError, match=r"the output\[0\] has dtype torch.float64"):
        jac(lambda z: (z.abs(), z), holomorphic=True)(z)
    with pytest.raises(ValidationError):
        jac(lambda z: z.conj() * z, holomorphic=True, validate=True)(z)


@both
def test_integer_is_refused(jac):
    with pytest.raises(AotfuncError):
        jac(lambda i: i.double())(torch.arange(3))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_is_checked(chunk_size):
    with pytest.raises((AotfuncError, ValueError)):
        jacrev(torch.sin, chunk_size=chunk_size)(f64(3))


def test_jacfwd_randomness():
    x = f64(3)
    noisy = lambda x: x * torch.rand(3, dtype=torch.float64)
    for randomness in (
        "error",
        "same",
        "different",
    ):  # torch refuses "error": here nothing random is batched, the draw is made once
        torch.manual_seed(3)
        j = jacfwd(noisy, randomness=randomness)(x)
        torch.manual_seed(3)
        assert_same(j, torch.diag(torch.rand(3, dtype=torch.float64)))


# hessian
# -------------------------------------------------------------------------------------------------

SCALAR = {
    "diagonal": (lambda x: x.sin().sum(), lambda: f64(5)),
    "dense": (lambda x: (x.sin() * x.prod()).sum() + (x @ x) ** 2, lambda: f64(4)),
    "linear": (lambda x: x.sum(), lambda: f64(3)),
    "log-sum-exp": (lambda x: torch.logsumexp(x, 0), lambda: f64(4)),
    "matrix": (lambda x: torch.linalg.det(x), lambda: f64(3, 3)),
}


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("order", ["hessian", "fwd-rev", "rev-rev", "rev-fwd", "fwd-fwd"])
def test_hessian(name, order):
    f, make = SCALAR[name]
    x = make()
    inner, outer = {"rev": jacrev, "fwd": jacfwd}, {"rev": jacrev, "fwd": jacfwd}
    if order == "hessian":
        h = hessian(f)
    else:
        o, i = order.split("-")
        h = outer[o](inner[i](f))
    expected = torch.zeros(3, 3, dtype=torch.float64) if name == "linear" else hess(f, x)
    assert_same(h(x), expected)


def test_hessian_of_a_vector_function():
    x = f64(3)
    expected = torch.stack([hess(lambda z, i=i: (z[i] * z.sum()).sin(), x) for i in range(3)])
    assert_same(hessian(lambda x: (x * x.sum()).sin())(x), expected)


def test_hessian_argnums():
    x, y = f64(2), f64(3)
    f = lambda x, y: x.sum() ** 2 * y.sum() ** 2
    (xx, xy), (yx, yy) = hessian(f, argnums=(0, 1))(x, y)
    assert_same(xx, hess(lambda x: f(x, y), x))
    assert_same(yy, hess(lambda y: f(x, y), y))
    assert_same(xy, torch.full((2, 3), float(4 * x.sum() * y.sum()), dtype=torch.float64))
    assert_same(yx, xy.t().contiguous())


def test_hessian_of_a_tree():
    p = {"a": f64(2), "b": f64(2)}
    h = hessian(lambda p: (p["a"] * p["b"]).sum())(p)
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    assert_same(h, {"a": {"a": zero, "b": eye}, "b": {"a": eye, "b": zero}})


def test_hessian_has_aux_chunks_and_kwargs():
    f = lambda x, *, s: ((s * x**3).sum(), "note")
    x = f64(4)
    h, aux = hessian(f, has_aux=True, chunk_size=2)(x, s=2.0)
    assert_same(h, torch.diag(12 * x))
    assert aux == "note"


def test_batched_hessian():
    f = SCALAR["dense"][0]
    x = f64(3, 4)
    assert_same(vmap(hessian(f))(x), loop(lambda z: hess(f, z))(x))


W = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    ("f", "attached"),
    [
        (lambda x: (x * x).sum(0, keepdim=True), True),
        (lambda x: x.relu(), True),
        (lambda x: W @ x, True),
        (lambda x: x.sum(0, keepdim=True), False),
        (lambda x: 1 - x.flip(0), False),
        (lambda x: torch.ones(2), False),
    ],
)
def test_constant_tangents_require_grad_as_torchs(f, attached):
    """... with a gradient of zeros, if f is made of more than linear ops."""
    x, t = torch.randn(3, requires_grad=True), torch.randn(3)
    for ours, theirs in (
        (jvp(f, (x,), (t,))[1], torch.func.jvp(f, (x,), (t,))[1]),
        (jacfwd(f)(x), torch.func.jacfwd(f)(x)),
        (linearize(f, x)[1](t), None),
    ):
        if theirs is not None:
            assert_close(ours, theirs)
            assert theirs.requires_grad is attached
        assert ours.requires_grad is attached
    quadratic = hessian(lambda x: (x * x).sum())(x)
    (zeros,) = torch.autograd.grad(quadratic.sum(), x)
    assert_close(zeros, torch.zeros(3))
    assert not jacfwd(f)(x.detach()).requires_grad
    with torch.no_grad():
        assert not jacfwd(f)(x).requires_grad


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y, z: x.floor() * y,
        lambda x, y, z: (x.sign() * y).exp() * z,
        lambda x, y, z: x.round() @ y + x * z,
        lambda x, y, z: x.ceil() / y + z,
        lambda x, y, z: (x * y).floor() + z,
        lambda x, y, z: x.trunc() + y,
        lambda x, y, z: x.detach() * y + x.sin(),
        lambda x, y, z: torch.where(x > 0, x.floor(), y) * z,
        lambda x, y, z: torch.stack([x.floor(), y]).cos()[0],
    ],
)
def test_gradients_through_tangents_of_zero_are_zeros_as_torchs(f):
    def run(tangent):
        y, z = torch.full((3,), 0.5).requires_grad_(), torch.full((3,), 0.7).requires_grad_()
        made = tangent(lambda x: f(x, y, z))
        if made.requires_grad:
            made.sum().backward()
        return y.grad, z.grad

    x, t = torch.tensor([0.5, 1.5, -2.5]), torch.ones(3)
    expected = run(lambda f: torch.func.jvp(f, (x,), (t,))[1])
    for tangent in (
        lambda f: jvp(f, (x,), (t,))[1],
        lambda f: linearize(f, x)[1](t),
        lambda f: jacfwd(f)(x) @ t,
    ):
        for ours, theirs in zip(run(tangent), expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_close(ours, theirs)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x * y,
        lambda x, y: x / y + x.floor(),
        lambda x, y: x.cumsum(0) * y,
        lambda x, y: torch.where(x > 0, x * y, y),
        lambda x, y: x.sin() * y.detach(),
        lambda x, y: x.sum() * y,
    ],
)
def test_tangents_are_attached_to_primals_as_torchs_and_may_be_written_to(f):
    def run(tangent):
        x, y = torch.tensor([0.5, 1.5, -2.5]).requires_grad_(), torch.ones(3).requires_grad_()
        made = tangent(lambda x: f(x, y), x)
        made *= 2.0
        if made.requires_grad:
            made.sum().backward()
        return made.detach(), x.grad, y.grad

    t = torch.ones(3)
    expected = run(lambda f, x: torch.func.jvp(f, (x,), (t,))[1])
    for tangent in (
        lambda f, x: jvp(f, (x,), (t,))[1],
        lambda f, x: linearize(f, x)[1](t),
        lambda f, x: jacfwd(f)(x) @ t,
    ):
        for ours, theirs in zip(run(tangent), expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_close(ours, theirs)


def test_tangents_are_attached_to_none_but_the_primals_that_bend_them():
    x, y, t = torch.ones(3).requires_grad_(), torch.ones(3).requires_grad_(), torch.ones(3)
    for transform in (torch.func.jvp, jvp):
        made = transform(lambda x, y: x * x + y, (x, y), (t, t))[1]
        of_x, of_y = torch.autograd.grad(made.sum(), [x, y], allow_unused=True)
        assert of_x.tolist() == [2.0] * 3 and of_y is None

"""Right where torch.func is not: faults known of it, each compared with a closed form, a loop or a
plain formula."""

import pytest
import torch

import aotfunc

F = torch.nn.functional


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.5


def plain_layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * weight + bias


@pytest.mark.parametrize("order", [2, 3])
def test_derivatives_of_layer_norm_whose_weight_depends_on_the_input(order):
    x, direction = rand(3, 5), torch.randn(3, 5, dtype=torch.float64)

    def loss(norm):
        return lambda x: (norm(x, x[0].sin(), x[1] * x[2]) ** 3).sum()

    f = loss(lambda x, w, b: F.layer_norm(x, (5,), w, b))
    want, at = loss(plain_layer_norm), x.clone().requires_grad_()
    value = want(at)
    for _ in range(order):
        (g,) = torch.autograd.grad(value, at, create_graph=True)
        value = (g * direction).sum()
    for _ in range(order - 1):
        f = lambda x, f=f: (aotfunc.grad(f)(x) * direction).sum()
    torch.testing.assert_close(aotfunc.grad(f)(x), g.detach())


NORMS = {
    "layer": (lambda x, w: F.layer_norm(x, (3,), w), 3),
    "root mean square": (lambda x, w: F.rms_norm(x, (3,), w), 3),
    "group": (lambda x, w: F.group_norm(x, 2, w), 4),
    "instance": (lambda x, w: F.instance_norm(x, weight=w), 4),
    "batch": (lambda x, w: F.batch_norm(x, None, None, w, training=True), 4),
}


@pytest.mark.parametrize("name", NORMS)
def test_backward_of_per_sample_gradients_of_a_norms_weight(name):
    norm, size = NORMS[name]
    loss = lambda w, x: norm(x, w).sin().sum()
    each = aotfunc.vmap(aotfunc.grad(loss), (None, 0))
    w = rand(size).requires_grad_()
    x = rand(2, 2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(each, (w, x))


def test_backward_of_a_tangent_of_frexp():
    x = (rand(4) * 8).requires_grad_()
    tangent = lambda x, t: aotfunc.jvp(lambda x: torch.frexp(x)[0], (x,), (t,))[1]
    assert torch.autograd.gradcheck(tangent, (x, rand(4).requires_grad_()))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("derivative", [aotfunc.jacfwd, aotfunc.jacrev])
def test_derivatives_of_solve_by_the_matrix(order, derivative):
    a, b, rhs = rand(3, 3) + 3 * torch.eye(3, dtype=torch.float64), rand(3, 3), rand(3)
    f = lambda t: torch.linalg.solve(a + t * b, rhs)
    for _ in range(order):
        f = derivative(f)
    want = torch.linalg.solve(a, rhs)  # the k-th derivative is (-1)^k k! (A^-1 B)^k A^-1 rhs
    for k in range(1, order + 1):
        want = -k * torch.linalg.solve(a, b @ want)
    torch.testing.assert_close(f(torch.zeros((), dtype=torch.float64)), want)


@pytest.mark.parametrize("out_dims", [-1, -2, 0, 1])
def test_an_unbatched_output_at_any_dimension(out_dims):
    c = rand(2, 3)
    got = aotfunc.vmap(lambda x: c * 2, out_dims=out_dims)(rand(4))
    torch.testing.assert_close(got, torch.stack([c * 2] * 4, out_dims))


@pytest.mark.parametrize(("dim", "index"), [(0, 1), (1, 0), (-1, -1), (-2, 0)])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (-1, 0), (1, -1)])
def test_select_scatter_under_vmap(dim, index, in_dims):
    x, y = rand(3, 2, 4), rand(3, (2, 4)[1 - dim % 2])
    rows = torch.stack([x[i].select_scatter(y[i], dim, index) for i in range(3)])
    f = lambda x, y: x.select_scatter(y, dim, index)
    if in_dims[0] is None:
        rows = torch.stack([x[0].select_scatter(y[i], dim, index) for i in range(3)])
    if in_dims[1] is None:
        rows = torch.stack([x[i].select_scatter(y[0], dim, index) for i in range(3)])
    given = [t[0] if d is None else t.movedim(0, d) for t, d in zip((x, y), in_dims)]
    torch.testing.assert_close(aotfunc.vmap(f, in_dims=in_dims)(*given), rows)


def test_linearize_of_linearize():
    x, t, s = rand(4), rand(4), rand(4)

    def slope(x):
        return aotfunc.linearize(lambda x: x.sin() * x, x)[1](t)

    first, second = aotfunc.linearize(slope, x)
    torch.testing.assert_close(first, t * (x.sin() + x * x.cos()))
    torch.testing.assert_close(second(s), t * s * (2 * x.cos() - x * x.sin()))
    third = aotfunc.linearize(lambda x: aotfunc.linearize(slope, x)[1](s), x)[1](t)
    torch.testing.assert_close(third, t * s * t * (-3 * x.sin() - x * x.cos()))


def plain_householder_product(v, tau):
    """The product of I - tau_i v_i v_i^T, where v_i has a one at i and zeros above."""
    m, n = v.shape
    eye, q = torch.eye(m, dtype=v.dtype), torch.eye(m, dtype=v.dtype)
    for i in range(n):
        below = (torch.arange(m) > i).to(v.dtype)
        column = v[:, i] * below + eye[i]
        q = q @ (eye - tau[i] * torch.outer(column, column))
    return q[:, :n]


@pytest.mark.parametrize("outer", ["jvp", "vjp"])
@pytest.mark.parametrize("inner", ["jvp", "vjp"])
def test_second_derivatives_of_householder_product(outer, inner):
    v, tau = rand(4, 3), rand(3)
    along, ct, seconds = (rand(4, 3), rand(3)), rand(4, 3), (rand(4, 3), rand(3))

    def first(f, transform):
        if transform == "jvp":
            return lambda v, tau: aotfunc.jvp(f, (v, tau), along)[1]
        return lambda v, tau: sum(
            (a * b).sum() for a, b in zip(aotfunc.vjp(f, v, tau)[1](ct), along)
        )

    def second(f):
        f = first(f, inner)
        if outer == "jvp":
            return [aotfunc.jvp(f, (v, tau), seconds)[1]]
        out, back = aotfunc.vjp(f, v, tau)
        return list(back(torch.ones_like(out)))

    def reference():
        p = [x.clone().requires_grad_() for x in (v, tau)]
        c = ct.clone().requires_grad_()
        gs = torch.autograd.grad(plain_householder_product(*p), p, c, create_graph=True)
        slope = sum((a * b).sum() for a, b in zip(gs, along))  # <ct, J along>
        return slope, p, c

    slope, p, c = reference()
    if inner == "jvp":  # J along is the gradient of <ct, J along> by ct
        (pushed,) = torch.autograd.grad(slope, c, create_graph=True)
    else:
        pushed = slope
    if outer == "vjp":
        want = list(torch.autograd.grad(pushed.sum(), p))
    else:
        dual = torch.ones_like(pushed, requires_grad=True)
        gs = torch.autograd.grad(pushed, p, dual, create_graph=True)
        want = [torch.autograd.grad(sum((a * b).sum() for a, b in zip(gs, seconds)), dual)[0]]
    for got, expected in zip(second(torch.linalg.householder_product), want, strict=True):
        torch.testing.assert_close(got, expected.detach())

"""Where values lie in memory: a transform's other inputs may be laid out otherwise than what they
belong to."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import aotfunc
from aotfunc import grad, jacfwd, jit, jvp, linearize, make_fx, vjp, vmap
from tests.inputs import f64
from tests.reference import assert_same

F64 = torch.float64


def layouts(*shape):
    """Tensors of one shape in every order in memory, with gaps, at an offset, expanded."""
    g = torch.Generator().manual_seed(0)

    def doubles(*s):
        return torch.randn(*s, dtype=F64, generator=g)

    for order in itertools.permutations(range(len(shape))):
        inverse = sorted(range(len(shape)), key=order.__getitem__)
        yield doubles(*[shape[d] for d in order]).permute(inverse)
    yield doubles(*shape[:-1], 2 * shape[-1])[..., ::2]
    yield doubles(*shape[1:], 2 * shape[0])[..., ::2].movedim(-1, 0)
    yield doubles(shape[0] + 1, *shape[1:])[1:]
    yield doubles(*shape[:-1], 1).expand(*shape)
    yield doubles(1, *shape[1:]).expand(*shape)


VIEWS = {
    "transposed": lambda x: x.mT.reshape(-1),
    "first last": lambda x: x.movedim(0, -1).flatten() * 2,
    "of a result": lambda x: x.sin().transpose(0, 1).reshape(-1),
    "of a copy": lambda x: x.mT.contiguous().view(-1),
    "in place": lambda x: (x * 2).reshape(-1),
}

FORMS = {
    "jit(jvp)": lambda f, x, v, ct: jit(lambda x, v: jvp(f, (x,), (v,))[1])(x, v),
    "vmap(jvp)": lambda f, x, v, ct: vmap(lambda v: jvp(f, (x,), (v,))[1])(torch.stack([v, v]))[1],
    "vmap(linearize)": lambda f, x, v, ct: vmap(linearize(f, x)[1])(torch.stack([v, v]))[1],
    "jvp(jvp)": lambda f, x, v, ct: jvp(lambda v: jvp(f, (x,), (v,))[1], (v,), (v,))[1],
    "grad(jvp)": lambda f, x, v, ct: grad(lambda v: (jvp(f, (x,), (v,))[1] * ct).sum())(v),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("view", VIEWS)
def test_tangents_laid_out_otherwise_than_primals(view, form):
    f = VIEWS[view]
    for x, v in itertools.product(layouts(2, 3), layouts(2, 3)):
        dense = x.contiguous()
        want = torch.autograd.functional.jvp(f, (dense,), (v.contiguous(),))[1]
        ct = torch.arange(1.0, want.numel() + 1, dtype=F64).view(want.shape)
        if form == "grad(jvp)":
            want = torch.autograd.functional.vjp(f, dense, ct)[1]
        torch.testing.assert_close(FORMS[form](f, x, v, ct), want)


def test_tangents_of_a_batch_of_transposed_matrices():
    x, v = torch.randn(3, 2, dtype=F64).mT, torch.randn(5, 2, 3, dtype=F64)
    got = vmap(lambda v: jvp(lambda x: x.mT.reshape(6), (x,), (v,))[1])(v)
    torch.testing.assert_close(got, v.mT.reshape(5, 6))


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("loss", [torch.nn.functional.nll_loss, torch.nn.functional.cross_entropy])
def test_class_scores_that_are_not_contiguous(loss, reduction):
    """PyTorch's own backward refuses these images."""
    x, target = (
        torch.randn(2, 3, 4, 5, dtype=F64).movedim(-1, 1),
        torch.arange(24).view(2, 3, 4) % 5,
    )
    weight, v = torch.rand(5, dtype=F64), torch.randn(2, 5, 3, 4, dtype=F64)

    def f(x):
        return loss(x, target, weight=weight, reduction=reduction).square().sum()

    dense = x.contiguous()
    want = torch.autograd.functional.vjp(f, dense)[1]
    second = torch.autograd.functional.vhp(f, dense, v)[1]
    torch.testing.assert_close(grad(f)(x), want)
    torch.testing.assert_close(jit(grad(f))(x), want)
    torch.testing.assert_close(vmap(grad(f))(torch.stack([x, x]))[1], want)
    torch.testing.assert_close(jvp(f, (x,), (v,))[1], (want * v).sum())
    torch.testing.assert_close(jvp(grad(f), (x,), (v,))[1], second)
    torch.testing.assert_close(grad(lambda x: jvp(f, (x,), (v,))[1])(x), second)


def test_a_turned_view_of_an_expanded_argument():
    """It shows the same memory in the same way, and other variables."""

    def f(x):
        return (x.t() * torch.arange(9.0, dtype=F64).view(3, 3)).sum() + x.permute(1, 0).reshape(
            -1
        )[1]

    x, v = torch.ones(1, dtype=F64).expand(3, 3), torch.randn(3, 3, dtype=F64)
    want = torch.autograd.functional.vjp(f, x.contiguous())[1]
    torch.testing.assert_close(grad(f)(x), want)
    torch.testing.assert_close(jit(grad(f))(x), want)
    torch.testing.assert_close(jvp(f, (x,), (v,))[1], (want * v).sum())
    torch.testing.assert_close(vmap(grad(f))(x.expand(2, 3, 3))[1], want)


CUTS = {
    "group_norm": (lambda x: F.group_norm(x, 2, x[0, :, 0, 0], x[1, :, 1, 1]), (2, 4, 3, 2)),
    "group_norm of vectors": (lambda x: F.group_norm(x.mT, 3), (2, 4, 3)),
    "attention": (lambda x: F.scaled_dot_product_attention(x * 2, x.sin(), x), (2, 2, 3, 4)),
    "pdist": (lambda x: F.pdist(x.mT), (3, 4)),
    "matrix_exp": (torch.linalg.matrix_exp, (2, 3, 2, 2)),
    "images of classes": (
        lambda x: F.nll_loss(x, torch.ones(2, 3, 2, dtype=torch.int64)),
        (2, 4, 3, 2),
    ),
    "renorm": (lambda x: x.renorm(2, 0, 1.0), (2, 3)),
}


@pytest.mark.parametrize("name", CUTS)
def test_kernels_that_take_memory_for_contiguous(name):
    """Their arguments, cotangents and batches may lie anyhow all the same."""
    f, shape = CUTS[name]
    for x in layouts(*shape):
        if name == "pdist" and 0 in x.stride():
            continue  # equal points: there is no derivative
        dense = x.contiguous()
        pull = vjp(f, x)[1]
        for ct in (
            layouts(*f(dense).shape)
            if f(dense).dim() > 1
            else [torch.randn(f(dense).shape, dtype=F64)]
        ):
            want = torch.autograd.functional.vjp(f, dense, ct.contiguous())[1]
            torch.testing.assert_close(pull(ct)[0], want, rtol=1e-6, atol=1e-8)
        leaf = x.detach().requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(jit(f)(leaf), leaf, ct)[0], want, rtol=1e-6, atol=1e-8
        )
        torch.testing.assert_close(
            (jvp(f, (x,), (ones := torch.ones_like(x),))[1] * ct).sum(), (want * ones).sum()
        )
        batch = torch.stack([x, x * 0.5], -1)
        torch.testing.assert_close(vmap(f, in_dims=-1, out_dims=-1)(batch)[..., 1], f(dense * 0.5))


def test_cotangents_with_unusual_strides_of_dimensions_of_size_one():
    """``contiguous()`` leaves them, and kernels look at them."""

    def f(x):
        return x.flip(-1).logsumexp(-1)

    x, ct = (
        torch.randn(2, 1, 2, 2, dtype=F64),
        torch.randn(2, 2, dtype=F64).as_strided((2, 1, 2), (2, 1, 1)),
    )
    want = torch.autograd.functional.vjp(f, x, ct)[1]
    torch.testing.assert_close(vjp(f, x)[1](ct)[0], want)
    leaf = x.transpose(0, 3).contiguous().transpose(0, 3).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(jit(f)(leaf), leaf, ct)[0], want)


def filled(stride, write):
    def f(x):
        made = torch.empty_strided(x.shape, stride, dtype=x.dtype)
        write(made, x)
        return made

    return f


GAPS = {
    "rows": filled((4, 1), lambda made, x: made.copy_(x * x)),
    "columns": filled((1, 5), lambda made, x: made.__setitem__(slice(None), x * x)),
    "every other element": filled((4, 2), lambda made, x: made.zero_().add_(x * x)),
    "in parts": filled((4, 1), lambda made, x: (made[0].copy_(x[0]), made[1:].copy_(x[1:]))),
}


@pytest.mark.parametrize("name", GAPS)
def test_results_with_gaps_in_memory(name):
    """A tensor that the function makes with gaps has them where it is returned."""
    f, x = GAPS[name], f64(3, 2)
    for way in (jit, aotfunc.functionalize, lambda f: lambda x: vjp(f, x)[0]):
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = way(f)(leaf), f(other)
        assert_same(got, want)
        assert got.stride() == want.stride()
        for y, at in ((got, leaf), (want, other)):
            (g,) = torch.autograd.grad((y**3).sum(), at, create_graph=True)
            (g**2).sum().backward()
        assert_same(leaf.grad, other.grad)
    assert make_fx(f)(x)(x).stride() == f(x).stride()
    xs = torch.stack([x, 2 * x])
    assert_same(vmap(f)(xs), torch.stack([*map(f, xs)]))
    assert_same(jacfwd(f)(x), torch.autograd.functional.jacobian(f, x))

"""Where values lie in memory: a transform's other inputs may be laid out otherwise than what they belong to."""

import itertools

import pytest
import torch

from aotfunc import grad, jit, jvp, linearize, vmap

F64 = torch.float64


def layouts(*shape):
    """Tensors of one shape in every order in memory, with gaps, at an offset, expanded."""
    g = torch.Generator().manual_seed(0)

    def r(*s):
        return torch.randn(*s, dtype=F64, generator=g)

    for order in itertools.permutations(range(len(shape))):
        inverse = sorted(range(len(shape)), key=order.__getitem__)
        yield r(*[shape[d] for d in order]).permute(inverse)
    yield r(*shape[:-1], 2 * shape[-1])[..., ::2]
    yield r(*shape[1:], 2 * shape[0])[..., ::2].movedim(-1, 0)
    yield r(shape[0] + 1, *shape[1:])[1:]
    yield r(*shape[:-1], 1).expand(*shape)
    yield r(1, *shape[1:]).expand(*shape)


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
    x, target = torch.randn(2, 3, 4, 5, dtype=F64).movedim(-1, 1), torch.arange(24).view(2, 3, 4) % 5
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

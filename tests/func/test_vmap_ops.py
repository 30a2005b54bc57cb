"""Ops that went wrong under vmap∘vmap or vjp∘vmap once, against loops; the op table has vmap,
vmap∘vjp and vmap∘jvp."""

import pytest
import torch

from aotfunc import grad, vjp, vmap
from tests.inputs import f64
from tests.reference import assert_same, grads, loop

B = 3


@pytest.mark.parametrize(
    "how", [{}, {"range": (5.0, 5.0)}, {"range": (-1.0, 1.0)}, {"density": True}], ids=str
)
def test_histograms_of_constant_and_of_no_data(how):
    x, w = f64(B, 7), torch.rand(B, 7, dtype=torch.float64)
    x[1] = 2.0
    plain = lambda x: tuple(torch.histogram(x, 4, **how))
    weighted = lambda x, w: tuple(torch.histogram(x, 4, weight=w, **how))
    many = how | ({"range": how["range"] * 2} if "range" in how else {})
    twodim = lambda z: (lambda counts, edges: (counts, *edges))(
        *torch.histogramdd(z, [2, 3], **many)
    )
    assert_same(vmap(plain)(x), loop(plain)(x))
    assert_same(vmap(weighted)(x, w), loop(weighted)(x, w))
    assert_same(
        vmap(twodim)(torch.stack([x, x.flip(1)], -1)),
        loop(twodim)(torch.stack([x, x.flip(1)], -1)),
    )
    assert_same(vmap(plain)(x[:, :0]), loop(plain)(x[:, :0]))
    assert_same(vmap(vmap(plain))(torch.stack([x, -x])), loop(loop(plain))(torch.stack([x, -x])))


def test_matrix_exp_of_a_batch_whose_leading_dimensions_are_no_view():
    x = f64(2, 3, 3, 4)
    assert_same(vmap(vmap(torch.matrix_exp, -1))(x), loop(loop(torch.matrix_exp, -1))(x))


def test_a_sample_requires_grad_as_its_batch_does():
    """Some ops work out their gradients in the forward, if an argument requires one."""
    seen = []

    def f(x, w):
        seen.append((x.requires_grad, w.requires_grad))
        return x * w if x.requires_grad else x * 0

    x, w = f64(B, 4), f64(4)
    assert_same(grad(lambda x: vmap(f, (0, None))(x, w).sum())(x), w.expand(B, 4))
    assert_same(vjp(vmap(f, (0, None)), x, w)[0], x * w)
    (g,) = torch.autograd.grad(vmap(f, (0, None))(x.requires_grad_(), w).sum(), x)
    assert_same(g, w.expand(B, 4))
    assert seen == [(True, False), (True, True), (True, False)]


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="new in torch 2.13"
)
def test_a_loss_that_has_its_gradient_from_the_forward():
    x, w, t = f64(B, 5, 3), f64(4, 3), torch.randint(4, (B, 5))
    f = lambda x, w, t: torch.nn.functional.linear_cross_entropy(x, w, t)
    whole = lambda run: (
        lambda x, w: (run(f, (0, None, 0))(x, w, t) * torch.arange(1.0, B + 1).double()).sum()
    )
    assert_same(grad(whole(vmap), (0, 1))(x, w), grads(whole(loop), (0, 1))(x, w))
    assert_same(
        vmap(grad(f, (0, 1)), (0, None, 0))(x, w, t), loop(grads(f, (0, 1)), (0, None, 0))(x, w, t)
    )


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_statistics_of_a_norm_that_all_samples_share_in_memory(norm):
    """PyTorch's kernels of these backwards read the statistics as if they were contiguous."""
    aten, x, g = torch.ops.aten, torch.randn(3, 4, 5), torch.randn(3, 3, 4, 5)
    if norm == "layer":
        _, mean, rstd = aten.native_layer_norm(x, [5], None, None, 1e-5)
        f = lambda g, m, r: aten.native_layer_norm_backward(
            g, x, [5], m, r, None, None, [True, False, False]
        )[0]
    else:
        _, mean, rstd = aten.native_group_norm(x, None, None, 3, 4, 5, 2, 1e-5)
        f = lambda g, m, r: aten.native_group_norm_backward(
            g, x, m, r, None, 3, 4, 5, 2, [True, False, False]
        )[0]
    shared = mean.expand(3, *mean.shape), rstd.expand(3, *rstd.shape)
    assert_same(vmap(f)(g, *shared), torch.stack([f(row, mean, rstd) for row in g]))

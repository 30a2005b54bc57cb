"""linear_cross_entropy in chunks has the derivatives of its loss, to any order."""

import pytest
import torch

from aotfunc import aot_function, grad, hessian, jacrev, jit, jvp, vmap
from tests.inputs import f64
from tests.reference import assert_same

F = torch.nn.functional
pytestmark = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="new in torch 2.13")
T = torch.tensor([0, 3, 1, 2, 2])


CASES = {
    "mean": dict(reduction="mean"),
    "mean with weights": dict(reduction="mean", weight=f64(4).exp(), ignore_index=2),
    "sum": dict(reduction="sum", ignore_index=2),
    "none": dict(reduction="none"),
    "none with weights": dict(reduction="none", weight=f64(4).exp(), ignore_index=2),
}


def losses(case, retain=False):
    """The loss in chunks, and the same as one linear and a cross entropy."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=retain)

    def f(x, w, b=None, **how):
        loss = F.linear_cross_entropy(x, w, T, linear_bias=b, **CASES[case], **how)
        return (loss * torch.arange(1.0, 6).double()).sum()

    return (lambda *args: f(*args, options=options)), f


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_second_derivatives(case, bias, retain):
    f, want = losses(case, retain)
    args = (f64(5, 3), f64(4, 3) + 0.5, f64(4))[: 2 + bias]
    every = tuple(range(len(args)))
    tangents = tuple(x.cos() for x in args)
    assert_same(jvp(f, args, tangents), torch.func.jvp(want, args, tangents))
    assert_same(grad(f, every)(*args), torch.func.grad(want, every)(*args))
    second = torch.func.hessian(want, every)(*args)
    assert_same(hessian(f, every)(*args), second)
    assert_same(jacrev(jacrev(f, every), every)(*args), second)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", [grad, lambda f, n: jit(grad(f, n)), "aot_function"])
def test_by_autograd(how, case):
    f, want = losses(case)
    args = [x.requires_grad_() for x in (f64(5, 3), f64(4, 3) + 0.5, f64(4))]

    def penalty(gradients):
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), args)

    if how == "aot_function":
        y = aot_function(f)(*args)
        gradients = torch.autograd.grad(y, args, create_graph=True)
    else:
        gradients = how(f, (0, 1, 2))(*args)
    reference = torch.autograd.grad(want(*args), args, create_graph=True)
    assert_same(gradients, reference)
    assert_same(penalty(gradients), penalty(reference))


@pytest.mark.parametrize("case", CASES)
def test_batched(case):
    f, want = losses(case)
    xs, w = f64(2, 5, 3), f64(4, 3) + 0.5
    assert_same(
        vmap(hessian(f), (0, None))(xs, w),
        torch.func.vmap(torch.func.hessian(want), (0, None))(xs, w),
    )


def test_the_weights_of_classes_are_constants():
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    f = lambda c: F.linear_cross_entropy(f64(5, 3), f64(4, 3), T, weight=c, options=options)
    assert not grad(f)(f64(4).exp()).any()

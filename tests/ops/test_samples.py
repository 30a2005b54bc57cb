"""Derivatives of ops on samples that are rare in the database: one sample alone, a number,
elements in no segment."""

import pytest
import torch
import torch.nn.functional as F

from aotfunc import grad, jvp, vjp

F64 = torch.float64


@pytest.mark.parametrize("p", [1, 2])
def test_margins_of_one_sample(p):
    x, v, target = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64), torch.tensor(1)

    def f(x):
        return F.multi_margin_loss(x, target, p=p)

    want = torch.autograd.functional.vjp(f, x)[1]
    torch.testing.assert_close(grad(f)(x), want)
    torch.testing.assert_close(jvp(f, (x,), (v,))[1], (want * v).sum())
    second = jvp(grad(f), (x,), (v,))[1]
    near = [torch.autograd.functional.vjp(f, x + s * 1e-6 * v)[1] for s in (1, -1)]
    torch.testing.assert_close(second, (near[0] - near[1]) / 2e-6, rtol=1e-4, atol=1e-6)


def test_a_masked_number():
    x, v = torch.tensor(3.0), torch.tensor(2.0)
    for mask in (True, False):
        out, tangent = jvp(lambda x, m=mask: (x * x).masked_select(torch.tensor(m)), (x,), (v,))
        assert out.tolist() == [9.0] * mask and tangent.tolist() == [12.0] * mask


@pytest.mark.parametrize("driver", ["gelss", "gelsd"])
def test_residuals_of_least_squares(driver):
    a, b = torch.randn(4, 3, dtype=F64), torch.randn(4, 2, dtype=F64)

    def f(a, b):
        return torch.linalg.lstsq(a, b, driver=driver).residuals

    torch.testing.assert_close(vjp(f, a, b)[0], f(a, b))
    normal = lambda a, b: (a @ torch.linalg.solve(a.T @ a, a.T @ b) - b).square().sum(0)
    ct = torch.ones(2, dtype=F64)
    torch.testing.assert_close(
        vjp(f, a, b)[1](ct), torch.autograd.functional.vjp(normal, (a, b), ct)[1]
    )


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
def test_elements_after_the_last_segment(reduce):
    x, v, w = (
        torch.randn(6, dtype=F64),
        torch.randn(6, dtype=F64),
        torch.tensor([1.0, -2.0], dtype=F64),
    )
    lengths = torch.tensor([1, 3])

    def f(x):
        return (torch.segment_reduce(x, reduce, lengths=lengths, unsafe=True) * w).sum()

    def by_hand(x):
        take = {"max": torch.amax, "min": torch.amin}.get(reduce) or getattr(torch, reduce)
        return (torch.stack([take(part) for part in x[:4].split([1, 3])]) * w).sum()

    want = torch.autograd.functional.vjp(by_hand, x)[1]
    torch.testing.assert_close(grad(f)(x), want)
    torch.testing.assert_close(jvp(f, (x,), (v,))[1], (want * v).sum())
    torch.testing.assert_close(
        jvp(grad(f), (x,), (v,))[1], torch.autograd.functional.vhp(by_hand, x, v)[1]
    )

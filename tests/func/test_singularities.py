"""Derivatives at and near points where a formula is 0/0 or infinity - infinity: against mpmath, to
fourth order."""

import math

import mpmath
import pytest
import torch

from aotfunc import grad, jacfwd, jacrev, jvp, vjp, vmap

FUNCTIONS = {
    "sinc": (torch.sinc, lambda x: mpmath.sincpi(x)),
    "i0": (torch.special.i0, lambda x: mpmath.besseli(0, x)),
    "i1": (torch.special.i1, lambda x: mpmath.besseli(1, x)),
    "modified_bessel_i1": (torch.special.modified_bessel_i1, lambda x: mpmath.besseli(1, x)),
    "bessel_j0": (torch.special.bessel_j0, lambda x: mpmath.besselj(0, x)),
    "bessel_j1": (torch.special.bessel_j1, lambda x: mpmath.besselj(1, x)),
    "spherical_bessel_j0": (torch.special.spherical_bessel_j0, lambda x: mpmath.sinc(x)),
    "tanhshrink": (torch.nn.functional.tanhshrink, lambda x: x - mpmath.tanh(x)),
}
POINTS = [0.0, 1e-12, -1e-8, 1e-4, 0.02, 0.0999, 0.1001, -0.3, 2.0]


def forward(f):
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("step", [grad, forward])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_removable_singularities(name, step):
    f, exact = FUNCTIONS[name]
    for order in range(1, 5):
        f = step(f)
        got = vmap(f)(torch.tensor(POINTS, dtype=torch.float64))
        with mpmath.workdps(60):
            want = [
                float(sum(n * c for n, c in zip(*taylor(exact, x, order), strict=True)))
                for x in POINTS
            ]
        torch.testing.assert_close(
            got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-11 * 10**order
        )


def taylor(f, x, order):
    """The derivative of an order as a sum: mpmath's own Taylor coefficient times a factorial."""
    return [math.factorial(order)], [mpmath.taylor(f, mpmath.mpf(x), order)[order]]


def test_acosh_where_it_is_not_chosen():
    """Below -1 the value is NaN and autograd's slope a number, so no NaN leaves a ``where``."""
    x = torch.tensor([-3.0, -1.5, 1.5, 3.0], dtype=torch.float64, requires_grad=True)
    f = lambda x: torch.where(x > 1, x.acosh(), 2 * x).sum()
    torch.testing.assert_close(grad(f)(x), torch.autograd.grad(f(x), x)[0])
    second = vmap(grad(grad(torch.acosh)))(x)
    torch.testing.assert_close(second, -x * (x * x - 1) ** -1.5)


def test_scaled_bessel_functions_on_both_sides():
    x = torch.tensor([-2.0, -0.05, 0.05, 0.3], dtype=torch.float64)
    for f, n in ((torch.special.i0e, 0), (torch.special.i1e, 1)):
        exact = lambda y, n=n: mpmath.exp(-abs(y)) * mpmath.besseli(n, y)
        for order in range(1, 4):
            f = grad(f)
            with mpmath.workdps(60):
                want = [float(mpmath.diff(exact, mpmath.mpf(float(y)), order)) for y in x]
            torch.testing.assert_close(
                vmap(f)(x), torch.tensor(want, dtype=torch.float64), rtol=1e-8, atol=1e-9
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_logcumsumexp_before_there_is_mass(start, dtype):
    """Entries -inf have no weight; that of x[k] in out[j] is exp(x[k] - out[j])."""
    x = torch.randn(4, dtype=dtype)
    x[:start] = -math.inf
    f = lambda x: torch.logcumsumexp(x, 0)
    t = torch.randn(4, dtype=dtype)
    weights = (x - f(x)[:, None]).exp().tril()
    weights[:start] = 0
    torch.testing.assert_close(jvp(f, (x,), (t,))[1], weights @ t)
    torch.testing.assert_close(vjp(f, x)[1](t)[0], weights.mH @ t)
    if dtype is torch.float64:
        second = jacrev(jacfwd(f))(x)
        assert second.isfinite().all()
        torch.testing.assert_close(jacfwd(jacrev(f))(x), second)
        torch.testing.assert_close(
            second, weights[:, :, None] * (torch.eye(4) - weights[:, None, :])
        )

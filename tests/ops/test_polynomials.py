"""Orthogonal polynomials: PyTorch has no derivatives of them; numpy's, by coefficients, say what
they are."""

import numpy as np
import pytest
import torch
from numpy.polynomial import polynomial

from aotfunc import grad, jvp, vmap
from aotfunc.errors import RuleError

D = torch.float64
KINDS = [f"{s}chebyshev_polynomial_{k}" for s in ("", "shifted_") for k in "tuvw"]
KINDS += [
    "hermite_polynomial_h",
    "hermite_polynomial_he",
    "laguerre_polynomial_l",
    "legendre_polynomial_p",
]
#: those whose derivative is one polynomial, not a sum over all lower degrees
SHORT = [k for k in KINDS if k.endswith("_t") or "hermite" in k]
X = torch.tensor(
    [-1.0, -0.7, 0.0, 0.2, 0.5, 1.0, 1.3], dtype=D
)  # with the ends, where closed forms divide by zero


def coefficients(f, degree):
    nodes = torch.linspace(-1.2, 1.4, degree + 1, dtype=D)
    values = torch.stack([f(x, degree) for x in nodes])
    return np.linalg.solve(np.vander(nodes.numpy(), degree + 1, increasing=True), values.numpy())


@pytest.mark.parametrize("degree", [0, 1, 2, 5, 5.7, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_three_derivatives(kind, degree):
    f = getattr(torch.special, kind)
    c = coefficients(f, int(degree))
    g = lambda x: f(x, degree)
    for _ in range(3):
        c = polynomial.polyder(c) if len(c) > 1 else np.zeros(1)
        want = torch.tensor(polynomial.polyval(X.numpy(), c))
        torch.testing.assert_close(
            jvp(g, (X,), (torch.ones_like(X),))[1], want, rtol=1e-6, atol=1e-6
        )
        g = (lambda h: grad(lambda x: h(x).sum()))(g)
        torch.testing.assert_close(g(X), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_degrees_in_a_tensor(kind):
    f = getattr(torch.special, kind)
    x, n = torch.rand(4, dtype=D), torch.tensor([0, 1, 3, 4])
    if kind not in SHORT:
        with pytest.raises(RuleError, match="give the degree as a number"):
            grad(lambda x: f(x, n).sum())(x)
        return
    want = torch.stack([grad(lambda y, k=k: f(y, k))(y) for y, k in zip(x, n.tolist())])
    torch.testing.assert_close(grad(lambda x: f(x, n).sum())(x), want)
    torch.testing.assert_close(vmap(grad(f))(x, n.to(D)), want)
    with pytest.raises(RuleError, match="has no derivative"):
        grad(lambda n: f(x, n).sum())(n.to(D))

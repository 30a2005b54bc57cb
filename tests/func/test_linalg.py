"""Derivatives of linear algebra where formulas divide by zero: determinants of singular matrices,
spectra."""

from itertools import permutations

import pytest
import torch

from aotfunc import grad, hessian, jacfwd, jacrev, vmap

F64 = torch.float64


def doubles(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def leibniz(a):
    """The determinant as the polynomial that it is."""
    n = a.shape[-1]

    def term(p):
        inversions = sum(p[j] > p[i] for i in range(n) for j in range(i))
        return (-1) ** inversions * torch.stack([a[i, p[i]] for i in range(n)]).prod()

    return torch.stack([term(p) for p in permutations(range(n))]).sum()


SINGULAR = {
    "one to nine": torch.arange(1.0, 10.0, dtype=F64).view(3, 3),
    "two rows alike": torch.tensor([[1.0, 2, 3], [2, 4, 6], [1, 0, 1]], dtype=F64),
    "zeros": torch.zeros(3, 3, dtype=F64),
    "number": torch.zeros(1, 1, dtype=F64),
    "small on the diagonal": torch.diag(torch.tensor([1e-8, 1.0, 1e-8], dtype=F64)),
    "complex": doubles(3, 2, dtype=torch.complex128)
    @ doubles(2, 3, seed=1, dtype=torch.complex128),
    **{f"rank 3, {k}": doubles(4, 3, seed=k) @ doubles(3, 4, seed=k + 10) for k in range(6)},
    **{f"rank 2, {k}": doubles(4, 2, seed=k) @ doubles(2, 4, seed=k + 10) for k in range(3)},
}


@pytest.mark.parametrize("name", SINGULAR)
def test_determinant_of_a_singular_matrix(name):
    a, f = SINGULAR[name], torch.linalg.det
    f, exact = (
        (f, leibniz)
        if not a.is_complex()
        else (lambda a: torch.linalg.det(a).real, lambda a: leibniz(a).real)
    )
    x = a.clone().requires_grad_()
    want = torch.autograd.grad(exact(x), x)[0]
    torch.testing.assert_close(grad(f)(a), want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(vmap(grad(f))(torch.stack([a, a]))[1], want, rtol=1e-9, atol=1e-12)
    if not a.is_complex():
        torch.testing.assert_close(jacfwd(f)(a), want, rtol=1e-9, atol=1e-12)
        second = torch.autograd.functional.hessian(exact, a)
        for g in (hessian(f), jacrev(jacfwd(f)), jacrev(jacrev(f))):
            torch.testing.assert_close(g(a), second, rtol=1e-3, atol=1e-3)


def test_determinant_without_rows():
    assert grad(torch.linalg.det)(torch.zeros(0, 0, dtype=F64)).shape == (0, 0)


def weighed(vectors):
    """A function of eigenvectors that their phases do not change."""
    return (vectors.abs().square() * torch.arange(1.0, 4.0, dtype=F64)[:, None]).cos().sum()


SPECTRA = {
    "eigh": lambda x: (lambda w, q: w.sin().sum() + weighed(q))(*torch.linalg.eigh(x + x.mT)),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(x + x.mT).sin().sum(),
    "eig": lambda x: (lambda w, v: w.pow(3).sum().real + weighed(v))(*torch.linalg.eig(x)),
    "eigvals": lambda x: torch.linalg.eigvals(x).pow(3).sum().real,
    "svd": lambda x: (lambda u, s, vh: s.sin().sum() + weighed(u) + weighed(vh.mT))(
        *torch.linalg.svd(x)
    ),
    "complex eigh": lambda x: (lambda w, q: w.sin().sum() + weighed(q))(
        *torch.linalg.eigh(hermitian(x))
    ),
}


def hermitian(x):
    return x + x.mT + 1j * (x - x.mT)


@pytest.mark.parametrize("name", SPECTRA)
def test_second_derivatives_of_spectra_in_every_order(name):
    f = SPECTRA[name]
    a = torch.diag(torch.tensor([1.0, 3.0, 6.0], dtype=F64)) + 0.1 * doubles(3, 3)
    want = torch.autograd.functional.hessian(f, a)
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            torch.testing.assert_close(outer(inner(f))(a), want, rtol=1e-8, atol=1e-8)

"""Derivatives of the factorisations of a matrix: Cholesky, eigenvectors, singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from .schema import aten
from .table import jvp_of, total, vjp_of


def half_triangle(x: Tensor) -> Tensor:
    """Return the lower triangle, with half the diagonal."""
    return x.tril() - 0.5 * torch.diag_embed(x.diagonal(0, -2, -1))


def hermitian(x: Tensor) -> Tensor:
    return 0.5 * (x + x.mH)


@vjp_of(aten.linalg_cholesky_ex, diff_outputs=(0,))
def _(g, out, a, upper):
    lower, g = (t.mH if upper else t for t in (out[0], g[0]))
    product = lower.mH @ g
    inner = 0.5 * (product.tril() + product.tril(-1).mH)
    inner = aten.linalg_solve_triangular(lower.mH, inner, upper=True)  # L^-H S L^-1
    return [aten.linalg_solve_triangular(lower, inner, upper=False, left=False)]


@jvp_of(aten.linalg_cholesky_ex)
def _(tangents, out, a, upper):
    lower = out[0].mH if upper else out[0]
    inner = aten.linalg_solve_triangular(lower, hermitian(tangents[0]), upper=False)
    inner = aten.linalg_solve_triangular(lower.mH, inner, upper=True, left=False)
    moved = lower @ half_triangle(inner)
    return moved.mH if upper else moved, None


@vjp_of(aten.cholesky_inverse)
def _(g, out, factor, upper):
    factor = factor.triu() if upper else factor.tril()
    inner = -2 * hermitian(out @ g @ out)  # the cotangent of factor @ factor.mH, twice
    return [(factor @ inner).triu() if upper else (inner @ factor).tril()]


def off_diagonal(x: Tensor, gaps_of: Tensor) -> Tensor:
    """Return ``x_ij / (w_j - w_i)``, zero on the diagonal."""
    gaps = gaps_of.unsqueeze(-2) - gaps_of.unsqueeze(-1)
    one = torch.eye(gaps.shape[-1], dtype=gaps.dtype, device=gaps.device)
    return (x - torch.diag_embed(x.diagonal(0, -2, -1))) / (gaps + one)


@jvp_of(aten._linalg_eigh)
def _(tangents, out, a, uplo, compute_v):
    w, v = out if compute_v else aten._linalg_eigh(a, uplo, True)
    moved = v.mH @ tangents[0] @ v
    rate = moved.diagonal(0, -2, -1).real if a.is_complex() else moved.diagonal(0, -2, -1)
    return rate, v @ off_diagonal(moved, w) if compute_v else None


@jvp_of(aten.linalg_eig)
def _(tangents, out, a):
    w, v = out
    moved = aten._linalg_solve_ex(v, tangents[0].to(v.dtype) @ v)[0]
    turn = v @ off_diagonal(moved, w)
    along = (v.conj() * turn).sum(-2, keepdim=True).real  # vectors keep length 1
    return moved.diagonal(0, -2, -1), turn - v * along


def skew(x: Tensor) -> Tensor:
    return x - x.mH


@vjp_of(aten._linalg_svd)
def _(g, out, a, full_matrices, compute_uv, driver):
    """Return ``a = u diag(s) vh``. Columns of ``u`` beyond the ``k = min(m, n)``-th are not
    differentiable, and left out.

    The phases of complex singular vectors are arbitrary: this is the gradient of a function that
    ignores them."""
    if not compute_uv:
        out = aten._linalg_svd(a, False, True, driver=driver)
    u, s, vh = out
    gu, gs, gvh = g
    m, n = a.shape[-2:]
    k = min(m, n)
    u, vh = u[..., :k], vh[..., :k, :]
    row, column = s.unsqueeze(-2), s.unsqueeze(-1)
    # one on the diagonal
    gap = (row - column) * (row + column) + torch.eye(k, dtype=s.dtype, device=s.device)
    inner = [] if gs is None else [torch.diag_embed(gs.to(a.dtype))]
    outside = []
    if gu is not None:
        gu = gu[..., :k]
        turn = skew(u.mH @ gu)
        inner.append((turn - torch.diag_embed(turn.diagonal(0, -2, -1))) / gap * row)
        if a.is_complex():  # a common phase of both vectors changes nothing: split it in halves
            inner.append(torch.diag_embed(turn.diagonal(0, -2, -1) / (2 * s)))
        if m > k:
            outside.append((gu - u @ (u.mH @ gu)) / row @ vh)
    if gvh is not None:
        gvh = gvh[..., :k, :]
        turn = skew(vh @ gvh.mH)
        inner.append(column * (turn - torch.diag_embed(turn.diagonal(0, -2, -1))) / gap)
        if n > k:
            outside.append(u @ ((gvh - (gvh @ vh.mH) @ vh) / column))
    return [total(u @ total(*inner) @ vh, *outside)]

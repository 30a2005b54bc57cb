"""Rules of linear algebra on matrices: the batch of all its ops; inverses, systems, determinants.

All of these ops take leading dimensions, so a batch goes in front of them. A derivative is written
if it is short; PyTorch's own formula serves for the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from .batching import align, all_batched, with_batch
from .schema import Formula, aten, call_op, overload, tensor_args
from .table import broadcast_shapes, conj, jvp_of, linear, total, vjp_of, vmap_of

# ----- the batch in front ------------------------------------------------------------------------


def leading(op: OpOverload | OpOverloadPacket, broadcasts: bool = False) -> Formula:
    """Return the vmap rule of an op with free leading dimensions, which may broadcast."""
    op = overload(op)
    where = tensor_args(op)

    def batch(*args: Any, batched: tuple[bool, ...], size: int) -> Any:
        full = list(args)
        given = [
            (i, with_batch(args[i], b, size))
            for i, b in zip(where, batched, strict=True)
            if args[i] is not None
        ]
        rank = max(x.dim() for _, x in given) - 1
        for i, x in given:
            full[i] = align(x, rank) if broadcasts else x
        return call_op(op, full)

    return batch


PRIVATE = ["det", "slogdet", "eigh", "svd", "eigvals"]
PUBLIC = ["inv_ex", "cholesky_ex", "qr", "eig", "lu", "lu_factor_ex", "ldl_factor_ex"]
for op in (
    *(getattr(aten, f"_linalg_{name}") for name in PRIVATE),
    *(getattr(aten, f"linalg_{name}") for name in PUBLIC),
    *(aten.cholesky, aten.cholesky_inverse, aten.geqrf, aten.ormqr),
    aten.linalg_householder_product,
):
    vmap_of(op)(leading(op))
# no view of the leading dimensions
vmap_of(aten.linalg_matrix_exp)(lambda a: aten.linalg_matrix_exp(a.contiguous()))
for op in (aten.linalg_solve_triangular, aten.triangular_solve, aten.cholesky_solve):
    vmap_of(op)(leading(op, broadcasts=True))


@vmap_of(aten.linalg_pinv.atol_rtol_tensor)
def _(a, atol, rtol, hermitian, *, batched, size):
    a = with_batch(a, batched[0], size)
    tolerances = [  # one for each matrix, broadcast against the leading dimensions
        align(t, a.dim() - 3) if b else t for t, b in zip((atol, rtol), batched[1:], strict=True)
    ]
    return aten.linalg_pinv.atol_rtol_tensor(
        a, atol=tolerances[0], rtol=tolerances[1], hermitian=hermitian
    )


@vmap_of(aten.lu_unpack)
def _(lu, pivots, data, with_pivots, *, batched, size):
    lu, pivots = all_batched((lu, pivots), batched, size)
    made = aten.lu_unpack(lu, pivots, data, with_pivots)
    return tuple(
        x if wanted else x.expand(size, 0)
        for x, wanted in zip(made, (with_pivots, data, data), strict=True)
    )


def with_pivots(op: OpOverloadPacket) -> None:
    """Register the vmap rule of ``(factors, pivots, b, *flags)``; pivots have a rank less."""

    @vmap_of(op)
    def _(factors, pivots, b, *flags, batched, size):
        factors, pivots, b = all_batched((factors, pivots, b), batched, size)
        rank = max(factors.dim(), b.dim()) - 1
        factors, b, pivots = align(factors, rank), align(b, rank), align(pivots, rank - 1)
        if op is aten.linalg_ldl_solve:  # the op does not broadcast
            lead = broadcast_shapes(factors.shape[:-2], b.shape[:-2])
            factors, pivots, b = (
                x.expand(*lead, *x.shape[len(lead) :]).contiguous() for x in (factors, pivots, b)
            )
        return call_op(overload(op), [factors, pivots, b, *flags])


with_pivots(aten.linalg_lu_solve)
with_pivots(aten.linalg_ldl_solve)


@vmap_of(aten._linalg_solve_ex)
def _(a, b, left, check, *, batched, size):
    vector = b.dim() - batched[1] == 1 or (
        a.dim() - batched[0] - 1 == b.dim() - batched[1]
        and a.shape[batched[0] : -1] == b.shape[batched[1] :]
    )
    if vector:  # the op distinguishes vectors from matrices by shape: pass matrices
        b = b.unsqueeze(-1)
    rank = max(a.dim() - batched[0], b.dim() - batched[1])
    a, b = (align(x, rank) for x in all_batched((a, b), batched, size))
    out, *others = aten._linalg_solve_ex(a, b, left=left, check_errors=check)
    return out.squeeze(-1) if vector else out, *others


# ----- inverse, systems, determinants ------------------------------------------------------------


@vjp_of(aten.linalg_inv_ex, diff_outputs=(0,))
def _(g, out, a):
    inverse = out[0]
    return [-(inverse.mH @ g[0] @ inverse.mH)]


@jvp_of(aten.linalg_inv_ex)
def _(tangents, out, a):
    return -(out[0] @ tangents[0] @ out[0]), None


def is_vector(a: Tensor, b: Tensor) -> bool:
    """Return whether ``b`` is a batch of vectors to ``_linalg_solve_ex``."""
    return b.dim() == 1 or (a.dim() - 1 == b.dim() and a.shape[:-1] == b.shape)


@vjp_of(aten._linalg_solve_ex, diff_outputs=(0,))
def _(g, out, a, b, left, *, needs):
    vector = is_vector(a, b)
    x, gx = (t.unsqueeze(-1) if vector else t for t in (out[0], g[0]))
    gb = aten._linalg_solve_ex(a.mH, gx, left=left)[0]
    of_a = None
    if needs[0]:
        of_a = -(gb @ x.mH) if left else -(x.mH @ gb)
    return of_a, gb.squeeze(-1) if vector else gb


@jvp_of(aten._linalg_solve_ex)
def _(tangents, out, a, b, left):
    ta, tb = tangents
    vector = is_vector(a, b)
    x, tb = (t.unsqueeze(-1) if vector and t is not None else t for t in (out[0], tb))
    right = total(tb, None if ta is None else -(ta @ x) if left else -(x @ ta))
    tx = aten._linalg_solve_ex(a, right, left=left)[0]
    return tx.squeeze(-1) if vector else tx, None, None, None


def adjugate(a: Tensor) -> Tensor:
    """Return ``det(a) * inv(a)``, for singular ``a`` too.

    Of ``a = p @ lower @ upper``, where partial pivoting leaves the zero of a matrix of rank n - 1
    to the last pivot, ``adj(a) = det(p) * prod(the other pivots) * upper'^-1 @ diag(last, …, last,
    1) @ lower^-1 @ p^T`` where ``upper'`` has one for its last pivot: nothing is divided by it.
    Derivatives are those of ``det * inv`` with small pivots moved away from zero: the adjugate is
    a polynomial, so they move as little."""
    n = a.shape[-1]
    if n == 0:
        return a
    p, lower, upper = aten.linalg_lu(a.detach())
    pivots = upper.diagonal(0, -2, -1)
    rows = (p.mT @ a.detach()).abs().amax(-1)

    def off_zero(bound: float) -> Tensor:
        """Return the shifts that move pivots which are small beside their rows away from zero."""
        small = bound * torch.where(rows > 0, rows, 1)
        return torch.where(pivots.abs() < small, small - pivots, 0)

    eps = torch.finfo(a.dtype).eps
    moved = a + p @ lower @ torch.diag_embed(off_zero(eps**0.3))
    smooth = aten._linalg_det(moved)[0][..., None, None] * aten.linalg_inv_ex(moved)[0]

    last = torch.arange(n, device=a.device) == n - 1
    others = torch.where(last, 1, pivots + off_zero(eps))
    upper = upper + torch.diag_embed(others - pivots)
    scale = torch.where(last, 1, pivots[..., -1:]) * (
        aten._linalg_det(p)[0] * others.prod(-1)
    ).unsqueeze(-1)
    right = scale.unsqueeze(-1) * aten.linalg_solve_triangular(
        lower, p.mT, upper=False, unitriangular=True
    )
    exact = aten.linalg_solve_triangular(upper, right, upper=True)
    return exact.detach() + (smooth - smooth.detach())


@vjp_of(aten._linalg_det, diff_outputs=(0,))
def _(g, out, a):
    return [g[0][..., None, None] * adjugate(a).mH]


@jvp_of(aten._linalg_det)
def _(tangents, out, a):
    return (adjugate(a).mT * tangents[0]).sum((-2, -1)), None, None


@vjp_of(aten._linalg_slogdet, diff_outputs=(0, 1))
def _(g, out, a):
    g_sign, g_log = g[:2]
    if a.is_complex():  # the sign turns too
        sign = out[0]
        turn = None if g_sign is None else g_sign - (g_sign * sign.conj()).real * sign
        weight = total(g_log, None if turn is None else turn * sign.conj())
    else:
        weight = g_log
    return [None if weight is None else weight[..., None, None] * aten.linalg_inv_ex(a)[0].mH]


@jvp_of(aten._linalg_slogdet)
def _(tangents, out, a):
    rate = aten._linalg_solve_ex(a, tangents[0])[0].diagonal(0, -2, -1).sum(-1)
    if a.is_complex():
        return (
            out[0] * torch.complex(torch.zeros_like(rate.imag), rate.imag),
            rate.real,
            None,
            None,
        )
    return None, rate, None, None


@vjp_of(aten.linalg_solve_triangular)
def _(g, out, a, b, upper, left, unit, *, needs):
    gb = aten.linalg_solve_triangular(a.mH, g, upper=not upper, left=left, unitriangular=unit)
    of_a = None
    if needs[0]:
        of_a = -(gb @ out.mH) if left else -(out.mH @ gb)
        of_a = of_a.triu(int(unit)) if upper else of_a.tril(-int(unit))
    return of_a, gb


@jvp_of(aten.linalg_solve_triangular)
def _(tangents, out, a, b, upper, left, unit):
    ta, tb = tangents
    if ta is not None:
        ta = ta.triu(int(unit)) if upper else ta.tril(-int(unit))
        tb = total(tb, -(ta @ out) if left else -(out @ ta))
    return aten.linalg_solve_triangular(a, tb, upper=upper, left=left, unitriangular=unit)


@vjp_of(aten.triangular_solve, diff_outputs=(0, 1))
def _(g, out, b, a, upper, transpose, unit, *, needs):
    """Return ``(x, a copy of a)`` with ``a x = b``, or ``a.mT x = b``."""
    gx, of_a = g
    if gx is None:
        return None, of_a
    gb = aten.triangular_solve(gx, conj(a), upper, not transpose, unit)[0]
    if needs[1]:
        moved = -(out[0].conj() @ gb.mT) if transpose else -(gb @ out[0].mH)
        moved = moved.triu(int(unit)) if upper else moved.tril(-int(unit))
        of_a = moved if of_a is None else of_a + moved.sum_to_size(a.shape)
    return gb, of_a


@vjp_of(aten.linalg_lstsq, diff_outputs=(0, 1))
def _(g, out, a, b, rcond, *, needs):
    """Differentiate ``x = pinv(a) @ b`` and residuals ``|a @ x - b|^2``, for full rank."""
    x, gx, of_residual = out[0], g[0], g[1] if out[1].numel() else None
    vector = is_vector(a, b)
    if vector:
        x, b, gx = (None if t is None else t.unsqueeze(-1) for t in (x, b, gx))
    ga, gb = [], []
    if gx is not None:
        inverse = torch.linalg.pinv(a)
        back = inverse.mH @ gx
        gb.append(back)
        if needs[0]:
            tall = a.shape[-2] >= a.shape[-1]
            ga.append(-(back @ x.mH))
            if tall:  # the term of the residual b - a @ x
                ga.append((b - a @ x) @ (inverse @ back).mH)
            else:  # a moves the subspace that x lies in
                ga.append((inverse.mH @ x) @ (gx - a.mH @ back).mH)
    if of_residual is not None:
        over = (
            2
            * (a @ x - b)
            * (of_residual[..., None, None] if vector else of_residual.unsqueeze(-2))
        )
        ga.append(over @ x.mH)
        gb.append(-over)
    of_b = total(*gb)
    return total(*ga) if needs[0] else None, of_b.squeeze(
        -1
    ) if vector and of_b is not None else of_b


@vmap_of(aten.linalg_lstsq)
def _(a, b, rcond, driver, *, shape):
    """Batch all samples in one call; the residuals of one driver, and the rank of another, are
    left out for all."""
    outs = aten.linalg_lstsq(a, b, rcond, driver=driver)
    return tuple(
        o if tuple(s) != (0,) else o.new_empty(a.shape[0], 0)
        for o, s in zip(outs, shape, strict=True)
    )


def cross(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return aten.linalg_cross(a, b, dim=dim)


def batch_cross(a: Tensor, b: Tensor, dim: int, *, batched: tuple[bool, ...], size: int) -> Tensor:
    a, b = all_batched((a, b), batched, size)
    return aten.linalg_cross(a, b, dim=dim % (a.dim() - 1) + 1)


linear(
    aten.linalg_cross,
    lambda g, a, b, dim: cross(b.conj(), g, dim),
    lambda g, a, b, dim: cross(g, a.conj(), dim),
    batch=batch_cross,
)

"""Follow the batch through matrix ops: as rows, columns, or the batch of matrices."""

from __future__ import annotations

from typing import Any

from ...trace.shapes.sig import Sig
from .parts import Mixed, OpCall, Part, broadcast_part, part_rule


@part_rule("mm bmm")
def multiplied(c: OpCall) -> Any:
    return product(*c.tensors)


@part_rule("addmm baddbmm")
def added(c: OpCall) -> Any:
    bias, left, right = c.tensors
    return broadcast_part([bias, (c.val, product(left, right))], c.val.ndim)


def product(left: tuple[Sig, Part | None], right: tuple[Sig, Part | None]) -> Part:
    """Return a matrix product's part: the left's rows, the right's columns, or the batch."""
    (sig, a), (_, b) = left, right
    rows = sig.ndim - 2
    if a is not None and b is None and a.dim == rows:
        return a
    if b is not None and a is None and b.dim == rows + 1:
        return b
    if a is not None and a == b and a.dim < rows:
        return a
    raise Mixed


@part_rule("mv")
def applied(c: OpCall) -> Any:
    _, part = c.only("self")
    part.without([1])
    return part


@part_rule(
    "triu tril linalg_inv_ex _linalg_det _linalg_slogdet linalg_lu_factor_ex linalg_cholesky_ex "
    "linalg_solve_triangular"
)
@part_rule(
    "_linalg_eigh linalg_eig linalg_qr linalg_lu _linalg_svd linalg_matrix_exp _linalg_solve_ex "
    "cholesky_solve cholesky"
)
@part_rule("cholesky_inverse triangular_solve")
def matrices(c: OpCall) -> Any:
    """Keep the batch among the batches of matrices."""
    sig, part = c.alike()
    if part.dim or sig.ndim < 3:
        raise Mixed
    return c.each(part)


@part_rule("lu_unpack linalg_lu_solve linalg_ldl_factor_ex linalg_ldl_solve geqrf")
@part_rule("linalg_householder_product ormqr _cdist_forward linalg_pinv.atol_rtol_tensor")
def several(c: OpCall) -> Any:
    """Keep the batch of matrices and of their parts: pivots, factors, tolerances."""
    sig, part = c.tensors[0]
    if sig.ndim < 3 or any(p != Part(0) or not s.ndim for s, p in c.tensors):
        raise Mixed
    return c.each(part) if part is not None else None


@part_rule("_linalg_check_errors")
def checked(c: OpCall) -> Any:
    return None

"""Rules of the matrix products: transposes, and a batch as one larger product.

A batch on one side only is folded into that side's rows, so that it stays one ``mm``; on both
sides it is a ``bmm``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batching import align
from .schema import aten
from .table import conj, jvp_of, linear, times, vjp_of, vmap_of

# ----- transposes --------------------------------------------------------------------------------


def adjoint(x: Tensor) -> Tensor:
    """Return the conjugate transpose of a matrix or of a batch of them."""
    return conj(x.t() if x.dim() == 2 else x.transpose(1, 2))


def is_transposed(x: Tensor) -> bool:
    """Return whether ``x`` is in memory a contiguous matrix's transpose, like ``weight.t()``."""
    return x.stride(0) == 1 and x.stride(1) == x.shape[0] and x.shape[0] != 1


def mm_left(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the cotangent of ``a`` in ``a @ b``, laid out in memory as ``a`` is."""
    return torch.mm(conj(b), g.t()).t() if is_transposed(a) else torch.mm(g, adjoint(b))


def mm_right(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the cotangent of ``b`` in ``a @ b``, laid out in memory as ``b`` is."""
    return torch.mm(g.t(), conj(a)).t() if is_transposed(b) else torch.mm(adjoint(a), g)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a bᵀ`` over the last dimension of each."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def as_dtype(x: Any, dtype: torch.dtype) -> Any:
    """Return a number as kernels read it: cut to an integer or a truth value by dtype."""
    if dtype == torch.bool:
        return bool(x)
    return (
        int(x) if isinstance(x, float) and not (dtype.is_floating_point or dtype.is_complex) else x
    )


# ----- batches -----------------------------------------------------------------------------------


def batch_mm(a: Tensor, b: Tensor, *, batched: tuple[bool, ...]) -> Tensor:
    """Return ``[B?, n, k] @ [B?, k, m] -> [B, n, m]``."""
    if batched[0] and batched[1]:
        return torch.bmm(a, b)
    if batched[0]:
        return torch.mm(a.flatten(0, 1), b).reshape(a.shape[0], a.shape[1], b.shape[1])
    columns = torch.mm(b.transpose(1, 2).flatten(0, 1), a.t())
    return columns.reshape(b.shape[0], b.shape[2], a.shape[0]).transpose(1, 2)


def batch_bmm(a: Tensor, b: Tensor, *, batched: tuple[bool, ...]) -> Tensor:
    """Return ``[B?, p, n, k] @ [B?, p, k, m] -> [B, p, n, m]``."""
    if batched[0] and batched[1]:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    if batched[0]:
        rows = torch.bmm(a.transpose(0, 1).flatten(1, 2), b)
        return rows.reshape(a.shape[1], a.shape[0], a.shape[2], b.shape[2]).transpose(0, 1)
    return batch_bmm(b.transpose(2, 3), a.transpose(1, 2), batched=(True, False)).transpose(2, 3)


def batch_mv(a: Tensor, v: Tensor, *, batched: tuple[bool, ...]) -> Tensor:
    """Return ``[B?, n, k] @ [B?, k] -> [B, n]``."""
    if batched[0] and batched[1]:
        return torch.bmm(a, v.unsqueeze(2)).squeeze(2)
    if batched[0]:
        return torch.mv(a.flatten(0, 1), v).reshape(a.shape[0], a.shape[1])
    return torch.mm(v, a.t())


def batch_dot(a: Tensor, b: Tensor, *, batched: tuple[bool, ...]) -> Tensor:
    """Return ``[B?, n] · [B?, n] -> [B]``."""
    if batched[0] and batched[1]:
        return (a * b).sum(1)
    return torch.mv(a, b) if batched[0] else torch.mv(b, a)


def batch_vdot(a: Tensor, b: Tensor, *, batched: tuple[bool, ...]) -> Tensor:
    """Return ``conj([B?, n]) · [B?, n] -> [B]``."""
    return batch_dot(conj(a), b, batched=batched)


# ----- the plain products ------------------------------------------------------------------------

linear(aten.mm, mm_left, mm_right, batch=batch_mm)
linear(
    aten.bmm,
    lambda g, a, b: torch.bmm(g, adjoint(b)),
    lambda g, a, b: torch.bmm(adjoint(a), g),
    batch=batch_bmm,
)
linear(
    aten.mv,
    lambda g, a, v: outer(g, conj(v)),
    lambda g, a, v: torch.mv(adjoint(a), g),
    batch=batch_mv,
)
linear(aten.dot, lambda g, a, b: g * conj(b), lambda g, a, b: g * conj(a), batch=batch_dot)
linear(aten.vdot, lambda g, a, b: conj(g) * b, lambda g, a, b: g * a, batch=batch_vdot)


# ----- beta * c + alpha * (a @ b) ----------------------------------------------------------------
#
# With beta == 0 the term of c is left out: PyTorch ignores even a NaN in c.


def fused(op: Any, product: Any, left: Any, right: Any, batch: Any) -> None:
    """Register ``op(c, a, b, *, beta, alpha) = beta * c + alpha * product(a, b)``."""

    @vjp_of(op)
    def vjp(g, out, c, a, b, beta, alpha, *, needs) -> Any:
        scaled = times(g, conj(alpha))
        return (
            times(g, conj(beta)) if needs[0] else None,
            left(scaled, a, b) if needs[1] else None,
            right(scaled, a, b) if needs[2] else None,
        )

    @jvp_of(op)
    def jvp(
        tangents: Any, out: Tensor, c: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any
    ) -> Any:
        dc, da, db = tangents
        sum_so_far, by = dc, beta
        for x, y in ((da, b), (a, db)):
            if x is None or y is None:
                continue
            if sum_so_far is None:
                sum_so_far = times(product(x, y), alpha)
            else:
                sum_so_far = op(sum_so_far, x, y, beta=by, alpha=alpha)
            by = 1
        return times(sum_so_far, by)

    @vmap_of(op)
    def vmap(
        c: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any, *, batched: Any, size: Any
    ) -> Tensor:
        if (
            op is aten.addmm
            and batched == (False, True, False)
            and (c.dim() < 2 or c.shape[0] == 1)
        ):
            return op(c, a.flatten(0, 1), b, beta=beta, alpha=alpha).reshape(
                a.shape[0], a.shape[1], b.shape[1]
            )
        if op is aten.addmm and batched[1] and batched[2]:
            c = align(c, 2) if batched[0] else c
            return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
        beta, alpha = (as_dtype(x, torch.promote_types(c.dtype, a.dtype)) for x in (beta, alpha))
        if batched[1] or batched[2]:
            result = times(batch(a, b, batched=batched[1:]), alpha)
        else:
            result = times(product(a, b), alpha).unsqueeze(0)
        if beta == 0:
            return result.expand(size, *result.shape[1:])
        if batched[0]:
            c = align(c, result.dim() - 1)
        return result + times(c, beta)


def summed_bmm(a: Tensor, b: Tensor) -> Tensor:
    """Sum products, ``[p, n, k] @ [p, k, m] -> [n, m]``: as one over ``p`` and ``k``."""
    return torch.bmm(a, b).sum(0)


fused(aten.addmm, torch.mm, mm_left, mm_right, batch_mm)
fused(
    aten.addmv,
    torch.mv,
    lambda g, a, v: outer(g, conj(v)),
    lambda g, a, v: torch.mv(adjoint(a), g),
    batch_mv,
)
fused(
    aten.baddbmm,
    torch.bmm,
    lambda g, a, b: torch.bmm(g, adjoint(b)),
    lambda g, a, b: torch.bmm(adjoint(a), g),
    batch_bmm,
)
fused(
    aten.addbmm,
    summed_bmm,
    lambda g, a, b: torch.bmm(g.expand(a.shape[0], *g.shape), adjoint(b)),
    lambda g, a, b: torch.bmm(adjoint(a), g.expand(a.shape[0], *g.shape)),
    lambda a, b, *, batched: batch_bmm(a, b, batched=batched).sum(1),
)
fused(
    aten.addr,
    outer,
    lambda g, a, b: torch.mv(g, conj(b)),
    lambda g, a, b: torch.mv(g.t(), conj(a)),
    lambda a, b, *, batched: outer(a, b),
)


# ----- linear layers and bilinear forms ----------------------------------------------------------


def as_rows(x: Tensor) -> Tensor:
    """Return all leading dimensions as one."""
    return x.unsqueeze(0) if x.dim() == 1 else x if x.dim() == 2 else x.flatten(0, -2)


@vjp_of(aten.linear)
def _(
    g: Tensor, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, needs: Any
) -> Any:
    if weight.dim() == 1:  # a row of weights takes a vector to a number
        g, weight_grad = g.unsqueeze(-1), None
        x_grad = g * conj(weight)
        if needs[1]:
            weight_grad = torch.mv(as_rows(conj(x)).t(), g.flatten())
        return x_grad, weight_grad, g.squeeze(-1) if bias is not None else None
    return (
        torch.matmul(g, conj(weight)) if needs[0] else None,
        torch.mm(as_rows(g).t(), as_rows(conj(x))) if needs[1] else None,
        g if bias is not None else None,
    )


@jvp_of(aten.linear)
def _(tangents: Any, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    dx, dweight, dbias = tangents
    terms = (
        [torch.nn.functional.linear(dx, weight, dbias)]
        if dx is not None
        else []
        if dbias is None
        else [dbias]
    )
    if dweight is not None:
        terms.append(torch.nn.functional.linear(x, dweight))
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


@vmap_of(aten.linear)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *, batched: Any, size: Any) -> Tensor:
    if not batched[1] and not batched[2]:
        return torch.nn.functional.linear(x, weight, bias)
    row = weight.dim() - batched[1] == 1
    weight = weight.unsqueeze(-2) if row else weight
    lead = x.shape[1:-1] if batched[0] else x.shape[:-1]
    if not batched[0]:
        x = as_rows(x)
    else:
        x = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
    if batched[0] or batched[1]:
        out = batch_mm(x, weight.mT, batched=batched)
    else:
        out = torch.mm(x, weight.t()).unsqueeze(0)
    if bias is not None:
        out = out + (bias.reshape(size, 1, 1 if row else bias.shape[-1]) if batched[2] else bias)
    return out.expand(size, *out.shape[1:]).reshape(size, *lead, *([] if row else [out.shape[-1]]))


@vjp_of(aten._trilinear)
def _(g, out, a, b, c, ea, eb, ec, over, unroll) -> Any:
    # out sums a * b * c over `over`; each cotangent has the same form with g and that factor
    # swapped
    return (
        aten._trilinear(g, conj(b), conj(c), over, eb, ec, ea),
        aten._trilinear(conj(a), g, conj(c), ea, over, ec, eb),
        aten._trilinear(conj(a), conj(b), g, ea, eb, over, ec),
    )


@vmap_of(aten._trilinear)
def _(
    a: Tensor, b: Tensor, c: Tensor, ea: Any, eb: Any, ec: Any, over: Any, unroll: Any
) -> Tensor:
    return aten._trilinear(
        a, b, c, *([d + 1 for d in dims] for dims in (ea, eb, ec, over)), unroll + 1
    )


@vjp_of(aten._grouped_mm)
def grouped_mm(g, out, a, b, offs=None, bias=None, out_dtype=None):
    if bias is not None or out_dtype not in (None, a.dtype):
        raise NotImplementedError(
            "_grouped_mm with a bias or another dtype of its result has no derivative"
        )
    turned = b.stride(-2) == 1  # the cotangent is expanded too, as in eager; a weight's is not
    of_b = aten._grouped_mm(g.mT, a, offs).mT if turned else aten._grouped_mm(a.mT, g, offs)
    return aten._grouped_mm(g, b.mT, offs), of_b

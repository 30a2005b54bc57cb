"""Rules of reductions to fewer elements and of selections along a dimension.

Shapes: ``out`` has the reduced dimensions removed, or 1 with ``keepdim``; :func:`unreduced` brings
a cotangent of it back to a shape that broadcasts against the input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .batching import align, shifted
from .choices import keep
from .schema import aten
from .table import along_dims, jvp_of, linear, nondiff, vjp_of, vmap_of

# ----- helpers -----------------------------------------------------------------------------------


def dims_of(x: Tensor, dim: Any) -> tuple[int, ...]:
    """Return ``dim``'s dimensions, not negative: an int, a list, None or ``[]`` for all."""
    if isinstance(dim, int):
        dim = [dim]
    return tuple(d % x.dim() for d in dim) if dim and x.dim() else tuple(range(x.dim()))


def unreduced(g: Tensor, x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    """Return ``g`` with the reduced dimensions of ``x`` put back as 1."""
    if keepdim or x.dim() == 0:
        return g
    dims = dims_of(x, dim)
    if len(dims) == 1:
        return g.unsqueeze(dims[0])
    return g.reshape([1 if d in dims else n for d, n in enumerate(x.shape)])


def count(x: Tensor, dim: Any) -> Any:
    """Return how many elements each output reduces."""
    return math.prod(x.shape[d] for d in dims_of(x, dim))


def per_sample(op: Any) -> Callable[..., Any]:
    """Return the vmap rule of a full reduction, from ``op(x, dims, *rest)``."""

    def batch(x: Tensor, *rest: Any) -> Any:
        x = x.unsqueeze(1) if x.dim() == 1 else x
        return op(x, list(range(1, x.dim())), *rest)

    return batch


def as_vectors(x: Tensor) -> Tensor:
    """Return a batch of tensors as a batch of vectors."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def with_dtype(op: Any) -> Callable[..., Any]:
    """Return ``op`` with its keyword-only ``dtype`` by position, and no dimension kept."""
    return lambda x, dims, dtype=None: op(x, dims, dtype=dtype)


# ----- sums and means ----------------------------------------------------------------------------

linear(aten.sum, lambda g, x: g.expand(x.shape), batch=per_sample(with_dtype(aten.sum)))
linear(
    aten.sum.dim_IntList,
    lambda g, x, dim, keepdim: unreduced(g, x, dim, keepdim).expand(x.shape),
    batch=shifted(aten.sum.dim_IntList, "dim"),
)
linear(
    aten.mean,
    lambda g, x: (g / x.numel()).expand(x.shape),
    batch=per_sample(with_dtype(aten.mean)),
)
linear(
    aten.mean.dim,
    lambda g, x, dim, keepdim: (unreduced(g, x, dim, keepdim) / count(x, dim)).expand(x.shape),
    batch=shifted(aten.mean.dim, "dim"),
)
linear(
    aten.trace,
    lambda g, x: g * torch.eye(*x.shape, dtype=g.dtype, device=g.device),
    batch=lambda x: x.diagonal(0, 1, 2).sum(1),
)


@vjp_of(aten.nansum)
def _(g: Tensor, out: Tensor, x: Tensor, dim: Any, keepdim: bool) -> list[Tensor]:
    return [unreduced(g, x, dim, keepdim) * (x == x)]


vmap_of(aten.nansum)(shifted(aten.nansum, "dim"))


# ----- variance and norms ------------------------------------------------------------------------


def var_backward(g: Tensor, x: Tensor, dim: Any, correction: Any, keepdim: bool) -> Tensor:
    freedom = max(count(x, dim) - (1 if correction is None else correction), 0)
    factor = 2 / freedom if freedom else math.inf
    return unreduced(g, x, dim, keepdim) * factor * (x - x.mean(dims_of(x, dim), keepdim=True))


def std_backward(
    g: Tensor, std: Tensor, x: Tensor, dim: Any, correction: Any, keepdim: bool
) -> Tensor:
    return var_backward((g / (2 * std)).masked_fill(std == 0, 0), x, dim, correction, keepdim)


def mean_backward(g: Tensor, x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    return (unreduced(g, x, dim, keepdim) / count(x, dim)).expand(x.shape)


@vjp_of(aten.var.correction)
def _(g: Tensor, out: Tensor, x: Tensor, dim: Any, correction: Any, keepdim: bool) -> list[Tensor]:
    return [var_backward(g, x, dim, correction, keepdim)]


@vjp_of(aten.std.correction)
def _(g: Tensor, out: Tensor, x: Tensor, dim: Any, correction: Any, keepdim: bool) -> list[Tensor]:
    return [std_backward(g, out, x, dim, correction, keepdim)]


def with_mean(
    backward: Callable[..., Tensor],
    g: Any,
    outs: Any,
    x: Tensor,
    dim: Any,
    correction: Any,
    keepdim: bool,
) -> Any:
    terms = []
    if g[0] is not None:
        terms.append(backward(g[0], outs[0], x, dim, correction, keepdim))
    if g[1] is not None:
        terms.append(mean_backward(g[1], x, dim, keepdim))
    return [sum(terms[1:], terms[0])]


@vjp_of(aten.var_mean.correction)
def _(g: Any, outs: Any, x: Tensor, dim: Any, correction: Any, keepdim: bool) -> list[Tensor]:
    return with_mean(
        lambda g, var, *rest: var_backward(g, *rest), g, outs, x, dim, correction, keepdim
    )


@vjp_of(aten.std_mean.correction)
def _(g: Any, outs: Any, x: Tensor, dim: Any, correction: Any, keepdim: bool) -> list[Tensor]:
    return with_mean(std_backward, g, outs, x, dim, correction, keepdim)


for op in (
    aten.var.correction,
    aten.std.correction,
    aten.var_mean.correction,
    aten.std_mean.correction,
):
    vmap_of(op)(shifted(op, "dim"))


def norm_backward(
    g: Tensor, norm: Tensor, x: Tensor, p: Any, dim: Any = None, keepdim: bool = False
) -> Tensor:
    """Return the cotangent of ``x`` for that of its ``p``-norm."""
    p = 2.0 if p is None else float(p)
    g, norm = unreduced(g, x, dim, keepdim), unreduced(norm, x, dim, keepdim)
    if p == 0:
        return torch.zeros_like(x)
    if p == 1:
        return g * x.sgn()
    if math.isinf(p):  # the extreme elements get equal shares
        size = x.abs()
        extreme = (size == norm) | (size != size)
        return x.sgn() * extreme * (g / extreme.sum(dims_of(x, dim), keepdim=True))
    zero = norm == 0
    # mask first: 0 / 0 would return in the next derivative
    norm = norm.masked_fill(zero, 1)
    if p == 2:
        return x * (g / norm).masked_fill(zero, 0)
    if p < 1:
        return (x.sgn() * x.abs() ** (p - 1)).masked_fill(x == 0, 0) * g * norm ** (1 - p)
    scale = (g * norm ** (1 - p)).masked_fill(zero, 0)
    return (x.sgn() * x.abs() ** (p - 1) if p < 2 else x * x.abs() ** (p - 2)) * scale


# of a count (p = 0) autograd has None, and zeros of ``cdist``'s
@vjp_of(aten.linalg_vector_norm, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype)
def _(g: Tensor, out: Tensor, x: Tensor, p: Any, dim: Any, keepdim: bool) -> list[Tensor | None]:
    return [None if p == 0 else norm_backward(g, out, x, p, dim, keepdim)]


vmap_of(aten.linalg_vector_norm)(shifted(aten.linalg_vector_norm, "dim"))


@vjp_of(aten.norm.Scalar, aten.norm.ScalarOpt_dtype)
def _(g: Tensor, out: Tensor, x: Tensor, p: Any) -> list[Tensor | None]:
    return [None if p == 0 else norm_backward(g, out, x, p)]


vmap_of(aten.norm.Scalar)(per_sample(lambda x, dims, p: aten.norm.ScalarOpt_dim(x, p, dims)))
vmap_of(aten.norm.ScalarOpt_dtype)(
    per_sample(
        lambda x, dims, p, dtype: aten.norm.ScalarOpt_dim_dtype(x, p, dims, False, dtype=dtype)
    )
)
for op in (aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype):
    vmap_of(op)(shifted(op, "dim"))


@vjp_of(aten.dist)
def _(g: Tensor, out: Tensor, x: Tensor, y: Tensor, p: Any) -> list[Tensor | None]:
    if p == 0:
        return [None, None]
    along = norm_backward(g, out, x - y, p)
    return [along, -along]


@vmap_of(aten.dist)
def _(x: Tensor, y: Tensor, p: Any) -> Tensor:
    rank = max(x.dim(), y.dim())
    return aten.linalg_vector_norm(as_vectors(align(x, rank - 1) - align(y, rank - 1)), p, [1])


# ----- extreme values: ties share the cotangent of amax, and of max without a dimension ----------


def share(g: Tensor, mask: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Divide ``g`` equally among the positions that ``mask`` marks."""
    return g / mask.sum(dims, keepdim=True) * mask


def equals(x: Tensor, out: Tensor) -> Tensor:
    """Return where ``x`` is ``out``; if that is NaN, where ``x`` is NaN."""
    return (x == out) | ((x != x) & (out != out))


@vjp_of(aten.amax, aten.amin)
def _(g: Tensor, out: Tensor, x: Tensor, dim: Any, keepdim: bool) -> list[Tensor]:
    return [
        share(unreduced(g, x, dim, keepdim), x == unreduced(out, x, dim, keepdim), dims_of(x, dim))
    ]


@jvp_of(aten.amax, aten.amin)
def _(tangents: tuple[Tensor], out: Tensor, x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    mask = x == unreduced(out, x, dim, keepdim)
    return keep(mask, tangents[0]).sum(dims_of(x, dim), keepdim) / mask.sum(
        dims_of(x, dim), keepdim
    )


@vjp_of(aten.max, aten.min, aten.median, aten.nanmedian)
def _(g: Tensor, out: Tensor, x: Tensor) -> list[Tensor]:
    mask = equals(x, out)
    return [g / mask.sum() * mask]


@jvp_of(aten.max, aten.min, aten.median, aten.nanmedian)
def _(tangents: tuple[Tensor], out: Tensor, x: Tensor) -> Tensor:
    mask = equals(x, out)
    return keep(mask, tangents[0]).sum() / mask.sum()


@vjp_of(aten.aminmax)
def _(g: Any, outs: Any, x: Tensor, dim: int | None, keepdim: bool) -> list[Tensor]:
    terms = [
        share(
            unreduced(c, x, dim, keepdim),
            equals(x, unreduced(out, x, dim, keepdim)),
            dims_of(x, dim),
        )
        for c, out in zip(g, outs, strict=True)
        if c is not None
    ]
    return [sum(terms[1:], terms[0])]


along_dims(aten.amax, aten.amin)
for op in (aten.amax.default, aten.amin.default):
    vmap_of(op)(shifted(op, "dim"))
vmap_of(aten.max)(per_sample(aten.amax))
vmap_of(aten.min)(per_sample(aten.amin))
vmap_of(aten.median)(lambda x: aten.median.dim(as_vectors(x), 1)[0])
vmap_of(aten.nanmedian)(lambda x: aten.nanmedian.dim(as_vectors(x), 1)[0])


@vmap_of(aten.aminmax)
def _(x: Tensor, dim: int | None, keepdim: bool) -> tuple[Tensor, Tensor]:
    low, high = (
        aten.aminmax(as_vectors(x), dim=1)
        if dim is None
        else shifted(aten.aminmax, "dim")(x, dim, keepdim)
    )
    ones = [1] * (x.dim() - 1) if dim is None and keepdim else []
    return (low.reshape(-1, *ones), high.reshape(-1, *ones)) if ones else (low, high)


# ----- selections: the values are the input at the indices ---------------------------------------


def selection(op: OpOverload) -> None:
    """State the rules of ``(x, …, dim, …) -> (x.gather(dim, indices), indices)``."""
    names = [a.name for a in op._schema.arguments]
    dim_at, keepdim_at = names.index("dim"), names.index("keepdim") if "keepdim" in names else None

    def place(args: Any) -> tuple[int, bool]:
        """Return the dimension, and whether it is absent from the outputs."""
        return args[dim_at], keepdim_at is not None and not args[keepdim_at] and args[0].dim() > 0

    def vjp(g: Any, outs: Any, *args: Any) -> list[Tensor]:
        dim, lacking = place(args)
        values, indices = (v.unsqueeze(dim) if lacking else v for v in (g[0], outs[1]))
        return [values.new_zeros(args[0].shape).scatter(dim, indices, values)]

    def jvp(tangents: Any, outs: Any, *args: Any) -> tuple[Tensor, None]:
        dim, lacking = place(args)
        if lacking:
            return tangents[0].gather(dim, outs[1].unsqueeze(dim)).squeeze(dim), None
        return tangents[0].gather(dim, outs[1]), None

    vjp_of(op, diff_outputs=(0,))(vjp)
    jvp_of(op)(jvp)
    vmap_of(op)(shifted(op, "dim"))


for op in (
    *(aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default),
    aten.kthvalue.default,
    *(aten.topk.default, aten.sort.default, aten.sort.stable),
):
    selection(op)


@vjp_of(aten.logsumexp)
def _(g: Tensor, out: Tensor, x: Tensor, dim: Any, keepdim: bool) -> list[Tensor]:
    return [unreduced(g, x, dim, keepdim) * (x - unreduced(out, x, dim, keepdim)).exp().conj()]


vmap_of(aten.logsumexp)(shifted(aten.logsumexp, "dim"))
along_dims(aten.logsumexp)


# ----- no derivative -----------------------------------------------------------------------------

nondiff(
    aten.all.dim,
    aten.all.dims,
    aten.any.dim,
    aten.any.dims,
    aten.count_nonzero.dim_IntList,
    batch=lambda op: shifted(op, "dim"),
)
nondiff(aten.all, batch=lambda op: per_sample(aten.all.dims))
nondiff(aten.any, batch=lambda op: per_sample(aten.any.dims))
nondiff(aten._is_all_true, batch=lambda op: per_sample(aten.all.dims))
nondiff(aten._is_any_true, batch=lambda op: per_sample(aten.any.dims))


def count_nonzero(x: Tensor, dim: int | None) -> Tensor:
    return (
        aten.count_nonzero(as_vectors(x), 1)
        if dim is None
        else shifted(aten.count_nonzero, "dim")(x, dim)
    )


def arg_extreme(op: OpOverload) -> Callable[..., Tensor]:
    """Return the vmap rule of argmax: without a dimension, the index into the flattened sample."""

    def batch(x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
        if dim is not None:
            return shifted(op, "dim")(x, dim, keepdim)
        return op(as_vectors(x), 1).reshape(x.shape[0], *[1] * (x.dim() - 1 if keepdim else 0))

    return batch


nondiff(aten.count_nonzero, batch=lambda op: count_nonzero)
nondiff(aten.argmax, aten.argmin, batch=arg_extreme)

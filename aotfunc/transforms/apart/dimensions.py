"""Follow the batch through ops along other dimensions: slices, scans, reductions, look-ups."""

from __future__ import annotations

from typing import Any

import torch

from .parts import Mixed, OpCall, Part, broadcast_part, part_rule, spans


@part_rule(
    "slice.Tensor split.Tensor split_with_sizes unfold cat slice_scatter flip roll rot90 "
    "linalg_cross glu glu_backward unsafe_split.Tensor"
)
@part_rule("narrow_copy slice_copy.Tensor split_copy.Tensor split_with_sizes_copy unfold_copy")
@part_rule("cumsum cumprod logcumsumexp cummax cummin sort sort.stable topk gather")
@part_rule("_safe_softmax _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data")
@part_rule("scatter.src scatter.value scatter_add scatter_reduce.two _fft_r2c _fft_c2c _fft_c2r")
def along(c: OpCall) -> Any:
    """Keep the batch in the results of an op along other dimensions."""
    sig, part = c.alike()
    part.without(
        c.dims(sig.ndim, next(name for name in ("dim", "dims", "dimension") if name in c.arg))
    )
    return c.each(part)


@part_rule("slice_backward")
def slice_backward(c: OpCall) -> Any:
    part = along(c)
    c.scaled("input_sizes", part.dim, part.each)
    return part


@part_rule("unfold_backward")
def unfold_backward(c: OpCall) -> Any:
    sig, part = c.alike()
    part.without([*c.dims(sig.ndim - 1), sig.ndim - 1])
    c.scaled("input_sizes", part.dim, part.each)
    return part


@part_rule("constant_pad_nd")
def padded(c: OpCall) -> Any:
    sig, part = c.alike()
    part.without(range(sig.ndim - len(c.arg["pad"]) // 2, sig.ndim))
    return part


@part_rule("select_scatter")
def select_scatter(c: OpCall) -> Any:
    (sig, part), (_, src) = c.tensors
    if part is None or src != part.without(c.dims(sig.ndim)):
        raise Mixed
    return part


@part_rule("diagonal_scatter")
def diagonal_scatter(c: OpCall) -> Any:
    (sig, part), (_, src) = c.tensors
    if part is None or src != part.without([c.arg[d] % sig.ndim for d in ("dim1", "dim2")]):
        raise Mixed
    return part


@part_rule("stack")
def stacked(c: OpCall) -> Any:
    _, part = c.alike()
    return part.to(part.dim + (c.arg["dim"] % c.val.ndim <= part.dim))


@part_rule("sum.dim_IntList nansum mean.dim prod.dim_int logsumexp count_nonzero.dim_IntList")
@part_rule("amax amin aminmax argmax argmin max.dim min.dim any.dim any.dims all.dim all.dims")
@part_rule("var.correction std.correction var_mean.correction std_mean.correction")
@part_rule("median.dim nanmedian.dim kthvalue mode linalg_vector_norm norm.ScalarOpt_dim")
def reduced(c: OpCall) -> Any:
    sig, part = c.alike()
    less = part.without(c.dims(sig.ndim))
    return c.each(part if c.arg.get("keepdim") else less)


@part_rule("embedding")
def embedded(c: OpCall) -> Any:
    return c.only("indices")[1]


@part_rule("searchsorted.Tensor")
def searched(c: OpCall) -> Any:
    (edges, at), (sig, part) = c.tensors[:2]
    if c.arg["sorter"] is not None or (at is not None and (at != part or edges.ndim != sig.ndim)):
        raise Mixed
    if part is None or (edges.ndim > 1 and (at is None or part.dim == sig.ndim - 1)):
        raise Mixed
    return part


@part_rule("index_select")
def rows_selected(c: OpCall) -> Any:
    (sig, part), (_, index) = c.tensors
    dims = c.dims(sig.ndim)
    if part is None:
        return index.to(dims[0])  # type: ignore[union-attr]
    part.without(dims)
    return c.only("self")[1]


@part_rule("index_add index_copy index_reduce index_fill.int_Scalar")
def rows_replaced(c: OpCall) -> Any:
    sig, part = c.of("self")
    source = c.of("source") if "source" in c.arg else (sig, part)
    if (
        part is None
        or source[1] != part
        or source[0].ndim != sig.ndim
        or c.of("index")[1] is not None
    ):
        raise Mixed
    part.without(c.dims(sig.ndim))
    return part


@part_rule("index.Tensor")
def index_tensor(c: OpCall) -> Any:
    return entries_of(c)[0]


@part_rule("index_put")
def put(c: OpCall) -> Any:
    _, part = c.of("self")
    values, theirs = c.of("values")
    at, rank = entries_of(c)
    back = rank - at.dim
    fits = (
        not spans(values, back) if theirs is None else theirs == Part(values.ndim - back, at.each)
    )
    if part is None or part.number or not fits:
        raise Mixed
    return part


def entries_of(c: OpCall) -> tuple[Part, int]:
    """Return the part of the entries of ``x[indices]``, and the number of their dimensions."""
    sig, part = c.of("self")
    indices = {
        d: (i.meta["val"], c.walk.parts[i])
        for d, i in enumerate(c.arg["indices"])
        if i is not None
    }
    if any(i.dtype in (torch.bool, torch.uint8) for i, _ in indices.values()) or (
        part is not None and part.number
    ):
        raise Mixed
    wide = max(i.ndim for i, _ in indices.values())
    together = len(indices) == max(indices) - min(indices) + 1
    first = min(indices) if together else 0  # dimensions of the indices
    rank = sig.ndim - len(indices) + wide
    if part is not None and part.dim not in indices:
        if any(p is not None for _, p in indices.values()):
            raise Mixed
        left = part.without(list(indices))
        return left if left.dim < first else left.to(left.dim + wide), rank
    for d, (_, p) in indices.items():  # each sample reads its own entry, which its number says
        own = part is not None and part.dim == d
        if own != (p is not None and p.number) or (own and part != Part(d)):
            raise Mixed
    at = broadcast_part(list(indices.values()), wide)
    return Part(at.dim + first, at.each), rank

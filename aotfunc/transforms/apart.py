"""Where the results of an op hold the batch, for each op that treats the samples of a batch alike
and apart from one another: pointwise ops with the batch aligned, reductions and views that leave
its dimension alone, products of matrices whose rows, columns or batch it is, and so on. What is
not written down here is not known to do so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from ..trace.shapes.rules import LEFT_OUT, UNTAGGED, Unsure, broadcast
from ..trace.shapes.sig import Facts, Sig
from .parts import FACTORIES, RULES, Call, Mixed, Part, Rule, aligned, rule, spans

aten = torch.ops.aten

#: ops that take the numbers of the samples
OF_NUMBERS = {
    aten.view.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.index.Tensor,
    aten.index_put.default,
}


@cache
def rule_for(op: OpOverload) -> Rule | None:
    """The rule written for an op, or that of pointwise ones."""
    if op in RULES:
        return RULES[op]
    facts, name = Facts(op), op._schema.name.removeprefix("aten::")
    tagged = torch.Tag.pointwise in op.tags or name in UNTAGGED
    return (
        pointwise if tagged and facts.pure and not facts.random and name not in LEFT_OUT else None
    )


# ----- pointwise ---------------------------------------------------------------------------------


@rule("clone _to_copy zeros_like ones_like full_like fill.Scalar floor_divide _prelu_kernel")
def pointwise(c: Call) -> Any:
    try:
        shape = broadcast(*[sig.shape for sig, _ in c.tensors])
    except Unsure:
        raise Mixed from None
    for val in c.val if isinstance(c.val, tuple) else (c.val,):
        if val.__class__ is not Sig or val.shape != shape:
            raise Mixed
    return c.each(aligned(c.tensors, len(shape)))


@rule("mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits")
@rule(
    "mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward"
)
def losses(c: Call) -> Any:
    if c.arg["reduction"]:
        raise Mixed
    return pointwise(c)


# ----- views -------------------------------------------------------------------------------------


@rule("view _unsafe_view reshape")
def reshaped(c: Call) -> Any:
    sig, part = c.alike()
    shape, size = c.val.shape, c.walk.size
    before = math.prod(sig.shape[: part.dim])
    if 0 in shape:
        raise Mixed
    for d in range(len(shape)):
        if math.prod(shape[:d]) == before and shape[d] % size == 0:
            each = shape[d] // size
            if part.number and each != 1:
                raise Mixed
            c.scaled("shape" if "shape" in c.arg else "size", d, each)
            return Part(d, each, part.number)
    raise Mixed


@rule("expand")
def expanded(c: Call) -> Any:
    sig, part = c.alike()
    d = part.dim + c.val.ndim - sig.ndim
    c.scaled("size", d, part.each)
    return part.to(d)


@rule("expand", table=FACTORIES)
def repeated(c: Call) -> Any:
    sig, _ = c.tensors[0]
    lead = c.val.ndim - sig.ndim
    return made(c, "size", [d for d in range(c.val.ndim) if d < lead or sig.shape[d - lead] == 1])


@rule("new_zeros new_ones new_full")
@rule("full zeros ones new_zeros new_ones new_full", table=FACTORIES)
def filled(c: Call) -> Any:
    return made(c, "size", range(c.val.ndim))


def made(c: Call, name: str, dims: Sequence[int]) -> Part | None:
    """The first of these dimensions whose length is the size (or a multiple) is taken for the
    batch: if it is none, the ops that read the value will not find it aligned."""
    for d in dims:
        each, left = divmod(c.val.shape[d], c.walk.size)
        if not left and (each == 1 or (each and c.walk.multiples)):
            c.scaled(name, d, each)
            return Part(d, each)
    return None


@rule("arange", table=FACTORIES)
def numbered(c: Call) -> Any:
    if c.arg["end"] != c.walk.size or c.val.dtype is not torch.int64:
        return None
    c.scaled("end", None, 1)
    return Part(0, 1, True)


@rule("permute")
def permuted(c: Call) -> Any:
    sig, part = c.alike()
    return part.to(c.dims(sig.ndim, "dims").index(part.dim))


@rule("t transpose.int")
def transposed(c: Call) -> Any:
    sig, part = c.alike()
    if sig.ndim < 2:
        return part
    i, j = (c.arg["dim0"] % sig.ndim, c.arg["dim1"] % sig.ndim) if "dim0" in c.arg else (0, 1)
    return part.to({i: j, j: i}.get(part.dim, part.dim))


@rule("unsqueeze")
def unsqueezed(c: Call) -> Any:
    sig, part = c.alike()
    return part.to(part.dim + (c.arg["dim"] % (sig.ndim + 1) <= part.dim))


@rule("squeeze squeeze.dim squeeze.dims")
def squeezed(c: Call) -> Any:
    sig, part = c.alike()
    dims = c.dims(sig.ndim) if "dim" in c.arg else range(sig.ndim)
    return part.without([d for d in dims if sig.shape[d] == 1])


@rule("select.int unbind.int")
def selected(c: Call) -> Any:
    sig, part = c.alike()
    return c.each(part.without(c.dims(sig.ndim)))


@rule("diagonal")
def diagonal(c: Call) -> Any:
    sig, part = c.alike()
    return part.without([c.arg["dim1"] % sig.ndim, c.arg["dim2"] % sig.ndim])


@rule("select_backward")
def select_backward(c: Call) -> Any:
    _, part = c.alike()
    part = part.to(part.dim + (c.arg["dim"] % c.val.ndim <= part.dim))
    c.scaled("input_sizes", part.dim, part.each)
    return part


@rule("slice_backward")
def slice_backward(c: Call) -> Any:
    part = along(c)
    c.scaled("input_sizes", part.dim, part.each)
    return part


@rule("view_as_real view_as_complex")
def viewed(c: Call) -> Any:
    return c.alike()[1]


# ----- along other dimensions --------------------------------------------------------------------


@rule("slice.Tensor split.Tensor split_with_sizes unfold cat slice_scatter flip roll linalg_cross")
@rule("cumsum cumprod logcumsumexp cummax cummin sort sort.stable topk gather")
@rule("_safe_softmax _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data")
@rule("scatter.src scatter.value scatter_add scatter_reduce.two _fft_r2c _fft_c2c _fft_c2r")
def along(c: Call) -> Any:
    """One result or several, which have the dimensions of the arguments."""
    sig, part = c.alike()
    part.without(
        c.dims(sig.ndim, next(name for name in ("dim", "dims", "dimension") if name in c.arg))
    )
    return c.each(part)


@rule("constant_pad_nd")
def padded(c: Call) -> Any:
    sig, part = c.alike()
    part.without(range(sig.ndim - len(c.arg["pad"]) // 2, sig.ndim))
    return part


@rule("select_scatter")
def select_scatter(c: Call) -> Any:
    (sig, part), (_, src) = c.tensors
    if part is None or src != part.without(c.dims(sig.ndim)):
        raise Mixed
    return part


@rule("stack")
def stacked(c: Call) -> Any:
    _, part = c.alike()
    return part.to(part.dim + (c.arg["dim"] % c.val.ndim <= part.dim))


@rule("sum.dim_IntList nansum mean.dim prod.dim_int logsumexp count_nonzero.dim_IntList")
@rule("amax amin aminmax argmax argmin max.dim min.dim any.dim any.dims all.dim all.dims")
@rule("var.correction std.correction var_mean.correction std_mean.correction")
@rule("median.dim nanmedian.dim kthvalue mode linalg_vector_norm norm.ScalarOpt_dim")
def reduced(c: Call) -> Any:
    sig, part = c.alike()
    less = part.without(c.dims(sig.ndim))
    return c.each(part if c.arg.get("keepdim") else less)


# ----- matrices ----------------------------------------------------------------------------------


@rule("mm bmm")
def multiplied(c: Call) -> Any:
    return product(*c.tensors)


@rule("addmm baddbmm")
def added(c: Call) -> Any:
    bias, left, right = c.tensors
    return aligned([bias, (c.val, product(left, right))], c.val.ndim)


def product(left: tuple[Sig, Part | None], right: tuple[Sig, Part | None]) -> Part:
    """The part of a product of matrices, or of a batch of such: rows of the left, columns of the
    right, or its own."""
    (sig, a), (_, b) = left, right
    rows = sig.ndim - 2
    if a is not None and b is None and a.dim == rows:
        return a
    if b is not None and a is None and b.dim == rows + 1:
        return b
    if a is not None and a == b and a.dim < rows:
        return a
    raise Mixed


@rule("mv")
def applied(c: Call) -> Any:
    _, part = c.only("self")
    part.without([1])
    return part


@rule(
    "triu tril linalg_inv_ex _linalg_det _linalg_slogdet linalg_lu_factor_ex linalg_cholesky_ex "
    "linalg_solve_triangular"
)
@rule(
    "_linalg_eigh linalg_eig linalg_qr linalg_lu _linalg_svd linalg_matrix_exp _linalg_solve_ex "
    "cholesky_solve cholesky"
)
@rule("cholesky_inverse triangular_solve")
def matrices(c: Call) -> Any:
    """Of batches of matrices."""
    sig, part = c.alike()
    if part.dim or sig.ndim < 3:
        raise Mixed
    return c.each(part)


@rule("_linalg_check_errors")
def checked(c: Call) -> Any:
    return None


# ----- lookups -----------------------------------------------------------------------------------


@rule("embedding")
def embedded(c: Call) -> Any:
    return c.only("indices")[1]


@rule("index_select")
def rows_selected(c: Call) -> Any:
    (sig, part), (_, index) = c.tensors
    dims = c.dims(sig.ndim)
    if part is None:
        return index.to(dims[0])  # type: ignore[union-attr]
    part.without(dims)
    return c.only("self")[1]


@rule("index_add index_copy index_fill.int_Scalar")
def rows_replaced(c: Call) -> Any:
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


@rule("index.Tensor")
def indexed(c: Call) -> Any:
    return lookup(c)[0]


@rule("index_put")
def put(c: Call) -> Any:
    _, part = c.of("self")
    values, theirs = c.of("values")
    at, rank = lookup(c)
    back = rank - at.dim
    fits = (
        not spans(values, back) if theirs is None else theirs == Part(values.ndim - back, at.each)
    )
    if part is None or part.number or not fits:
        raise Mixed
    return part


def lookup(c: Call) -> tuple[Part, int]:
    """Where the entries of ``x[indices]`` hold the batch, and how many dimensions they have."""
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
    first = min(indices) if together else 0  # of the dimensions that the indices have
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
    at = aligned(list(indices.values()), wide)
    return Part(at.dim + first, at.each), rank


# ----- networks ----------------------------------------------------------------------------------


@rule("nll_loss_forward nll_loss_backward")
def nll_loss(c: Call) -> Any:
    names = [name for name in ("self", "target", "grad_output") if name in c.arg]
    part = c.of("self")[1]
    if (
        c.arg["reduction"]
        or c.arg["weight"] is not None
        or any(c.of(name)[1] != Part(0) for name in names)
    ):
        raise Mixed
    return [part, None] if isinstance(c.val, tuple) else part  # the total weight is that of a mean


@rule(
    "max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d avg_pool2d_backward "
    "_adaptive_avg_pool2d"
)
@rule("max_pool3d_with_indices max_pool3d_with_indices_backward avg_pool3d avg_pool3d_backward")
@rule("_adaptive_avg_pool2d_backward")
def pooled(c: Call) -> Any:
    return in_front(c, c.alike()[1])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention_for_cpu_backward"
)
def attention(c: Call) -> Any:
    part = c.tensors[0][1]
    if any(p != part for _, p in c.tensors):
        raise Mixed
    return in_front(c, part)


@rule("native_group_norm")
def group_norm(c: Call) -> Any:
    _, part = c.only("input")
    c.scaled("N", None, part.each)
    return in_front(c, part)


@rule("native_group_norm_backward")
def group_norm_backward(c: Call) -> Any:
    part = c.of("input")[1]
    shared = c.of("weight")[1] is not None or any(c.arg["output_mask"][1:])
    if (
        part is None
        or part.dim
        or shared
        or any(c.of(name)[1] != part for name in ("grad_out", "mean", "rstd"))
    ):
        raise Mixed
    c.scaled("N", None, part.each)
    return [part, None, None]


def in_front(c: Call, part: Part | None) -> Any:
    if part is None or part.dim:
        raise Mixed
    return c.each(part)


@rule("native_layer_norm")
def layer_norm(c: Call) -> Any:
    sig, part = c.only("input")
    part.without(range(sig.ndim - len(c.arg["normalized_shape"]), sig.ndim))
    return c.each(part)


@rule("native_layer_norm_backward")
def layer_norm_backward(c: Call) -> Any:
    sig, part = c.of("input")
    given = [c.of(name)[1] for name in ("grad_out", "mean", "rstd")]
    shared = [c.of(name)[1] for name in ("weight", "bias")]
    if (
        part is None
        or any(p != part for p in given)
        or shared != [None, None]
        or any(c.arg["output_mask"][1:])
    ):
        raise Mixed
    part.without(range(sig.ndim - len(c.arg["normalized_shape"]), sig.ndim))
    return [part, None, None]


@rule("convolution")
def convolved(c: Call) -> Any:
    if c.of("weight")[1] is None:
        return in_front(c, c.only("input")[1])
    among_channels(c, "input")
    return Part(1, c.val.shape[1] // c.walk.size)


@rule("convolution_backward")
def convolution_backward(c: Call) -> Any:
    (_, g), (_, x), (_, weight) = c.of("grad_output"), c.of("input"), c.of("weight")
    if weight is None:
        if g is None or g != x or g.dim or any(c.arg["output_mask"][1:]):
            raise Mixed
        return [g, None, None]
    among_channels(c, "input", "grad_output")
    bias = None
    if c.arg["output_mask"][2]:
        bias = Part(0, c.arg["bias_sizes"][0] // c.walk.size)
        c.scaled("bias_sizes", 0, bias.each)
    return [
        p if yes else None for p, yes in zip((x, weight, bias), c.arg["output_mask"], strict=True)
    ]


def among_channels(c: Call, *images: str) -> None:
    """Each sample has groups of channels, and weights, of its own."""
    groups, left = divmod(c.arg["groups"], c.walk.size)
    apart = all((p := c.of(name)[1]) is not None and p.dim == 1 for name in images)
    vectors = [c.of(name)[1] for name in ("weight", "bias") if c.arg.get(name) is not None]
    if left or not groups or not apart or any(p is None or p.dim for p in vectors):
        raise Mixed
    c.scaled("groups", None, groups)

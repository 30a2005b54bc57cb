"""Follow the batch through views, which move its dimension, and factories, which may make one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .parts import FACTORIES, Mixed, OpCall, Part, part_rule


@part_rule("view _unsafe_view reshape view_copy")
def reshaped(c: OpCall) -> Any:
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


@part_rule("expand")
def expanded(c: OpCall) -> Any:
    sig, part = c.alike()
    d = part.dim + c.val.ndim - sig.ndim
    c.scaled("size", d, part.each)
    return part.to(d)


@part_rule("expand", table=FACTORIES)
def repeated(c: OpCall) -> Any:
    sig, _ = c.tensors[0]
    lead = c.val.ndim - sig.ndim
    return made(c, "size", [d for d in range(c.val.ndim) if d < lead or sig.shape[d - lead] == 1])


@part_rule("new_zeros new_ones new_full new_empty")
@part_rule("full zeros ones new_zeros new_ones new_full new_empty", table=FACTORIES)
def filled(c: OpCall) -> Any:
    return made(c, "size", range(c.val.ndim))


def made(c: OpCall, name: str, dims: Sequence[int]) -> Part | None:
    """Take the first of these dimensions whose length is the size (or a multiple) for the batch.
    If it is not, the readers of the value will not find it aligned."""
    for d in dims:
        each, left = divmod(c.val.shape[d], c.walk.size)
        if not left and (each == 1 or (each and c.walk.multiples)):
            c.scaled(name, d, each)
            return Part(d, each)
    return None


@part_rule("arange", table=FACTORIES)
def numbered(c: OpCall) -> Any:
    if c.arg["end"] != c.walk.size or c.val.dtype is not torch.int64:
        return None
    c.scaled("end", None, 1)
    return Part(0, 1, True)


@part_rule("permute permute_copy")
def permuted(c: OpCall) -> Any:
    sig, part = c.alike()
    return part.to(c.dims(sig.ndim, "dims").index(part.dim))


@part_rule("t transpose.int t_copy transpose_copy.int")
def transposed(c: OpCall) -> Any:
    sig, part = c.alike()
    if sig.ndim < 2:
        return part
    i, j = (c.arg["dim0"] % sig.ndim, c.arg["dim1"] % sig.ndim) if "dim0" in c.arg else (0, 1)
    return part.to({i: j, j: i}.get(part.dim, part.dim))


@part_rule("unsqueeze unsqueeze_copy")
def unsqueezed(c: OpCall) -> Any:
    sig, part = c.alike()
    return part.to(part.dim + (c.arg["dim"] % (sig.ndim + 1) <= part.dim))


@part_rule("squeeze squeeze.dim squeeze.dims squeeze_copy squeeze_copy.dim squeeze_copy.dims")
def squeezed(c: OpCall) -> Any:
    sig, part = c.alike()
    dims = c.dims(sig.ndim) if "dim" in c.arg else range(sig.ndim)
    return part.without([d for d in dims if sig.shape[d] == 1])


@part_rule("select.int unbind.int select_copy.int unbind_copy.int")
def selected(c: OpCall) -> Any:
    sig, part = c.alike()
    return c.each(part.without(c.dims(sig.ndim)))


@part_rule("diagonal diagonal_copy")
def diagonal(c: OpCall) -> Any:
    sig, part = c.alike()
    return part.without([c.arg["dim1"] % sig.ndim, c.arg["dim2"] % sig.ndim])


@part_rule("diag_embed")
def diag_embed(c: OpCall) -> Any:
    sig, part = c.alike()
    part.without([sig.ndim - 1])
    new = [c.arg[d] % c.val.ndim for d in ("dim1", "dim2")]
    return part.to([d for d in range(c.val.ndim) if d not in new][part.dim])


@part_rule("repeat")
def tiled(c: OpCall) -> Any:
    sig, part = c.alike()
    d = part.dim + c.val.ndim - sig.ndim
    if c.arg["repeats"][d] != 1:
        raise Mixed
    return part.to(d)


@part_rule("select_backward")
def select_backward(c: OpCall) -> Any:
    _, part = c.alike()
    part = part.to(part.dim + (c.arg["dim"] % c.val.ndim <= part.dim))
    c.scaled("input_sizes", part.dim, part.each)
    return part


@part_rule("view_as_real view_as_complex")
def viewed(c: OpCall) -> Any:
    return c.alike()[1]

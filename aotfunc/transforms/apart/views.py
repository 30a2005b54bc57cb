"""Views move the batch with the dimension that holds it; factories may make one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .parts import FACTORIES, Call, Mixed, Part, rule


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


@rule("view_as_real view_as_complex")
def viewed(c: Call) -> Any:
    return c.alike()[1]

"""Ops between DTensors and what each process holds of them.

A value of a graph is the whole tensor, whatever part of it each process holds, so moving the parts
is the identity and its derivative moves the cotangent back. A layout is a text that
:mod:`~aotfunc.trace.dtensors` knows: a mesh of processes and a placement for each of its
dimensions.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor

from .schema import op_of_graphs
from .table import linear

#: a namespace of its own: its ops are collectives, see ``graph.acts``
_library = torch.library.Library("aotfunc_layout", "DEF")


def refuse_transforms(*args: Any) -> NoReturn:
    raise RuntimeError(
        "torch.func's transforms and forward AD do not go through a compiled function of DTensors"
    )


defined = functools.partial(op_of_graphs, _library, refuse_transforms)


def meta_strided(x: Tensor, shape: Any, stride: Any, *_: Any) -> Tensor:
    return x.new_empty_strided(shape, stride)


#: the tensor in another layout; its cotangent gets the layout ``back``
redistribute = defined(
    "redistribute(Tensor x, str to, str back) -> Tensor", lambda x, to, back: torch.empty_like(x)
)
#: the whole of which each process gives a part
from_local = defined(
    "from_local(Tensor x, int[] shape, int[] stride, str to, str back) -> Tensor", meta_strided
)
#: the part that this process holds
to_local = defined(
    "to_local(Tensor x, int[] shape, int[] stride, str of, str back) -> Tensor", meta_strided
)

#: The whole for each process, in the dtype ``dtype``, of what lies as ``back`` says. The graph has
#: one for each tensor of a ``call``; all of a call are one collective. ``factor``: that of its
#: cotangent. ``again``: the backward gathers it again instead of keeping it
gather = defined(
    "gather(Tensor x, int[] shape, int[] stride, ScalarType dtype, ScalarType? reduce, str of, "
    "str sums, str back, int call, float factor, bool again) -> Tensor",
    lambda x, shape, stride, dtype, *_: x.new_empty_strided(shape, stride, dtype=dtype),
)
#: The cotangent of what ``gather`` takes: the cotangents of all processes are added up or averaged
#: as ``sums`` says, in the dtype ``reduce``
scatter = defined(
    "scatter(Tensor g, int[] shape, int[] stride, ScalarType dtype, ScalarType? reduce, str of, "
    "str sums, str back, int call) -> Tensor",
    lambda g, shape, stride, dtype, *_: g.new_empty_strided(shape, stride, dtype=dtype),
)


def summed_layout(layout: str) -> str:
    """Return the layout in which cotangents arrive: parts that are to be added up are added up."""
    mesh, *placements = layout.split(";")
    return ";".join([mesh, *["R" if p.startswith("P") else p for p in placements]])


linear(redistribute, lambda g, x, to, back: redistribute(g, back, summed_layout(to)))
linear(
    from_local, lambda g, x, shape, stride, to, back: to_local(g, x.shape, x.stride(), back, to)
)
linear(
    to_local,
    lambda g, x, shape, stride, of, back: from_local(
        g, x.shape, x.stride(), back, summed_layout(back)
    ),
)


def back_to_parts(g: Tensor, x: Tensor, shape: Any, stride: Any, dtype: Any, *how: Any) -> Tensor:
    *how, factor, _ = how  # type: ignore[assignment]
    parts = scatter(g, x.shape, x.stride(), x.dtype, *how)
    return parts if factor == 1 else parts * factor


linear(gather, back_to_parts)
linear(
    scatter,
    lambda c, g, shape, stride, dtype, *how: gather(
        c, g.shape, g.stride(), g.dtype, *how, 1.0, False
    ),
)

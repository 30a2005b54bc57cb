"""Estimate what a value costs: bytes to keep it, time to compute it again.

Time is counted in *bytes of memory traffic*: an op takes as long as moving so many bytes takes. A
price of 1 in the cut then means that a byte kept from forward to backward is worth the moving of
one byte, whatever the machine."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ..trace.shapes.sig import reach
from .ops import is_symbol, is_view


class Cost(Protocol):
    """What the partitioner asks: the time of running a node once more, in bytes of traffic."""

    def time(self, n: Node) -> float: ...


def hint(size: Any) -> int:
    """Return a size as a number, symbols as at capture. It steers choices only."""
    if size.__class__ is int:
        return size
    if isinstance(size, torch.SymInt | torch.SymFloat):
        return int(size.node.hint) if size.node.has_hint() else 1
    return int(size)


def shape_of(val: Any) -> tuple[int, ...]:
    """Return the shape in numbers."""
    return tuple([d if d.__class__ is int else hint(d) for d in val.shape])


def strides_of(val: Any) -> list[int] | None:
    """Return the strides in numbers; None of a layout without."""
    try:
        strides = val.stride
        strides = strides() if callable(strides) else strides
        return [s if s.__class__ is int else hint(s) for s in strides]
    except RuntimeError:
        return None


def nbytes(val: Any) -> int:
    """Return the bytes that a value keeps alive: tensors (or signatures with ``shape``, ``stride``
    and ``dtype``), numbers, tuples. Expanded dimensions count once."""
    if isinstance(val, (tuple, list)):
        return sum([nbytes(v) for v in val])
    if isinstance(val, Tensor) and not val._has_symbolic_sizes_strides and is_dense(val):
        return val.nbytes
    dtype = getattr(val, "dtype", None)
    if dtype is None:
        return 0 if val is None else 8
    shape, strides = shape_of(val), strides_of(val)
    return (math.prod(shape) if strides is None else reach(shape, strides)) * dtype.itemsize


def is_dense(x: Tensor) -> bool:
    """Return whether a tensor takes the memory of its elements, one after another."""
    return x.layout is torch.strided and x.is_contiguous()


class Sizes(dict[Node, int]):
    """The bytes that the values of nodes keep alive, each counted once, when it is asked for."""

    def __missing__(self, n: Node) -> int:
        self[n] = size = nbytes(n.meta.get("val"))
        return size


# ----- how long ----------------------------------------------------------------------------------

#: memory movers that a fusing backend folds into their readers, though they are not tagged as
#: pointwise
_FOLDS = frozenset(
    """
    _to_copy cat constant_pad_nd convert_element_type copy embedding expand_copy fill flip fma
    full_like gather index index_select lift_fresh_copy masked_scatter repeat roll select_scatter
    slice_scatter stack tril triu
    """.split()
)
#: matrix products: where the left factor stands among the arguments
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "_int_mm": 0, "_scaled_mm": 0}
_PRODUCTS |= {"addmm": 1, "baddbmm": 1, "addbmm": 1, "addmv": 1, "_addmm_activation": 1}


def flops(n: Node) -> float:
    """Return the number of floating point operations of the ops that have many: products,
    convolutions, attention; 0 for all others."""
    if n.target.__class__ is not OpOverload:
        return 0.0
    name = n.target._opname

    def shape(i: int) -> Sequence[int]:
        return shape_of(n.args[i].meta["val"])  # type: ignore[union-attr]

    if name in _PRODUCTS:
        left = shape(_PRODUCTS[name])
        return 2.0 * math.prod(shape_of(n.meta["val"])) * left[-1]
    if name == "convolution":
        pixels = shape(0) if n.args[6] else shape_of(n.meta["val"])
        return 2.0 * math.prod(pixels) * math.prod(shape(1)[1:])
    if name == "convolution_backward":
        pixels = shape(1) if n.args[7] else shape(0)
        return 4.0 * math.prod(pixels) * math.prod(shape(2)[1:])
    if "attention" in name:
        backward = "backward" in name
        query, key = shape(int(backward)), shape(int(backward) + 1)
        return (10.0 if backward else 4.0) * math.prod(query) * key[-2]
    return 0.0


def moves(n: Node) -> bool:
    """Return whether the node reads and writes memory, as views and numbers do not."""
    free = n.op != "call_function" or n.target is operator.getitem
    return not (free or is_view(n) or is_symbol(n))


def traffic(n: Node) -> int:
    """Return the bytes that the node reads and writes where it runs by itself."""
    return sum([nbytes(i.meta.get("val")) for i in (n, *n.all_input_nodes)]) if moves(n) else 0


@dataclass(frozen=True)
class Roofline:
    """Time is the larger of arithmetic and traffic; what fuses costs a fraction of its output.

    ``intensity``: floating point operations that the machine does while it moves one byte.
    ``fused``: what is left of the traffic of an elementwise op that a backend fuses with its
    readers; 1 for a backend that does not fuse."""

    intensity: float = 64.0
    fused: float = 0.1

    def time(self, n: Node, sizes: Mapping[Node, int] | None = None) -> float:
        if not moves(n):
            return 0.0
        if bodies := getattr(n.target, "bodies", ()):  # control flow
            ops = [m for body in bodies for m in body.graph.nodes]
            steps = getattr(n.target, "length", 1)  # None for a loop without a bound
            return (1 if steps is None else steps) * sum(map(self.time, ops))
        sizes = Sizes() if sizes is None else sizes
        if self.fused < 1 and n.target.__class__ is OpOverload:
            if folds(n.target) or not n._input_nodes:
                return self.fused * sizes[n]
        read = sum([sizes[i] for i in n._input_nodes])
        return max(flops(n) / self.intensity, sizes[n] + read)


@cache
def folds(op: OpOverload) -> bool:
    """Return whether a fusing backend computes the op together with its readers."""
    return torch.Tag.pointwise in op.tags or op._opname in _FOLDS


@dataclass(frozen=True)
class Flops:
    """Products, convolutions and attention take time, nothing else does."""

    intensity: float = 64.0

    def time(self, n: Node) -> float:
        return flops(n) / self.intensity

"""Drop needless copies and overwritten writes, and count dimensions from the front."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

from ...trace.emit import Builder
from ...trace.node_views import storage_root
from ...trace.shapes.sig import Sig
from .table import aten, fit_or_none, has_signature, is_call, may_go, rewrite


@rewrite(aten.clone.default, aten._to_copy.default)
def _copy(b: Builder, val: Sig, x: Any, **_: Any) -> Any:
    if val.dtype.is_complex and storage_root(x).op == "placeholder":
        return None  # an input may be a lazy conjugate, which some ops refuse
    return x if x.meta["val"] is val else None


@rewrite(aten._conj_physical.default)
def _conj(b: Builder, val: Sig, x: Any) -> Any:
    return fit_or_none(val, x.args[0]) if is_call(x, aten._conj_physical.default) else None


@rewrite(aten.cat.default)
def _cat(b: Builder, val: Sig, xs: Any, dim: int = 0) -> Any:
    return xs[0] if len(xs) == 1 and has_signature(xs[0], val) else None


@rewrite(aten.select_scatter.default, aten.slice_scatter.default)
def _overwritten(b: Builder, val: Sig, x: Any, source: Any, *place: Any, **named: Any) -> Any:
    """Drop the first of two writes to the same place."""
    for op in (aten.select_scatter.default, aten.slice_scatter.default):
        if (
            is_call(x, op)
            and x.args[2:] == place
            and dict(x.kwargs) == named
            and x.args[1].meta["val"].shape == source.meta["val"].shape
            and may_go(x.args[1], x.args[0], source)
        ):
            return fit_or_none(val, b.call(op, x.args[0], source, *place, **named))
    return None


@rewrite(operator.getitem)
def _item(b: Builder, val: Any, x: Any, i: int) -> Any:
    return x[i] if isinstance(x, list | tuple) else None


# ----- dimensions --------------------------------------------------------------------------------


def _from_the_front(
    op: Any, b: Builder, val: Any, x: Any, dim: Any = None, *rest: Any, **named: Any
) -> Any:
    """Return the call with its dimensions not negative, so that equal calls are written alike."""
    rank = len(x.meta["val"].shape)
    if dim.__class__ is int:
        return b.node(op, (x, dim + rank, *rest), named, val) if dim < 0 < rank else None
    if dim and rank and min(dim) < 0:
        return b.node(op, (x, [d % rank for d in dim], *rest), named, val)
    return None


for op in (
    *(aten.sum.dim_IntList, aten.mean.dim, aten.var.correction, aten.amax.default),
    *(aten.amin.default, aten.logsumexp.default, aten.cumsum.default, aten.flip.default),
    *(aten.select.int, aten.slice.Tensor),
    *(aten.gather.default, aten._softmax.default, aten._log_softmax.default),
):
    rewrite(op)(partial(_from_the_front, op))

"""Leave out expansions and filled tensors among arguments of pointwise ops, which broadcast."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.fx import Node

from ...trace.emit import Builder, infer_val
from ...trace.shapes.sig import Sig
from .constants import EXPAND, FULL, VIEW, full, is_expanded, solid
from .table import aten, rewrite

WHERE = aten.where.self
#: ops of one IEEE operation an element: bits do not depend on how a kernel walks through memory
SINGLE = frozenset(
    (
        *(
            getattr(aten, name).Tensor
            for name in ["add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge"]
        ),
        *(aten.maximum.default, aten.minimum.default, aten.threshold_backward.default, WHERE),
    )
)
CLONE = aten.clone.default
SPREAD = frozenset((EXPAND, VIEW, aten.unsqueeze.default, FULL, CLONE))


def _pointwise(op: Any, b: Builder, val: Sig, *args: Any, **kwargs: Any) -> Any:
    constant = False
    for i, a in enumerate(args):
        if a.__class__ is Node and a.target in SPREAD:
            constant = constant or is_expanded(a)
            narrow = unspread(b, a, op in SINGLE)
            if narrow is None or (
                not narrow.meta["val"].shape and op is not WHERE and not one_dtype(args)
            ):
                continue
            slim = (*args[:i], narrow, *args[i + 1 :])
            # the kernel sees the same strides, so the bits are the same, unless this argument gave
            # the shape
            if infer_val(op, slim, kwargs) is val:
                return b.node(op, slim, kwargs, val)
    return solid(b, val, op, args, kwargs) if constant and op in SINGLE else None


for op in (*SINGLE, aten.tanh_backward.default, aten.sigmoid_backward.default):
    rewrite(op)(partial(_pointwise, op))


def unspread(b: Builder, a: Node, copies: bool) -> Node | None:
    """Return the value that ``a`` broadcasts, with ``copies`` also a dense copy; or None."""
    val = a.meta["val"]
    if a.target is FULL:
        return full(b, val, a.args[1], ()) if val.shape else None
    x = a.args[0] if a.target is CLONE and copies and a.args[0].target is EXPAND else a
    while x.target in SPREAD and x.target is not FULL and x.target is not CLONE:
        under = x.args[0]
        shape, wide = under.meta["val"].shape, x.meta["val"].shape
        if x.target is not EXPAND and wide != (1,) * (len(wide) - len(shape)) + shape:
            break
        x = under
    return x if x is not a else None


def one_dtype(args: tuple) -> bool:
    """Return whether tensors have one dtype; else 0-dim ones decide the result's."""
    return len({a.meta["val"].dtype for a in args if a.__class__ is Node}) == 1

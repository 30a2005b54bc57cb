"""What a backward reads through hooks on saved tensors, which may unpack anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from ..errors import AotfuncError
from .execute import strided_copy
from .guards.keys import TENSORS


def unpacked(values: list[Any], saved: Sequence[Node], name: str) -> bool:
    """Give the first of ``values`` the dtypes and strides of the nodes that were ``saved``, for
    which code was compiled; return whether any had others. Raises AotfuncError for a shape."""
    changed = False
    for k, (t, n) in enumerate(zip(values, saved, strict=False)):
        val = n.meta["val"]
        same_shape = t.shape == val.shape
        if t.__class__ not in TENSORS or (
            same_shape and t.dtype is val.dtype and t.stride() == val.stride
        ):
            continue
        if not same_shape:
            raise AotfuncError(
                f"a hook on saved tensors unpacked a tensor of shape {list(t.shape)} where "
                f"{name} has saved one of shape {list(val.shape)}: give back a tensor like that "
                "which was packed"
            )
        values[k], changed = strided_copy(t.to(val.dtype), val.stride), True
    return changed

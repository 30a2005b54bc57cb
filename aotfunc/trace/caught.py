"""Tell whether ``f`` would catch an error that an op raises for its values: in a transform that
runs once it has to be raised where the op is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..debug import is_users
from .handlers import guarded, swallows, swallows_as_decorator
from .tape import Tape
from .traced import current

aten = torch.ops.aten

#: ops that raise errors for values, by name
RAISING = (
    *("index", "index_put", "index_select", "index_add", "index_copy", "index_fill", "gather"),
    *("index_reduce", "scatter", "scatter_add", "scatter_reduce", "take", "put", "masked_scatter"),
    *("embedding", "embedding_renorm_", "_embedding_bag", "_embedding_bag_forward_only"),
    *("nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss"),
    *("multilabel_margin_loss_forward", "binary_cross_entropy", "_ctc_loss", "segment_reduce"),
    *("bincount", "histc", "repeat_interleave", "max_unpool2d", "max_unpool3d", "_assert_async"),
    *("div", "floor_divide", "remainder", "fmod"),
    *("multinomial", "bernoulli", "binomial", "normal", "poisson"),
    *("_linalg_eigh", "linalg_eig", "_linalg_eigvals", "_linalg_svd", "linalg_lstsq"),
    *("linalg_pinv", "linalg_lu_solve", "lu_unpack", "cholesky"),
)
RAISING_OPS = [
    op
    for name in RAISING
    for packet in (getattr(aten, name), getattr(aten, f"{name}_", None))
    for op in ([getattr(packet, o) for o in packet.overloads()] if packet else ())
    if not any(a.is_out for a in op._schema.arguments)
    if op.__name__ not in ("div.Tensor", "div.Scalar", "div_.Tensor", "div_.Scalar")  # to floats
]
#: those that do so for integers only
DIVISIONS = ("div", "floor_divide", "remainder", "fmod")


def raising_first(
    op: OpOverload, then: Callable | None, trace: Tape, *args: Any, **kwargs: Any
) -> Any:
    """Raise the error of an op for its values here, where the function would catch it and runs
    once; any other comes from the program. Go on with ``then``."""
    if trace.may_ask_constants and may_raise(op, args) and catches():
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

        def attempt(*values: Tensor) -> None:
            given = dict(zip(places, values, strict=True))
            # an op in place writes to a copy
            each = [given[i].clone() if i in given else apart(x) for i, x in enumerate(leaves)]
            again, named = tree_unflatten(each, spec)
            state = torch.default_generator.get_state()
            try:
                op(*again, **named)
            finally:
                torch.default_generator.set_state(state)

        raise_now(trace, attempt, [leaves[i] for i in places])
    return NotImplemented if then is None else then(trace, *args, **kwargs)


def apart(x: Any) -> Any:
    """Return an argument; for a generator one of the same state, so that ``x`` draws later."""
    return x.clone_state() if isinstance(x, torch.Generator) else x


def raise_if_caught(attempt: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    """Raise the error of ``attempt(*values)`` if the function, which runs once, would catch it."""
    trace = current()
    if trace is not None and trace.may_ask_constants and catches():
        raise_now(trace, attempt, tensors)


def raise_now(trace: Any, attempt: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    """Raise the error of ``attempt(*values)`` for the values of these tensors."""

    def passes(*values: Tensor) -> bool:
        attempt(*values)
        return True

    trace.answer(passes, tensors, "whether an op fails")


def may_raise(op: OpOverload, args: Sequence[Any]) -> bool:
    """Return whether the values may be an error: those of a division if it is of integers."""
    if not op.__name__.startswith(DIVISIONS):
        return True
    return not any(isinstance(a, Tensor) and a.dtype.is_floating_point for a in args)


def catches() -> bool:
    """Return whether an exception handler of the function that is being recorded is active."""
    frame: FrameType | None = sys._getframe(1)
    active = False
    while frame is not None:
        code = frame.f_code
        active = active or swallows_as_decorator(frame)
        users = is_users(code.co_filename)
        if active and code.co_name == "record_into" and not users:
            return True
        for start, stop, names in guarded(code) if users and not active else ():
            if start <= frame.f_lasti < stop and (names is None or swallows(frame, names)):
                active = True
        frame = frame.f_back
    return False

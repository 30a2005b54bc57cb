"""Stack traced numbers in ``torch.tensor([[c, -s], [s, c]])``, which PyTorch would read from
memory, check traced classes of ``one_hot``, which PyTorch would not, and tell a recording what
memory a tensor is made of.

As in eager no derivative goes through. The functions are exchanged while a recording is under way.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import debug
from ..debug import at
from ..errors import CaptureError
from .arrays import without_warning
from .decisions import asks_to_compute
from .nested import leaves
from .numbers import frozen
from .traced import Traced, current, under_way


def to_stack(data: Any) -> bool:
    """Return whether nested lists hold a traced number, which has no value yet to read."""
    if not isinstance(data, list | tuple) or current() is None or under_way.quiet:
        return False
    return any(
        isinstance(x, Tensor) and (x.__class__ is Traced or frozen(x)) for x in leaves(data)
    )


def stacked_numbers(
    data: Any, dtype: torch.dtype | None, device: Any, requires_grad: bool = False
) -> Tensor:
    """Return the tensor of nested lists of numbers and tensors of one element."""
    if dtype is None:
        dtype = functools.reduce(
            torch.promote_types, (torch.as_tensor(x).dtype for x in leaves(data))
        )
    device = torch.get_default_device() if device is None else device

    def stack(x: Any) -> Tensor:
        if isinstance(x, list | tuple):
            return torch.stack([stack(y) for y in x])
        if not isinstance(x, Tensor):
            return torch.full((), x, dtype=dtype, device=device)
        if x.numel() != 1:
            raise ValueError(
                "only tensors of one element can be numbers in a list, not one of shape "
                f"{list(x.shape)}"
            )
        if (x.is_floating_point() or x.is_complex()) and not torch.can_cast(x.dtype, dtype):
            raise TypeError(f"a number of dtype {x.dtype} does not become one of dtype {dtype}")
        return x.detach().reshape(()).to(device, dtype)

    return stack(data).requires_grad_(requires_grad)


def stacking(make: Callable) -> Callable:
    """Return ``torch.tensor`` and its like, for lists of traced numbers too."""

    @functools.wraps(make)
    def function(data: Any, *args: Any, **kwargs: Any) -> Any:
        if asks_to_compute(sys._getframe(1)) and isinstance(data, Tensor):
            return data.to(torch.get_default_dtype())  # as a number of Python's
        if args or not to_stack(data):
            return make(data, *args, **kwargs)
        return stacked_numbers(
            data, kwargs.get("dtype"), kwargs.get("device"), kwargs.get("requires_grad", False)
        )

    return function


def new_tensor(self: Tensor, data: Any, **kwargs: Any) -> Tensor:
    if not to_stack(data):
        return Tensor.new_tensor(self, data, **kwargs)
    return stacked_numbers(data, **{"dtype": self.dtype, "device": self.device, **kwargs})


Traced.new_tensor = new_tensor  # type: ignore[method-assign]


def checked_one_hot(one_hot: Callable) -> Callable:
    """Return ``one_hot``, whose program checks the classes at each call, as eager mode does."""

    @functools.wraps(one_hot)
    def function(tensor: Tensor, num_classes: int = -1) -> Tensor:
        if tensor.__class__ is Traced and num_classes:
            fits, what = tensor.ge(0), "class values must be non-negative"
            if num_classes > 0:
                fits = fits.logical_and(tensor.lt(num_classes))
                what += f" and smaller than {num_classes}"
            fits = fits.all()
            torch.ops.aten._assert_async.msg(fits, f"one_hot: {what}")
        return one_hot(tensor, num_classes)

    return function


from_dlpack = torch.from_dlpack


def of_memory(make: Callable) -> Callable:
    """Return ``torch.from_numpy`` and its like, recorded as constants that ``f`` makes."""

    @functools.wraps(make)
    def function(data: Any, *args: Any, **kwargs: Any) -> Any:
        trace = current()
        if trace is None or under_way.quiet:
            return make(data, *args, **kwargs)
        if isinstance(data, Tensor):
            if data.__class__ is Traced and make is from_dlpack:
                raise CaptureError(
                    f"a traced value has no memory for from_dlpack{at(debug.user_line())}"
                )
            return make(data, *args, **kwargs)
        trace.buffer = data
        try:
            with without_warning(trace, data):
                x = make(data, *args, **kwargs)
            if x.__class__ is Tensor and not x.untyped_storage().resizable():
                return torch.ops.aten.lift_fresh.default(x)
            return x
        finally:
            trace.buffer = None

    return function


CONSTRUCTORS = {
    (torch, "tensor"): stacking(torch.tensor),
    (F, "one_hot"): checked_one_hot(F.one_hot),
    **{(torch, n): stacking(of_memory(getattr(torch, n))) for n in ("as_tensor", "asarray")},
    **{
        (torch, n): of_memory(getattr(torch, n))
        for n in ("from_numpy", "frombuffer", "from_dlpack")
    },
}

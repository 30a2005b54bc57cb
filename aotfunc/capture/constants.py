"""Give numpy, lists, copies and pickles inside a recording the values of tensors from outside."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from .. import debug
from ..debug import at
from ..errors import CaptureError
from ..trace.arrays import shown_array
from ..trace.patches import ORIGINALS
from ..trace.traced import current, quiet, under_way


@functools.wraps(Tensor.numpy)
def numpy_of_a_constant(self: Tensor, *, force: bool = False) -> Any:
    """Return the numpy array of an outside tensor's memory, unrecorded."""
    if current() is None or under_way.quiet:
        return ORIGINALS["numpy"](self, force=force)
    value = constant_value(self)
    with quiet():
        return shown_array(self, ORIGINALS["numpy"](value, force=force))


def tolist_of_a_constant(self: Tensor) -> Any:
    """Return the values of a tensor from outside as a list."""
    return ORIGINALS["tolist"](constant_value(self))


def deepcopy_of_a_constant(self: Tensor, memo: dict) -> Tensor:
    """Return a copy of a tensor from outside, as a new leaf."""
    if current() is None or under_way.quiet:
        return ORIGINALS["deepcopy"](self, memo)
    if id(self) not in memo:
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
    return memo[id(self)]


def unpickled(*parts: Any) -> Tensor:
    """Return a tensor that pickle has read as a tensor from outside."""
    trace = current()
    if trace is None or under_way.quiet:
        return ORIGINALS["rebuild"](*parts)
    if not trace.may_ask_constants:
        raise CaptureError(
            f"a tensor is unpickled in a function that is compiled once{at(debug.user_line())}: "
            "do so outside"
        )
    with quiet():
        return ORIGINALS["rebuild"](*parts)


def constant_value(t: Tensor) -> Tensor:
    """Return the value of a tensor from outside, if it may be asked for."""
    trace = current()
    return t if trace is None or under_way.quiet else trace.value(t)

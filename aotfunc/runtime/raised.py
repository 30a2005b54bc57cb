"""An error of the function's own: what the function did until then becomes a program, as if it had
returned, and the call ends in the error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from ..capture.capture import refusal_of
from ..capture.instances import flatten_tree
from ..errors import AotfuncError, OpError

if TYPE_CHECKING:
    from .entry import Entry


def refused(e: BaseException) -> bool:
    """Return whether an error is ours, and not the function's own."""
    ours = isinstance(e, AotfuncError) and not isinstance(e, OpError)
    return ours or (isinstance(e, RuntimeError) and refusal_of(e) is not None)


def error_tensors(e: Exception) -> Any:
    """Return the arguments of an error if tensors are among them."""
    return e.args if any(isinstance(x, Tensor) for x in flatten_tree(e.args)[0]) else None


def fail(entry: Entry, args: tuple | None) -> NoReturn:
    """Raise the error of an entry; ``args`` are its arguments if there are tensors among them."""
    error, entry.error = entry.error, None
    assert error is not None
    if args is not None:
        error.args = args
    try:
        raise error
    finally:
        del error  # it holds this frame

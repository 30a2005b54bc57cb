"""The errors a user can see: what was wrong, which argument, the user's line, the way out."""

from __future__ import annotations

import threading
import warnings
from typing import Any


class Made(threading.local):
    """Errors of this thread since its outermost recording began."""

    errors: list[AotfuncError] | None = None


made = Made()


class AotfuncError(RuntimeError):
    """Base of every error that aotfunc raises on purpose."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if made.errors is not None:
            made.errors.append(self)


class ArgumentError(AotfuncError, TypeError, ValueError):
    """A transform cannot take these arguments; the message names the argument and the leaf."""


class CaptureError(AotfuncError):
    """``f`` cannot be captured; the message holds the user's line and what to write instead."""


class OpError(CaptureError):
    """PyTorch refuses the arguments of an op that ``f`` calls; the message holds the op, their
    shapes and the user's line. It is also of the class that PyTorch raises: an IndexError, a
    TypeError, a ValueError."""

    @staticmethod
    def like(error: Exception, message: str) -> OpError:
        """Return an OpError that is also of ``error``'s class."""
        kind = next(
            (
                k
                for k in (IndexError, TypeError, ValueError, NotImplementedError)
                if isinstance(error, k)
            ),
            None,
        )
        return OpError(message) if kind is None else type("OpError", (OpError, kind), {})(message)


class RuleError(AotfuncError, NotImplementedError):
    """No rule is known; the message names the op, the transform and the user's line."""


class GraphError(AotfuncError, AssertionError):
    """A graph broke :mod:`aotfunc.graph`'s grammar; the message names the pass that made it."""


class PartitionError(AotfuncError, AssertionError):
    """A joint graph cannot be split as asked, or is split wrongly; the message says where."""


class ValidationError(AotfuncError, AssertionError):
    """``validate=True`` found a wrong result; the message names the first wrong op and line."""


class BackendError(AotfuncError, ImportError):
    """A backend is unknown, lacks something that it needs (the message says what to install), or
    failed on a graph: ``graph_module`` is that graph, the message names the half, and the
    compiler's own error is the cause."""

    def __init__(self, message: str, graph_module: Any = None) -> None:
        super().__init__(message)
        self.graph_module = graph_module


class CompilerError(BackendError):
    """The C++ compiler is missing or refused a kernel; the message holds its words and the path of
    the source, which is ``source``, too."""

    source: str | None = None


class BackendWarning(UserWarning):
    """A backend runs an op, or a whole graph, eagerly, because its compiler failed: right, but not
    compiled. Shown once for each op and reason."""


class LoopWarning(UserWarning):
    """``vmap`` met an op that it can only batch by a loop over the samples: right, but as slow as
    a Python loop, and a graph that grows with the batch. Shown once for each op; ``vmap(...,
    strict=True)`` raises RuleError instead."""


class CheckpointWarning(UserWarning):
    """A checkpoint writes to a tensor from outside, as batch norm does to its running statistics.
    That happens once, at the call; in eager mode the backward, which computes again, writes again.
    Shown once for each line."""


for category in (LoopWarning, BackendWarning, CheckpointWarning):
    # behind whatever the user asks for
    warnings.filterwarnings("once", category=category, append=True)

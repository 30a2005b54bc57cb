"""``torch.compile(f, backend="aotfunc")``: compile the graphs that Dynamo finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..errors import ArgumentError
from .jit import jit


def compiled_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    """Return a graph of Dynamo's (torch functions, which may write; sizes among its inputs) under
    :func:`jit`: its forward and backward are captured at the first call, and again for other
    sizes. ``options`` are :func:`jit`'s; ``mode`` is ignored. Raises ArgumentError for another
    option.

    >>> f = torch.compile(torch.sin, backend="aotfunc", options={"backend": "eager"})
    >>> f(torch.zeros(2))  # doctest: +SKIP
    tensor([0., 0.])
    """
    if unknown := {*(options or {})} - {"backend", "exact"}:
        raise ArgumentError(
            f'torch.compile(backend="aotfunc"): there is no option {", ".join(sorted(unknown))}; '
            'there are "backend" and "exact"'
        )
    return jit(gm, **(options or {}))

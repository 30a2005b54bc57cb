"""Batch an op by one call per sample, stacked: the last resort, visible and reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import Line, at
from ..errors import CaptureError, LoopWarning, RuleError
from ..trace.emit import Builder
from ..trace.nested import mapped
from ..trace.shapes.sig import Sig
from .rules.table import call_op, tensor_args
from .walk import traced

aten = torch.ops.aten

WAY_OUT = (
    "Write it with ops that can be batched, call it outside of vmap on the whole batch, or give "
    "it a batching rule: torch.library.register_vmap for an op of your own, "
    "aotfunc.extend.vmap_of for another"
)
_shown: dict = {}  # our warnings that the warnings module remembers


def report(op: OpOverload, line: Line | None, strict: bool) -> None:
    """Warn, at the user's line, that ``op`` runs once a sample. RuleError if ``strict``."""
    if strict:
        raise RuleError(
            f"vmap(strict=True): {op} can only be batched by a loop over the samples{at(line)}. "
            f"{WAY_OUT}, or let it loop with strict=False."
        )
    text = f"vmap: {op} can only be batched by a loop over the samples: "
    text += f"the graph calls it once for each. {WAY_OUT}."
    where = (line.code.co_filename, line.number) if line is not None else ("<aotfunc>", 0)
    warnings.warn_explicit(text, LoopWarning, *where, registry=_shown)


def looped(b: Builder, n: Node, flags: tuple, size: int, args: Any, why: Exception) -> Any:
    """Return the op of ``n`` called for each sample of the ``args`` with ``flags``."""
    op = n.target
    where = tensor_args(op)

    def loop(*xs: Any) -> Any:
        rows = []
        for k in range(size):
            full = list(xs)
            for i, yes in zip(where, flags, strict=True):
                full[i] = at_sample(full[i], yes, k, lambda x, k: x[k])
            rows.append(call_op(op, full))
        return stack_nested(rows)

    try:
        return traced(loop)(b, *args)
    except CaptureError as e:
        raise RuleError(f"{op} cannot be batched{at(n.meta.get('line'))}: {why}; {e}") from None


def looped_by_value(b: Builder, n: Node, flags: tuple, size: int, args: Any) -> Any:
    """Loop as :func:`looped` over an op whose shape, by values, is one for all samples."""
    op, want = n.target, n.meta["val"]
    named = [a.name for a in op._schema.arguments if a.kwarg_only]

    rows = []
    for k in range(size):
        full = list(args)
        for i, yes in zip(tensor_args(op), flags, strict=True):
            full[i] = at_sample(full[i], yes, k, lambda x, k: b.call(aten.select.int, x, 0, k))
        split = len(full) - len(named)
        row = b.node(op, tuple(full[:split]), dict(zip(named, full[split:], strict=True)), want)
        rows.append([row] if isinstance(want, Sig) else [b.item(row, i) for i in range(len(want))])
    columns = [b.call(aten.stack.default, list(column)) for column in zip(*rows, strict=True)]
    return columns[0] if isinstance(want, Sig) else columns


def at_sample(a: Any, yes: Any, k: int, select: Callable) -> Any:
    """Return an argument of the k-th sample."""
    return mapped(lambda x, y: select(x, k) if y and x is not None else x, a, yes)


def stack_nested(rows: list) -> Any:
    """Return the samples' results stacked along a new dimension 0, in the same nested lists."""
    if isinstance(rows[0], list | tuple):
        return [stack_nested(list(column)) for column in zip(*rows, strict=True)]
    return torch.stack(rows)


def no_samples(val: Any) -> Any:
    """Return an empty batch of what a node with this value returns."""
    if isinstance(val, tuple):
        return [no_samples(v) for v in val]
    return (
        torch.zeros((0, *val.shape), dtype=val.dtype, device=val.device)
        if isinstance(val, Sig)
        else val
    )

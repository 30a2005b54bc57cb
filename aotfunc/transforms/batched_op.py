"""Batch one op: by our rule, PyTorch's batching rule, the op's decomposition, or a loop over the
samples, in this order.

The chores of all rules are done here: tensors are batched if the rule asks for it, dtypes are
those without a batch, and results are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import at
from ..errors import CaptureError, RuleError
from ..trace.emit import Builder, remap
from ..trace.nested import leaves, mapped
from ..trace.shapes.sig import Facts, Sig
from . import fallback, loops
from .rules.schema import full_args, tensor_args
from .rules.table import entry_for
from .walk import Make, apply, as_graph, errors_of, traced

if TYPE_CHECKING:
    from .vmap import Batch

aten = torch.ops.aten


def batched_op(walk: Batch, n: Node, randomness: str) -> tuple[Any, list[OpOverload]]:
    """Return ``(results, looped ops)`` of ``n`` batched, drawing as ``randomness`` says."""
    op: Any = n.target
    args = full_args(op, n.args, n.kwargs)
    where = tensor_args(op)
    flags = tuple([walk.has(args[i]) for i in where])
    by_value = n.meta["val"] if Facts(op).dynamic else None
    tag = ("vmap", op._op, randomness, tuple([sample_sigs(args[i]) for i in where]), by_value)
    return apply(walk.b, tag, fragment(walk, n), flags, walk.size, *remap(tuple(args), walk.env))


def fragment(walk: Batch, n: Node) -> Make:
    """Return ``make(builder, flags, size, *args) -> (result, looped ops)`` of an op."""
    op: Any = n.target
    want = n.meta["val"]

    def make(b: Builder, flags: tuple, size: int, *args: Any) -> Any:
        rule: Any = entry_for(op).vmap
        if not size:  # for every op
            return traced(lambda *_: loops.no_samples(want))(b, *args), []
        if rule is not None:
            full = list(args)
            if "batched" not in rule.wants:  # the rule wants every tensor batched
                for i, yes in zip(tensor_args(op), flags, strict=True):
                    full[i] = all_with_batch(b, full[i], yes, size)
            full = promoted(b, n, full)
            extras = {
                "batched": flags,
                "size": size,
                "randomness": walk.randomness,
                "sample": sample_sigs(n.args[0]),
                "shape": want.shape
                if isinstance(want, Sig)
                else tuple(getattr(v, "shape", ()) for v in want),
            }
            with errors_of("batching", n, rule):
                result = traced(lambda *xs: rule(*xs, **extras))(b, *full)
                if result is not NotImplemented:
                    return checked_result(b, result, want, size), []
        elif Facts(op).random:
            raise RuleError(
                f"{op} draws random numbers and has no batching rule{at(n.meta.get('line'))}"
            )
        result, looped = derived_batch(walk, b, n, flags, size, args)
        return checked_result(b, result, want, size), looped

    return make


def derived_batch(
    walk: Batch, b: Builder, n: Node, flags: tuple, size: int, args: Any
) -> tuple[Any, list[OpOverload]]:
    """Return the batched op if we have no rule for it."""
    op: Any = n.target
    if Facts(op).dynamic:
        return loops.looped_by_value(b, n, flags, size, args), [op]
    body = fallback.decomposition(op)
    try:
        rule = fallback.batching_rule(op)
        return traced(lambda *xs: rule(*xs, batched=flags), intent=False)(b, *args), []
    except (fallback.NoFormula, CaptureError) as e:
        why = e
    if body is not None:
        return by_parts(walk, b, n, body, flags, args)
    return loops.looped(b, n, flags, size, args, why), [op]


def by_parts(
    walk: Batch, b: Builder, n: Node, body: Any, flags: tuple, args: Any
) -> tuple[Any, list[OpOverload]]:
    """Batch the ops of the decomposition."""
    old, sub = full_args(n.target, n.args, n.kwargs), walk.inside(b)
    inner, outs, given = as_graph(traced(body), old)
    known: dict[Any, tuple[Any, Any]] = {}
    for i, yes in zip(tensor_args(n.target), flags, strict=True):
        known.update(
            zip(leaves(old[i]), zip(leaves(args[i]), leaves(yes), strict=True), strict=True)
        )
    for p, x in given.items():
        sub.env[p], sub.batched[p] = known[x]
    sub.walk(inner.graph.nodes)
    results = mapped(lambda o: sub.expanded(o) if isinstance(o, Node) else o, outs)
    return results, [op for op, _ in sub.loops]


def sample_sigs(a: Any) -> Any:
    """Return the unbatched signatures, as a fragment depends on them (ranks, dtype promotion)."""
    if isinstance(a, list | tuple):
        return tuple([sample_sigs(x) for x in a])
    return a.meta["val"] if a.__class__ is Node else None


def all_with_batch(b: Builder, a: Any, yes: Any, size: int) -> Any:
    """Return an argument with a batch in each tensor; ``yes`` says which have one."""

    def expanded(x: Any, yes: Any) -> Any:
        if not isinstance(x, Node) or yes:
            return x
        return b.call(aten.expand.default, x, [size, *x.meta["val"].shape])

    return mapped(expanded, a, yes)


def promoted(b: Builder, n: Node, args: list) -> list:
    """Cast a batched 0-dim tensor, which is no longer 0-dim, as dtype promotion without a batch
    would. An unbatched one keeps its precision if it can."""
    op = n.target
    if torch.Tag.pointwise not in op.tags:
        return args
    old = full_args(op, n.args, n.kwargs)
    where = [i for i in tensor_args(op) if isinstance(old[i], Node)]
    sigs = [old[i].meta["val"] for i in where]
    if op is aten.where.self:  # (not the condition)
        where, sigs = where[1:], sigs[1:]
    if len({s.dtype for s in sigs}) < 2 or not any(len(s.shape) == 0 for s in sigs):
        return args
    common = promotion(sigs)
    full = list(args)

    def cast(also_0_dim: bool) -> bool:
        for i, s in zip(where, sigs, strict=True):
            if len(s.shape) == 0 and s.dtype is not common and s.dtype is not torch.bool:
                if also_0_dim or full[i].meta["val"].shape:
                    full[i] = b.call(aten._to_copy.default, args[i], dtype=common)
        return promotion([full[i].meta["val"] for i in where]) is common

    if not cast(False):
        cast(True)
    return full


def promotion(sigs: Sequence[Sig]) -> torch.dtype:
    """Return what these promote to; 0-dim ones count only in a higher category."""

    def category(d: torch.dtype) -> int:
        return 3 if d.is_complex else 2 if d.is_floating_point else 1 if d is not torch.bool else 0

    order = sorted(sigs, key=lambda s: not s.shape)
    common = order[0].dtype
    for s in order[1:]:
        if s.shape or not order[0].shape or category(s.dtype) > category(common):
            common = torch.promote_types(common, s.dtype)
    return common


def checked_result(b: Builder, result: Any, want: Any, size: int) -> Any:
    """Return the result of a rule, in the unbatched dtype. Raises ValueError for another shape
    than the unbatched one behind the batch, and for another number of results."""
    if isinstance(want, tuple):
        if not isinstance(result, list | tuple):
            result = [result]
        if len(result) != len(want):
            raise ValueError(f"it returned {len(result)} results where there are {len(want)}")
        return [
            checked_result(b, r, w, size) if w.__class__ is Sig else r
            for r, w in zip(result, want, strict=True)
        ]
    if not isinstance(result, Node):
        raise ValueError(f"it returned {result!r}")
    val = result.meta["val"]
    if val.dtype is not want.dtype:
        result = b.call(aten._to_copy.default, result, dtype=want.dtype)
    if tuple(val.shape) != (size, *want.shape):
        raise ValueError(f"it returned shape {list(val.shape)} instead of {[size, *want.shape]}")
    return result

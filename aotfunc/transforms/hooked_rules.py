"""Differentiate an op whose result has hooks: autograd passes through them again wherever
PyTorch's formula reads the result, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..trace.emit import Builder, hashed
from ..trace.shapes.sig import Facts
from .rules.schema import call_op, full_args
from .walk import output

aten = torch.ops.aten


def behind_hooks(b: Builder, n: Any, again: Any) -> Any:
    """Return an op's result ``n``, by ``again``, behind its hooks: autograd saves it there."""
    for u in reversed(getattr(n, "users", ())):
        if getattr(u.target, "hooked", False) and u.args[0] is n:
            behind = output(b, u, 0)
            return behind_hooks(b, behind, behind)
    return again


def has_formula(op: OpOverload) -> bool:
    """Return whether PyTorch's formula for the op may be recorded, which runs the op again."""
    return op.namespace == "aten" and not Facts(op).random


@contextmanager
def answered(b: Builder, op: OpOverload, args: Sequence[Any], out: Any) -> Iterator[None]:
    """Take ``out`` for what the first call of ``op`` returns, if it has these arguments."""
    kept, given, call = b.rewrites, list(args), hashed(op)

    def answer(b: Builder, val: Any, *args: Any, **kwargs: Any) -> Any:
        b.rewrites = kept
        return out if full_args(op, args, kwargs) == given else None

    b.rewrites = {**kept, call: (answer, *kept.get(call, ()))}
    try:
        yield
    finally:
        b.rewrites = kept


def any_zero(x: Tensor, *_: Any) -> Tensor:
    return (x == 0).any()


def singular(_: Any, det: Tensor) -> Tensor:
    return det.abs() < 100 * torch.finfo(det.dtype).eps


#: ops whose formula reads the result unless this holds of ``(x, result)``, which a recording does
#: not know: ``g * result / x``
BY_VALUE: dict[OpOverload, Callable] = {
    aten.prod.default: any_zero,
    aten.prod.dim_int: any_zero,
    aten.cumprod.default: any_zero,
    aten._linalg_det.default: singular,
}


def of_result(op: OpOverload, rule: Callable) -> Callable:
    """Return our rule, which computes the result again, with eager's in its place."""
    if op not in BY_VALUE:
        return rule

    def scaled(g: Any, out: Any, *args: Any, needs: tuple[bool, ...]) -> Any:
        several = isinstance(out, tuple)
        again = call_op(op, args)
        value, same, ct = (out[0], again[0], g[0]) if several else (out, again, g)
        unread = BY_VALUE[op](args[0], same)
        ratio = torch.where(unread, 1, value) / torch.where(unread, 1, same)
        ct = ct * ratio.conj()
        return rule((ct, *g[1:]) if several else ct, out, *args, needs=needs)

    return scaled

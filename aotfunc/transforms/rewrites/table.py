"""The table of rewritings, and the questions that they ask about nodes.

A rule is ``(builder, val, *args, **kwargs) -> replacement | None``. The replacement has the same
bits as the op that it replaces and exactly the signature ``val``, which :func:`fit_or_none`
checks: later ops were planned for these strides and this offset, and may have no ``view`` of
others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from ...trace.emit import Builder, hashed, infer_val
from ...trace.shapes.sig import Sig
from ..activity import has_derivative

aten = torch.ops.aten

REWRITES: dict[Any, list] = defaultdict(list)  # see Builder

#: dtypes to which kernels convert a Python number before they compute
EXACT = frozenset((torch.float32, torch.float64))


def rewrite(*targets: Any) -> Any:
    """Make a decorator: the function is a rewriting of calls of these targets."""

    def register(rule: Any) -> Any:
        for target in targets:
            REWRITES[hashed(target)].append(rule)
        return rule

    return register


def is_call(a: Any, *targets: Any) -> bool:
    return a.__class__ is Node and a.op == "call_function" and a.target in targets


def has_signature(a: Any, val: Sig) -> bool:
    """Return whether ``a`` is a tensor of exactly this signature."""
    if a.__class__ is not Node:
        return False
    sig = a.meta["val"]
    return sig is val or (
        sig.__class__ is Sig
        and sig.shape == val.shape
        and sig.stride == val.stride
        and sig.dtype is val.dtype
        and sig.device == val.device
        and sig.offset == val.offset
    )


def may_go(x: Node, *others: Any) -> bool:
    """Return whether a result that no longer depends on ``x``, and still on the others, requires
    grad where it did, and of the same inputs: autograd has zeros for a value that is not taken."""
    return origins([x]) <= origins(others)


def origins(nodes: Iterable[Any]) -> set[Node]:
    """Return the inputs with a derivative that these values are computed from."""
    todo = [n for n in nodes if n.__class__ is Node]
    seen = set(todo)
    for n in todo:  # which grows
        new = [a for a in n.all_input_nodes if a not in seen]
        seen.update(new)
        todo += new
    return {n for n in todo if n.op == "placeholder" and has_derivative(n.meta["val"])}


def fit_or_none(val: Sig, a: Any) -> Any:
    """Return ``a`` if it has the signature ``val``, else None."""
    return a if has_signature(a, val) else None


def tried(b: Builder, val: Sig, target: Any, *args: Any) -> Any:
    """Return the node of this call if it is possible and returns ``val``, else None."""
    try:
        found = infer_val(target, args, {})
    except RuntimeError:
        return None
    return b.node(target, args, {}, val) if found is val else None

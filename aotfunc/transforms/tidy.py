"""Local rewritings that make graphs small and keep every value bit for bit, NaN, infinities and signed zeros included.

They are applied as nodes are made (:class:`~aotfunc.trace.emit.Builder`), so each level of a nested transform works
on a tidy graph. A rule is ``(builder, val, *args, **kwargs) -> replacement | None``; it must return something with
the signature ``val``, as far as anyone can see: shape, dtype and device.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch.fx import Node

from ..graph import Program, output_node
from ..trace.emit import Builder, paused_gc
from ..trace.shapes import Sig

aten = torch.ops.aten

REWRITES: dict[Any, list] = defaultdict(list)


def rewrite(*targets: Any) -> Any:
    def register(rule: Any) -> Any:
        for target in targets:
            REWRITES[target].append(rule)
        return rule

    return register


def is_call(a: Any, *targets: Any) -> bool:
    return a.__class__ is Node and a.op == "call_function" and a.target in targets


def same(a: Any, val: Sig) -> bool:
    """Whether ``a`` could stand where a value of this signature is expected."""
    if a.__class__ is not Node:
        return False
    sig = a.meta["val"]
    return sig is val or (
        sig.shape == val.shape and sig.stride == val.stride and sig.dtype is val.dtype and sig.device == val.device
    )


def number(a: Any) -> Any:
    """The number that ``a`` is filled with everywhere, or None."""
    if a.__class__ in (int, float):
        return a
    if is_call(a, aten.full.default):
        return a.args[1]
    if is_call(a, aten.ones_like.default, aten.ones.default):
        return 1
    if is_call(a, aten.zeros_like.default, aten.zeros.default):
        return 0
    if is_call(a, aten.expand.default, aten.view.default):
        return number(a.args[0])
    return None


def is_one(a: Any) -> bool:
    n = number(a)
    return n is not None and n.__class__ is not bool and n == 1


# ----- one, and signs -------------------------------------------------------------------------------------------------


@rewrite(aten.mul.Tensor)
def _mul(b: Builder, val: Sig, x: Any, y: Any) -> Any:
    if val.dtype.is_complex:  # inf and nan mix between the parts
        return None
    if is_one(y) and same(x, val):
        return x
    if is_one(x) and same(y, val):
        return y
    if is_one(x) and y.__class__ in (int, float) and val.differentiable:
        return full(b, val, y)
    # a minus sign commutes with products: pull it out, where it meets others
    if is_call(x, aten.neg.default) and x.meta["val"].dtype is val.dtype:
        return b.call(aten.neg.default, b.call(aten.mul.Tensor, x.args[0], y))
    if is_call(y, aten.neg.default) and y.meta["val"].dtype is val.dtype:
        return b.call(aten.neg.default, b.call(aten.mul.Tensor, x, y.args[0]))
    if y.__class__ is Node and x.__class__ is Node and val.dtype in (torch.float32, torch.float64):
        # a filled tensor is a number
        for tensor, other in ((x, y), (y, x)):
            n = number(tensor)
            if (
                n is not None
                and n.__class__ is not complex
                and same(other, val)
                and tensor.meta["val"].dtype is val.dtype
            ):
                return b.call(aten.mul.Tensor, other, n)
    return None


@rewrite(aten.div.Tensor)
def _div(b: Builder, val: Sig, x: Any, y: Any) -> Any:
    if val.dtype.is_complex:
        return None
    if is_one(y) and same(x, val):
        return x
    if is_call(x, aten.neg.default) and x.meta["val"].dtype is val.dtype:
        return b.call(aten.neg.default, b.call(aten.div.Tensor, x.args[0], y))
    if is_call(y, aten.neg.default) and y.meta["val"].dtype is val.dtype:
        return b.call(aten.neg.default, b.call(aten.div.Tensor, x, y.args[0]))
    return None


@rewrite(aten.neg.default)
def _neg(b: Builder, val: Sig, x: Any) -> Any:
    if is_call(x, aten.full.default) and x.args[1].__class__ in (int, float):
        return full(b, val, -x.args[1])
    return x.args[0] if is_call(x, aten.neg.default) and same(x.args[0], val) else None


@rewrite(aten.add.Tensor)
def _add(b: Builder, val: Sig, x: Any, y: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        return None
    if is_call(y, aten.neg.default) and _float(y, val):
        return b.call(aten.sub.Tensor, x, y.args[0])
    if is_call(x, aten.neg.default) and y.__class__ is Node and _float(x, val):
        return b.call(aten.sub.Tensor, y, x.args[0])
    return None


@rewrite(aten.sub.Tensor)
def _sub(b: Builder, val: Sig, x: Any, y: Any, alpha: Any = 1) -> Any:
    if alpha == 1 and is_call(y, aten.neg.default) and _float(y, val):
        return b.call(aten.add.Tensor, x, y.args[0])
    return None


def _float(x: Node, val: Sig) -> bool:
    return x.meta["val"].dtype is val.dtype and val.dtype.is_floating_point


@rewrite(aten.pow.Tensor_Scalar)
def _pow(b: Builder, val: Sig, x: Any, exponent: Any) -> Any:
    return x if exponent == 1 and same(x, val) else None


# ----- copies and shapes ----------------------------------------------------------------------------------------------


@rewrite(aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)
def _identity(b: Builder, val: Sig, x: Any) -> Any:
    return x


@rewrite(aten.clone.default, aten._to_copy.default)
def _copy(b: Builder, val: Sig, x: Any, **_: Any) -> Any:
    return x if x.meta["val"] is val else None


@rewrite(aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.expand.default)
def _reshape(b: Builder, val: Sig, x: Any, *_: Any, **__: Any) -> Any:
    return x if x.meta["val"] is val else None


@rewrite(aten._unsafe_view.default)
def _unsafe(b: Builder, val: Sig, x: Any, shape: Any) -> Any:
    return b.node(aten.view.default, (x, list(val.shape)), {}, val)


@rewrite(aten.view.default)
def _view_of_view(b: Builder, val: Sig, x: Any, shape: Any) -> Any:
    if is_call(x, aten.view.default) and x.args[0].meta["val"].dtype is val.dtype:
        origin = x.args[0]
        if origin.meta["val"] is val:
            return origin
        if origin.meta["val"].plain:
            return b.node(aten.view.default, (origin, list(val.shape)), {}, val)
    return None


@rewrite(aten.view.default, aten.expand.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
def _filled_reshape(b: Builder, val: Sig, x: Any, *_: Any, **__: Any) -> Any:
    """A reshaped or expanded constant is a constant of that shape."""
    if is_call(x, aten.full.default):
        return full(b, val, x.args[1])
    return None


@rewrite(aten.ones_like.default)
def _ones_like(b: Builder, val: Sig, x: Any, **_: Any) -> Any:
    return full(b, val, 1)


@rewrite(aten.ones.default)
def _ones(b: Builder, val: Sig, shape: Any, **_: Any) -> Any:
    return full(b, val, 1)


def full(b: Builder, val: Sig, value: Any) -> Node:
    """A constant of this shape, written one way so that equal ones merge."""
    return b.call(aten.full.default, list(val.shape), value, dtype=val.dtype, device=val.device)


@rewrite(aten.expand.default)
def _expand_of_expand(b: Builder, val: Sig, x: Any, shape: Any, *, implicit: bool = False) -> Any:
    if is_call(x, aten.expand.default):
        return b.call(aten.expand.default, x.args[0], list(val.shape))
    return None


@rewrite(aten.t.default)
def _t(b: Builder, val: Sig, x: Any) -> Any:
    return x.args[0] if is_call(x, aten.t.default) else x if len(val.shape) < 2 else None


@rewrite(aten.transpose.int)
def _transpose(b: Builder, val: Sig, x: Any, i: int, j: int) -> Any:
    rank = len(val.shape)
    if not rank or i % rank == j % rank:
        return x
    if rank == 2:
        return b.node(aten.t.default, (x,), {}, val)
    if is_call(x, aten.transpose.int) and {d % rank for d in x.args[1:]} == {i % rank, j % rank}:
        return x.args[0]
    return None


@rewrite(aten.permute.default)
def _permute(b: Builder, val: Sig, x: Any, dims: Any) -> Any:
    rank = len(val.shape)
    dims = [d % rank for d in dims] if rank else []
    if is_call(x, aten.permute.default):
        inner = [d % rank for d in x.args[1]]
        return b.node(aten.permute.default, (x.args[0], [inner[d] for d in dims]), {}, val)
    if dims == sorted(dims):
        return x
    if dims == [1, 0]:
        return b.node(aten.t.default, (x,), {}, val)
    return None


@rewrite(aten._conj.default)
def _conj(b: Builder, val: Sig, x: Any) -> Any:
    return x.args[0] if is_call(x, aten._conj.default) else None


@rewrite(aten.squeeze.dim)
def _squeeze(b: Builder, val: Sig, x: Any, dim: int) -> Any:
    if is_call(x, aten.unsqueeze.default) and x.args[0].meta["val"] is val:
        return x.args[0]
    return x if x.meta["val"] is val else None


@rewrite(aten.unsqueeze.default)
def _unsqueeze(b: Builder, val: Sig, x: Any, dim: int) -> Any:
    return x.args[0] if is_call(x, aten.squeeze.dim) and x.args[0].meta["val"] is val else None


@rewrite(aten.slice.Tensor)
def _slice(b: Builder, val: Sig, x: Any, *_: Any) -> Any:
    return x if x.meta["val"] is val else None


@rewrite(aten.select_scatter.default, aten.slice_scatter.default)
def _overwritten(b: Builder, val: Sig, x: Any, source: Any, *place: Any, **named: Any) -> Any:
    """Of two writes to the same place the last one counts."""
    for op in (aten.select_scatter.default, aten.slice_scatter.default):
        if (
            is_call(x, op)
            and x.args[2:] == place
            and dict(x.kwargs) == named
            and x.args[1].meta["val"].shape == source.meta["val"].shape
        ):
            return b.call(op, x.args[0], source, *place, **named)
    return None


@rewrite(operator.getitem)
def _item(b: Builder, val: Any, x: Any, i: int) -> Any:
    return x[i] if isinstance(x, list | tuple) else None


#: for the last passes, after results that need memory of their own were given copies
FINAL: dict[Any, list] = {target: rules for target, rules in REWRITES.items() if target is not aten.clone.default}


# ----- the pass -------------------------------------------------------------------------------------------------------


def retidy(program: Program, name: str = "tidy") -> Program:
    """The program rebuilt: rewritten, equal nodes merged, dead ones gone, names counted anew."""
    with paused_gc():
        b = Builder(REWRITES)
        inputs = [b.placeholder(p.name, p.meta["val"], role=p.meta.get("role")) for p in program.placeholders]
        outs = b.splice(program.graph, inputs, output_node(program.graph).args[0])
        return Program(b.finish(outs), program.n_inputs, program.n_outputs, program.mutated, name)

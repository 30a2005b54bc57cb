"""Derive a rule for a single op without one: PyTorch's own formula for that op, traced once per
signature; else its decomposition.

This is the one place that uses PyTorch's autograd, forward AD and batching rules, and only ever on
one op. The formulas run the op again; in the graph that second run merges with the first. Hence no
op that draws random numbers comes here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Variable, forward_ad

from ..errors import RuleError
from ..trace.memory import overlaps_itself
from ..trace.nested import leaves, mapped
from ..trace.shapes.sig import floating
from ..trace.traced import Traced, current
from .rules.schema import call_op, tensor_args
from .rules.table import DECOMPOSITIONS


class NoFormula(Exception):
    """Raised for an op that PyTorch has no formula for."""


def with_tensors(op: OpOverload, args: list, f: Callable[[Tensor, int], Tensor]) -> list:
    """Return ``args`` with the i-th tensor ``x`` replaced by ``f(x, i)`` if it is floating."""

    def one(a: Any, i: int) -> Any:
        return f(a, i) if floating(a) else a

    full = list(args)
    for i, at in enumerate(tensor_args(op)):
        full[at] = mapped(partial(one, i=i), full[at])
    return full


def closing_over_no_tensor(op: OpOverload) -> Callable[[Callable], Callable]:
    """Make a decorator that refuses a rule which closes over a tensor: a rule that was registered
    for a custom op would keep the tensor's present value."""

    def decorate(rule: Callable) -> Callable:
        @wraps(rule)
        def checked(*args: Any, **kwargs: Any) -> Any:
            result = rule(*args, **kwargs)
            trace = current()
            if trace is not None and trace.foreign():
                raise RuleError(
                    f"a rule registered for {op} closes over a tensor; give it to the op as an "
                    "argument"
                )
            return result

        return checked if op.namespace not in ("aten", "prims") else rule

    return decorate


def without_formula(op: OpOverload) -> bool:
    """Return whether ``op`` is registered for devices only: its results are constants."""
    keys = "Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return op.namespace not in ("aten", "prims") and not any(has(op.name(), key) for key in keys)


def reverse_rule(op: OpOverload) -> Callable:
    """Return a reverse rule from autograd's formula."""
    if without_formula(op):
        raise NoFormula(
            f"register one by torch.library.register_autograd({op.name()!r}, ...), or detach() "
            "its inputs"
        )

    @closing_over_no_tensor(op)
    def rule(g: Any, out: Any, *args: Any, needs: tuple[bool, ...]) -> list:
        twins: dict[int, Tensor] = {}

        def leaf(x: Traced, i: int) -> Tensor:
            if not needs[i]:
                return x
            twin = x.tracer.alias(x)
            torch._C.TensorBase.requires_grad_(twin)
            twins[id(x)] = twin
            return twin

        try:
            outs = leaves(call_op(op, with_tensors(op, list(args), leaf)))
            gs = leaves(g)
            pairs = [
                (o, x)
                for o, x in zip(outs, gs, strict=True)
                if x is not None and isinstance(o, Tensor) and Tensor.requires_grad.__get__(o)
            ]
            if not pairs:
                if not any(
                    isinstance(o, Tensor) and Tensor.requires_grad.__get__(o) for o in outs
                ):
                    raise NoFormula("autograd does not differentiate it")
                return [None] * len(needs)
            keys = list(twins)
            # the engine, as torch.autograd.grad imports sympy to compare shapes
            grads = Variable._execution_engine.run_backward(
                tuple(o for o, _ in pairs),
                tuple(x for _, x in pairs),
                True,  # keep_graph
                True,  # create_graph
                tuple(twins[k] for k in keys),
                allow_unreachable=True,
                accumulate_grad=False,
            )
        except (RuntimeError, NotImplementedError) as e:
            raise NoFormula(str(e).split("\n")[0]) from e
        found = dict(zip(keys, grads, strict=True))
        return [mapped(lambda a: found.get(id(a)), args[at]) for at in tensor_args(op)]

    return rule


def forward_rule(op: OpOverload) -> Callable:
    """Return a forward rule from forward AD's formula."""

    def rule(tangents: tuple, out: Any, *args: Any) -> Any:
        # forward AD has no formula for a custom op, and takes its tangent for zero
        if op.namespace != "aten":
            raise NoFormula("PyTorch has forward formulas for its own ops alone")
        with forward_ad.dual_level():

            def dual(a: Any, t: Any) -> Any:
                if isinstance(a, list | tuple):
                    return [dual(x, y) for x, y in zip(a, t or [None] * len(a), strict=True)]
                if t is None:
                    return a
                # forward AD copies a tangent into memory laid out as the primal
                shared = overlaps_itself(a.sig)
                primal = (
                    a.clone(memory_format=torch.contiguous_format) if shared else a.tracer.alias(a)
                )
                return forward_ad.make_dual(primal, t)

            full = list(args)
            for i, at in enumerate(tensor_args(op)):
                full[at] = dual(full[at], tangents[i])
            try:
                outs = call_op(op, full)
            except (RuntimeError, NotImplementedError) as e:
                raise NoFormula(str(e).split("\n")[0]) from e

            def tangent(o: Any) -> Any:
                return (
                    forward_ad.unpack_dual(o).tangent
                    if isinstance(o, Tensor) and o.sig.differentiable
                    else None
                )

            result = mapped(tangent, outs)
            # not zero: forward AD ignores the op
            if all(t is None for t in leaves(result)):
                raise NoFormula("forward AD does not differentiate it")
            return result

    return rule


def batching_rule(op: OpOverload) -> Callable:
    """Return a batching rule from PyTorch's; batch at 0 in and out."""

    @closing_over_no_tensor(op)
    def rule(*args: Any, batched: tuple) -> Any:
        where = tensor_args(op)
        xs: list[Tensor] = []
        dims: list[int | None] = []

        def take(a: Any, yes: Any) -> Any:
            if isinstance(a, Tensor):
                xs.append(a)
                dims.append(0 if yes else None)
                return len(xs) - 1
            return None

        places = {at: mapped(take, args[at], yes) for at, yes in zip(where, batched, strict=True)}

        plain: dict[int, Any] = {}  # outputs other than tensors

        def body(*values: Tensor) -> Any:
            def put(p: Any) -> Any:
                return (
                    [put(x) for x in p]
                    if isinstance(p, list)
                    else None
                    if p is None
                    else values[p]
                )

            outs = call_op(op, [put(places[i]) if i in places else a for i, a in enumerate(args)])
            if not isinstance(outs, tuple):
                return outs
            plain.update(
                (i, o) for i, o in enumerate(outs) if not isinstance(o, Tensor | list | tuple)
            )
            return tuple(o for i, o in enumerate(outs) if i not in plain)

        if not has_batching_rule(op):  # PyTorch would loop over the samples
            raise NoFormula("PyTorch has no batching rule for it")
        try:
            # also where torch.func is patched
            outs = torch._functorch.apis.vmap(body, in_dims=tuple(dims))(*xs)
        except Exception as e:  # a rule of the user's may raise anything
            raise NoFormula(str(e).split("\n")[0]) from e
        if not plain:
            return outs
        rest = iter(outs)
        return tuple(plain[i] if i in plain else next(rest) for i in range(len(outs) + len(plain)))

    return rule


@cache
def has_batching_rule(op: OpOverload) -> bool:
    """Return whether PyTorch batches ``op`` itself, without a loop."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "FuncTorchBatched")


@cache
def decomposition(op: OpOverload) -> Callable | None:
    """Return the op's decomposition, as a function of all its arguments in schema order."""
    from torch._decomp import decomposition_table

    body = DECOMPOSITIONS.get(op) or decomposition_table.get(op)
    if body is None:
        if not op._can_decompose():
            return None
        body = op.decompose
    names = [a.name for a in op._schema.arguments if a.kwarg_only]

    def call(*args: Any) -> Any:
        split = len(args) - len(names)
        named = {k: v for k, v in zip(names, args[split:], strict=True) if v is not None}
        return body(*args[:split], **named)

    return call

"""Forward mode: walk a graph forwards and carry a tangent along with each value.

An op without a written forward rule has its reverse rule transposed: the reverse rule is linear in
the cotangent, and the derivative of that linear map, applied to tangents, is the forward rule."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import at
from ..errors import RuleError
from ..graph import Program
from ..progress import with_progress
from ..trace.emit import Builder, paused_gc, remap
from ..trace.marks import check_gradient, fail, hidden_write, no_tangent, once
from ..trace.nested import leaves, mapped
from ..trace.shapes.sig import Facts, Sig
from . import fallback
from .activity import active_nodes
from .rules.schema import full_args, tensor_args
from .rules.table import entry_for
from .vjp import as_arguments, contiguous_sig, primals, reverse
from .walk import apply, as_graph, builder, check_count, errors_of, node_outputs, traced

aten = torch.ops.aten


def forward(b: Builder, nodes: Any, env: dict[Node, Any], tangents: dict[Node, Any]) -> None:
    """Copy ``nodes`` into ``b`` (``env``: old to new) and fill ``tangents`` by old nodes."""
    nodes = list(nodes)
    active = active_nodes(nodes, list(tangents))

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        new = b.call_like(n, env)
        b.meta = {**b.meta, "of": getattr(new, "name", None)}
        if n in active and (t := push(b, n, new, env, tangents)) is not None:
            tangents[n] = t
        return new

    b.copy(with_progress("jvp", nodes), env, visit)


def push(b: Builder, n: Node, new: Any, env: dict, tangents: dict) -> Any:
    """Return the tangent of one node; None for zero, a list for an op with several outputs."""
    op = n.target
    if op is operator.getitem:
        parts = tangents.get(n.args[0])
        return None if parts is None else parts[n.args[1]]
    if op is hidden_write:
        return tangents.get(n.args[0])
    if op is check_gradient:  # the gradient itself may not be asked for, as in a Hessian
        t = tangents.get(n.args[0])
        return None if t is None else b.call(op, t, *n.args[1:])
    if op in (no_tangent, fail):
        return None
    if op is once:
        raise RuleError(
            "a function marked with @once_differentiable was differentiated "
            f"twice{at(n.meta.get('line'))}"
        )
    if not isinstance(op, OpOverload):
        return op.push(b, n, new, env, tangents)
    args = full_args(op, n.args, n.kwargs)

    tangent = lambda a: tangents.get(a) if isinstance(a, Node) else None
    ts = [mapped(tangent, args[i]) for i in tensor_args(op)]
    if not any(map(_has, ts)):
        return None
    new_args = remap(tuple(args), env)
    out = node_outputs(b, new) if isinstance(new, Node) else new
    if isinstance(n.meta["val"], tuple) and not isinstance(out, list):
        out = [out]
    return apply(b, ("jvp", op._op), jvp_make(n), ts, out, *new_args)


def jvp_make(n: Node) -> Any:
    """Return the builder of the forward fragment, the first of: our rule, the transpose of our
    reverse rule, PyTorch's formula, the transpose of that for reverse mode, the decomposition."""
    op = n.target
    entry = entry_for(op)
    forward, backward = entry.jvp, entry.vjp

    def make(b: Builder, ts: list, out: Any, *args: Any) -> Any:
        if forward is not None:
            with errors_of("forward", n, forward):
                return fit_tangents(b, traced(forward)(b, tuple(ts), out, *args), out)
        if backward is not None:
            with errors_of("forward", n, backward):
                return fit_tangents(
                    b,
                    forward_by_transposition(
                        b, traced(as_arguments(backward, op)), op, ts, out, args
                    ),
                    out,
                )
        if Facts(op).random:
            raise RuleError(
                f"{op} draws random numbers and has no forward rule{at(n.meta.get('line'))}"
            )
        return fit_tangents(b, derived_tangents(b, n, ts, out, args), out)

    return make


def derived_tangents(b: Builder, n: Node, ts: list, out: Any, args: Any) -> Any:
    op = n.target
    try:
        return traced(fallback.forward_rule(op), intent=False)(b, tuple(ts), out, *args)
    except fallback.NoFormula:
        pass
    try:
        return forward_by_transposition(
            b, traced(as_arguments(fallback.reverse_rule(op), op), intent=False), op, ts, out, args
        )
    except (fallback.NoFormula, RuleError) as why:
        body = fallback.decomposition(op)
        if body is None:
            raise RuleError(
                f"no forward rule for {op}{at(n.meta.get('line'))}: no rule of ours, no formula "
                f"of PyTorch's ({why}), no decomposition"
            ) from None
    return forward_by_parts(b, body, ts, args, op)


def forward_by_parts(b: Builder, body: Any, ts: list, args: Any, op: OpOverload) -> Any:
    """Differentiate the op's decomposition in forward mode."""
    inner, outs, given = as_graph(traced(body), args)
    of: dict[Any, Any] = {}
    for i, t in zip(tensor_args(op), ts, strict=True):
        each = t if isinstance(t, list) else [t] * len(leaves(args[i]))
        of.update(zip(leaves(args[i]), each, strict=True))
    tangents = {p: of[a] for p, a in given.items() if of.get(a) is not None}
    forward(b, inner.graph.nodes, dict(given), tangents)
    return [tangents.get(o) for o in outs] if isinstance(outs, list) else tangents.get(outs)


def forward_by_transposition(
    b: Builder, vjp_rule: Any, op: OpOverload, ts: list, out: Any, args: Any
) -> Any:
    """Return the forward rule as the derivative of the (linear) reverse rule with respect to its
    cotangent: the adjoint of the adjoint."""
    carrying = entry_for(op).diff_outputs
    # cotangents of any value: the result does not depend on them
    dummies = [
        b.make("call_function", aten.empty_like.default, (o,), {}, o.meta["val"])
        if isinstance(o, Node)
        and o.meta["val"].differentiable
        and (carrying is None or i in carrying)
        else None
        for i, o in enumerate(leaves(out))
    ]
    needs = tuple(_has(t) for t in ts)
    given = iter(dummies)
    grads = vjp_rule(b, needs, mapped(lambda _: next(given), out), out, *args)
    flat_grads, flat_ts = [], []
    for ga, t in zip(grads, ts, strict=True):
        if isinstance(t, list):
            flat_grads += list(ga) if ga is not None else [None] * len(t)
            flat_ts += t
        else:
            flat_grads.append(ga)
            flat_ts.append(t)
    real = [d for d in dummies if d is not None]
    kept = [(ga, t) for ga, t in zip(flat_grads, flat_ts, strict=True) if ga is not None]
    back = iter(reverse(b, [ga for ga, _ in kept], [t for _, t in kept], real))
    found = iter([next(back) if d is not None else None for d in dummies])
    return mapped(lambda _: next(found), out)


def _has(t: Any) -> bool:
    return any(x is not None for x in t) if isinstance(t, list) else t is not None


def fit_tangents(b: Builder, result: Any, out: Any) -> Any:
    """Return tangents in the shape and dtype of their outputs."""
    if isinstance(out, list):
        parts = result if isinstance(result, list | tuple) else [result]
        check_count(parts, len(out))
        parts = [*parts, *[None] * (len(out) - len(parts))]
        return [fit_tangents(b, r, o) for r, o in zip(parts, out, strict=True)]
    if isinstance(result, list | tuple):
        check_count(result, 1)
        result = result[0] if result else None
    if result is None or not isinstance(out, Node) or not out.meta["val"].differentiable:
        return None
    if not isinstance(result, Node):
        raise ValueError(f"it returned {result!r}")
    val, want = result.meta["val"], out.meta["val"]
    if val.dtype is not want.dtype:
        if val.dtype.is_complex and not want.dtype.is_complex:
            result = traced(torch.real)(b, result)
        result = b.call(aten._to_copy.default, result, dtype=want.dtype)
    if result.meta["val"].shape != want.shape:
        result = b.call(aten.expand.default, result, list(want.shape))
    return result


def tangent_sig(primal: Sig) -> Sig:
    """Return the signature of an input's tangent: its primal's, at offset 0, unless that overlaps
    itself."""
    if primal.plain:
        return primal
    whole = all(step for step, n in zip(primal.stride, primal.shape, strict=True) if n > 1)
    return primal.start if whole else contiguous_sig(primal.start)


def jvp(program: Program, wrt: Sequence[int], zeros: bool = True) -> Program:
    """Return the tangent program: ``(inputs, tangents of wrt, closed-over) -> (outputs, output
    tangents)``.

    Tangents that are zero are made (``zeros``) or ``None``; those of integer outputs are zeros of
    the output's dtype."""
    with paused_gc():
        b = builder()
        old = program.placeholders
        new = primals(b, old[: program.n_inputs])
        ts = [
            b.placeholder(f"{old[i].name}_t", tangent_sig(old[i].meta["val"]), role="tangent")
            for i in wrt
        ]
        new += primals(b, old[program.n_inputs :])
        env: dict[Node, Any] = dict(zip(old, new, strict=True))
        tangents: dict[Node, Any] = {old[i]: t for i, t in zip(wrt, ts, strict=True)}
        forward(b, program.graph.nodes, env, tangents)
        outs = program.outputs
        primal = remap(tuple(outs), env)
        results = list(primal[: program.n_outputs])
        pushed = []
        for old_out, o in zip(outs[: program.n_outputs], results, strict=True):
            t = tangents.get(old_out) if isinstance(old_out, Node) else None
            if t is None and zeros and isinstance(o, Node):
                t = b.call(aten.zeros_like.default, o)
            pushed.append(t)
        mutated = [i if i < program.n_inputs else i + len(wrt) for i in program.mutated]
        graph = b.finish([*results, *pushed, *primal[program.n_outputs :]])
        return Program(
            graph, program.n_inputs + len(wrt), len(results) + len(pushed), mutated, "jvp"
        )

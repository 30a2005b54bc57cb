"""Reverse mode: walk a graph backwards and splice each op's reverse rule.

:func:`reverse` is the transform. It works on nodes of a graph under construction, so that it
serves whole programs, ``torch.autograd.grad`` inside a function and rules that differentiate
others alike."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import at
from ..errors import RuleError
from ..graph import Program, draws
from ..progress import with_progress
from ..trace.emit import Builder, paused_gc
from ..trace.kernels import image_format
from ..trace.marks import check_gradient, dead_end, fail, hidden_write, no_tangent, once
from ..trace.nested import leaves, mapped
from ..trace.records import may_save
from ..trace.shapes.rules import formatted
from ..trace.shapes.sig import Facts, Sig, contiguous_stride, make_sig
from . import fallback
from .activity import active_nodes, has_derivative, passes
from .hooked_rules import BY_VALUE, answered, behind_hooks, has_formula, of_result
from .rules.schema import full_args, tensor_args
from .rules.table import entry_for, zeros
from .walk import apply, builder, check_count, errors_of, filled_node, node_outputs, traced

aten = torch.ops.aten


class Regions:
    """A forward graph's checkpointed regions; the reverse walk runs what it reads again."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.nodes: dict[Any, list[Node]] = {}
        for n in b.graph.nodes:
            if "region" in n.meta and n.op == "call_function":
                self.nodes.setdefault(n.meta["region"], []).append(n)
        self.again: dict[Any, Copies] = {}

    def recomputed(self, n: Node) -> Node:
        """Return ``n`` on recomputed arguments, if it lies in a region."""
        region = n.meta.get("region")
        if region is None:
            return n
        env = self.again.get(region)
        if env is None:
            env = self.again[region] = Copies()
            for m in self.nodes[region]:
                kept = draws(m) or not is_op(m) or may_save(m)
                env[m] = m if kept else self.copy(m, region, env)
        return env[n]

    def copy(self, m: Node, region: Any, env: Copies) -> Any:
        self.b.meta = {**line_of(m), "region": ("again", region)}
        return self.b.call_like(m, env)


class Copies(dict[Node, Any]):
    """Copies by node; a node without one returns itself."""

    def __missing__(self, n: Node) -> Node:
        return n


def line_of(n: Node) -> dict[str, Any]:
    return {"line": n.meta["line"]} if "line" in n.meta else {}


def is_op(n: Node) -> bool:
    """Return whether a node may be recomputed: an op, a loop or a branch."""
    target = n.target
    return (
        isinstance(target, OpOverload) or target is operator.getitem or hasattr(target, "bodies")
    )


def reverse(
    b: Builder,
    outs: Sequence[Any],
    cts: Sequence[Node | None],
    wrt: Sequence[Node],
    recompute: bool = False,
) -> list[Node | None]:
    """Return the cotangents of ``wrt`` for the cotangents ``cts`` of ``outs``; ``None`` if nothing
    depends on one.

    Zeros of ops whose derivative is zero are passed on as any other value: autograd sees what they
    are multiplied by. Below a user's backward that returns None a value may get zeros.

    With ``recompute`` the values of checkpointed regions are computed again instead of kept."""
    active = active_nodes(list(b.graph.nodes), wrt, zeros=True)
    regions = Regions(b) if recompute else None
    ct: dict[Node, Any] = {}
    passed: set[Node] = set()  # by a backward without a cotangent

    def give(n: Any, g: Node | None) -> None:
        if g is None or not isinstance(n, Node) or n not in active:
            return
        ct[n] = b.call(aten.add.Tensor, ct[n], g) if n in ct else g

    for out, g in zip(outs, cts, strict=True):
        give(out, g)
    wanted = set(wrt)
    found: dict[Node, Node] = {}
    for n in with_progress("vjp", list(active)[::-1]):
        g = ct.pop(n, None)
        if g is None and n in passed:
            g = n.target.zeros(b) if hasattr(n.target, "zeros") else None
            if g is None:
                passed.update(i for i in n._input_nodes if i in active)
        if g is None:
            continue
        if n in wanted:
            found[n] = g
            if not passes(n, active, zeros=True):
                continue
        if n.target is operator.getitem:
            parent, i = n.args
            parts = ct.setdefault(parent, {})
            parts[i] = b.call(aten.add.Tensor, parts[i], g) if i in parts else g
            continue
        again = regions.recomputed(n) if regions is not None else n
        b.meta = {**line_of(n), "of": n.name}
        for a, ga in zip(*pull(b, n, g, active, again), strict=True):
            give(a, ga)
            if ga is None and hasattr(n.target, "zeros"):
                passed.add(a)
    b.meta = {}
    return [found.get(n) for n in wrt]


def pull(b: Builder, n: Node, g: Any, active: Any, again: Any) -> tuple[list, list]:
    """Return cotangents for the tensor arguments of one node: ``(arguments, cotangents)``, flat.
    ``again`` is the node to read values of."""
    op = n.target
    if op is dead_end:
        return [], []
    if op in (hidden_write, no_tangent, check_gradient, fail):
        return [n.args[0]], [g]
    if op is once:
        raise RuleError(
            "a function marked with @once_differentiable was differentiated "
            f"twice{at(n.meta.get('line'))}"
        )
    if not isinstance(op, OpOverload):
        return op.pull(b, n, g, active, again)
    args = full_args(op, n.args, n.kwargs)
    where = tensor_args(op)
    needs = tuple([is_active(args[i], active) for i in where])
    g = by_output(g, n.meta["val"])
    values = args if again is n else full_args(op, again.args, again.kwargs)
    made = node_outputs(b, again)
    out = mapped(partial(behind_hooks, b), node_outputs(b, n), made)
    hooked = leaves(out) != leaves(made)
    grads = apply(b, ("vjp", op._op, hooked), vjp_make(n, hooked), needs, g, out, *values)
    flat_args: list = []
    flat_grads: list = []
    for i, ga in zip(where, grads, strict=False):
        a = args[i]
        if isinstance(a, list | tuple):
            flat_args += a
            flat_grads += ga if ga is not None else [None] * len(a)
        else:
            flat_args.append(a)
            flat_grads.append(ga)
    return flat_args, flat_grads


def is_active(a: Any, active: Any) -> bool:
    """Return whether an argument, or one of a list, is active."""
    if isinstance(a, list | tuple):
        return any([is_active(x, active) for x in a])
    return a.__class__ is Node and a in active


def by_output(g: Any, val: Any) -> Any:
    """Return the cotangents of a node with this value as lists, if given by output number."""
    return (
        [by_output((g or {}).get(i), v) for i, v in enumerate(val)]
        if isinstance(val, tuple)
        else g
    )


def vjp_make(n: Node, hooked: bool = False) -> Any:
    """Return the builder of this node's reverse fragment: our rule, PyTorch's formula (first for a
    ``hooked`` result: it says where the op saves that), or its decomposition."""
    op = n.target
    entry = entry_for(op)
    rule: Any = no_slope if entry.zero else entry.vjp

    def make(b: Builder, needs: tuple, g: Any, out: Any, *args: Any) -> Any:
        if rule is not None and not (hooked and op not in BY_VALUE and has_formula(op)):
            return by_rule(b, needs, g, out, *args)
        if Facts(op).random:
            raise RuleError(
                f"{op} draws random numbers and has no reverse rule{at(n.meta.get('line'))}"
            )
        try:
            with answered(b, op, args, out):
                return traced(as_arguments(fallback.reverse_rule(op), op), intent=False)(
                    b, needs, g, out, *args
                )
        except fallback.NoFormula as why:
            if rule is not None:
                return by_rule(b, needs, g, out, *args)
            return reverse_by_parts(b, n, needs, g, args, why)

    def by_rule(b: Builder, *given: Any) -> Any:
        with errors_of("reverse", n, rule):
            whole = of_result(op, rule) if hooked else rule
            return traced(as_arguments(whole, op))(b, *given)

    return make


def no_slope(g: Tensor, out: Tensor, *args: Any, needs: tuple[bool, ...]) -> list[Tensor]:
    return [zeros(g)] * len(needs)


def reverse_by_parts(b: Builder, n: Node, needs: tuple, g: Any, args: Any, why: Exception) -> Any:
    """Open the op up and differentiate its parts."""
    op = n.target
    body = fallback.decomposition(op)
    if body is None:
        raise RuleError(
            f"no reverse rule for {op}{at(n.meta.get('line'))}: no rule of ours, no formula of "
            f"PyTorch's ({why}), no decomposition"
        )
    outs = traced(body)(b, *args)
    flat_outs, flat_g = (list(outs), g) if isinstance(outs, list) else ([outs], [g])
    tensors = [args[i] for i in tensor_args(op)]
    wrt = leaves([a for a, need in zip(tensors, needs, strict=True) if need])
    grads = dict(zip(wrt, reverse(b, flat_outs, flat_g, wrt), strict=True))
    return mapped(grads.get, tensors)


def as_arguments(rule: Any, op: OpOverload) -> Any:
    """Return the rule with the chores done: shapes by sums, and dtypes by casts."""
    where = tensor_args(op)

    def fit(ga: Any, a: Any) -> Any:
        if isinstance(a, list | tuple):
            return (
                [None] * len(a) if ga is None else [fit(x, y) for x, y in zip(ga, a, strict=True)]
            )
        if (
            ga is None
            or not isinstance(a, Tensor)
            or not (a.is_floating_point() or a.is_complex())
        ):
            return None
        if not isinstance(ga, Tensor):
            raise ValueError(f"it returned {ga!r}")
        if ga.shape != a.shape:
            ga = unbroadcast(ga, a.shape)
        if ga.dtype != a.dtype:
            if ga.is_complex() and not a.is_complex():
                ga = torch.real(ga)
            ga = ga.to(a.dtype)
        return ga

    def call(needs: tuple, g: Any, out: Any, *args: Any) -> Any:
        g, out = (tuple(x) if isinstance(x, list) else x for x in (g, out))
        grads = rule(g, out, *args, needs=needs)
        grads = [grads] if isinstance(grads, Tensor) else list(grads)
        check_count(grads, len(where))
        grads += [None] * (len(where) - len(grads))
        return [
            fit(ga, args[i]) if need else None
            for ga, i, need in zip(grads, where, needs, strict=True)
        ]

    return call


def unbroadcast(g: Tensor, shape: torch.Size) -> Tensor:
    """Return ``g`` summed to a shape that broadcasts to its own."""
    lead = g.dim() - len(shape)
    dims = [d for d, n in enumerate(g.shape) if n != 1 and (d < lead or shape[d - lead] == 1)]
    if dims:
        g = g.sum(dims, keepdim=dims[-1] >= lead)
    return g if g.shape == shape else g.reshape(shape)


def vjp(
    program: Program,
    wrt: Sequence[int],
    cts: Sequence[bool] | None = None,
    ones: bool = False,
    fill: bool = False,
    keep: Sequence[int] | None = None,
    recompute: bool = True,
    plan: Sequence[Sig | None] | None = None,
) -> Program:
    """Return the joint program: ``(inputs, cotangents, closed-over) -> (kept outputs,
    gradients)``.

    ``wrt`` are input positions; ``cts`` says which outputs have a cotangent, the rest are zero
    (default: all floating ones have). Cotangents are inputs, or with ``ones`` all ones. The
    gradient of an input on which nothing depends is ``None``, or with ``fill`` zeros. ``keep``
    lists the outputs to return (default: all). ``recompute``: checkpointed regions are computed
    again (a partitioner decides that itself). ``plan``: the signatures of the cotangents of all
    outputs, as they lie in memory (default: contiguous)."""
    with paused_gc():
        b = builder()
        vals = program.vals
        if cts is None:
            cts = [has_derivative(v) for v in vals]
        old = program.placeholders
        new = primals(b, old[: program.n_inputs])
        seeds: list[Any] = [None] * len(vals)
        if not ones:
            for i, v in enumerate(vals):
                if cts[i]:
                    sig = contiguous_sig(v) if plan is None else plan[i]
                    seeds[i] = b.placeholder(f"tangents_{i}", sig, role="tangent")
        new += primals(b, old[program.n_inputs :])
        outs = b.inlined(program, new)
        wanted = [new[i] for i in wrt]
        results = outs[: program.n_outputs]
        if ones:
            seeds = [
                filled_node(b, 1, v) if yes else None for v, yes in zip(vals, cts, strict=True)
            ]
        grads = reverse(b, results, seeds, wanted, recompute)
        if fill:
            grads = [
                filled_node(b, 0, x.meta["val"]) if g is None else g
                for x, g in zip(wanted, grads, strict=True)
            ]
        first = [*(results if keep is None else [results[i] for i in keep]), *grads]
        count = 0 if ones else sum(bool(c) for c in cts)
        mutated = [i if i < program.n_inputs else i + count for i in program.mutated]
        graph = b.finish([*first, *outs[program.n_outputs :]])
        return Program(graph, program.n_inputs + count, len(first), mutated, "vjp")


def primals(b: Builder, placeholders: Sequence[Node]) -> list[Node]:
    """Add placeholders like these: the role "param" stays, any other becomes "primal"."""
    return [
        b.placeholder(
            p.name, p.meta["val"], role="param" if p.meta.get("role") == "param" else "primal"
        )
        for p in placeholders
    ]


def cotangent_sig(sig: Sig, stride: Sequence[int]) -> Sig:
    """Return the signature in which a program takes the cotangent of a value, given the
    cotangent's ``stride``: channels_last if both are, or if the cotangent is expanded and the
    value is, as in eager's kernels; else contiguous."""
    if sig.plain or (form := image_format(sig)) is torch.contiguous_format:
        return contiguous_sig(sig)
    last = make_sig(sig.shape, formatted(sig.shape, form), sig.dtype, sig.device)
    return last if 0 in stride or tuple(stride) == last.stride else contiguous_sig(sig)


def contiguous_sig(sig: Sig) -> Sig:
    """Return the signature of a fresh contiguous tensor of this shape."""
    return (
        sig
        if sig.plain
        else make_sig(sig.shape, contiguous_stride(sig.shape), sig.dtype, sig.device)
    )

"""Find the nodes of a program that a derivative flows through, and the inputs it may reach."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..graph import Program
from ..trace.marks import dead_end, hidden_write
from ..trace.shapes.sig import Sig
from .rules.table import entry_for

aten = torch.ops.aten


def has_derivative(val: Any) -> bool:
    """Return whether a value, or one of several, is of a floating or complex dtype."""
    return (
        any(map(has_derivative, val))
        if isinstance(val, tuple)
        else val.__class__ is Sig and val.differentiable
    )


def active_nodes(nodes: Any, wrt: Sequence[Node], zeros: bool = False) -> dict[Node, None]:
    """Return the nodes through which a derivative by ``wrt`` can flow, in order; with ``zeros``
    also where it is zero or ends, which autograd takes to require grad."""
    active = dict.fromkeys(wrt)
    for n in nodes:
        if n in active:  # one of ``wrt``, which may be computed from another
            active[n] = active.pop(n)
        elif passes(n, active, zeros):
            active[n] = None
    return active


def passes(n: Node, active: dict[Node, None], zeros: bool) -> bool:
    """Return whether a derivative flows through a node from the ``active`` ones before it."""
    if n.op != "call_function" or n.target is aten.detach.default:
        return False
    if n.target is dead_end and not zeros:
        return False
    return any(i in active for i in sources(n)) and (
        has_derivative(n.meta["val"]) and not is_nondiff(n, active, zeros)
    )


def sources(n: Node) -> Sequence[Node]:
    """List the nodes with respect to which a node can have a derivative."""
    if n.target is hidden_write:
        return n.args[:1]  # type: ignore[return-value]
    # a custom derivative's
    count = None if isinstance(n.target, OpOverload) else getattr(n.target, "n_inputs", None)
    return n._input_nodes if count is None else n.args[:count]  # type: ignore[return-value]


def is_nondiff(n: Node, active: dict[Node, None], zeros: bool) -> bool:
    """Return whether a node has no derivative, by its rule or by the outputs it reads."""
    if n.target is operator.getitem:
        parent, i = n.args
        if (live := getattr(parent.target, "live", None)) is not None:  # type: ignore[union-attr]
            return not live(parent, active)[i]
        carrying = entry_for(parent.target).diff_outputs  # type: ignore[union-attr]
        return carrying is not None and i not in carrying
    entry = entry_for(n.target)
    return entry.nondiff and not (zeros and entry.zero)


def live(program: Program, wrt: tuple[int, ...]) -> list[bool]:
    """Return which outputs and new values require grad if the inputs ``wrt`` do."""

    def find() -> list[bool]:
        inputs = program.placeholders
        active = active_nodes(program.graph.nodes, [inputs[i] for i in wrt], zeros=True)
        return [isinstance(o, Node) and o in active for o in program.outputs]

    return program.once(("live", wrt), find)


def flat_inputs(program: Program, wrt: tuple[int, ...]) -> list[set[int]]:
    """List, for each output, the inputs ``wrt`` that reach it through a flat argument of an op. If
    the program has no derivative by one of them, autograd has zeros."""

    def find() -> list[set[int]]:
        inputs = program.placeholders
        reach = {inputs[i]: {i} for i in wrt}  # along paths with a derivative
        still: dict[Any, set[int]] = {}
        for n in active_nodes(program.graph.nodes, list(reach), zeros=True):
            if n.op == "call_function" and n.target is not dead_end:
                read = sources(n)
                reach[n] = set().union(*[reach[i] for i in read if i in reach])
                ends = [reach[i] for i in flat_sources(n) if i in reach]
                still[n] = set().union(*[still[i] for i in read if i in still], *ends)
        return [still.get(o, set()) for o in program.outputs]

    return program.once(("flat", wrt), find)


def flat_arguments(n: Node, program: Program) -> list[Node]:
    """Return the arguments of a node by which the program that it calls, or loops, is flat."""
    wrt = tuple(i for i, a in enumerate(n.args) if has_derivative(a.meta["val"]))  # type: ignore
    return [n.args[i] for i in set().union(*flat_inputs(program, wrt))]  # type: ignore


def flat_sources(n: Node) -> list[Any]:
    """Return the arguments by which a node's op is flat."""
    if (of_call := getattr(n.target, "flat", None)) is not None:
        return of_call(n)
    return [n.args[i] for i in entry_for(n.target).flat]

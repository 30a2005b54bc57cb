"""Dissolve marks of intent in the last pass before a graph is run; no later pass reads them."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..graph import Program
from ..trace.emit import Builder, adds_apart, remap
from ..trace.marks import IDENTITIES, check_gradient, hidden_write
from .rules.recurrent import WORKSPACE, layer, layer_with_workspace
from .tidy import FINAL, rebuilt


def marked(program: Program) -> bool:
    """Return whether the graph carries intent that autograd, run over its ops, would not see."""
    return any(
        n.target in (*IDENTITIES, hidden_write, check_gradient)
        or getattr(n.target, "dissolved_with", "")
        for n in program.graph.nodes
    )


def nothing_but_marks(program: Program) -> bool:
    """Return whether :func:`lowered` does no more than to replace marks by their arguments."""
    return not any(
        hasattr(n.target, "dissolved_with") or n.target is layer for n in program.graph.nodes
    )


MARKS = frozenset({"marks", "customs"})
CALLS = frozenset({"calls"})
EVERYTHING = MARKS | CALLS


def for_backward(n: Node) -> bool:
    """Return whether a node reads the workspace of this recurrent layer."""
    return any(user.args[1] == WORKSPACE for user in n.users)


def lowered(program: Program, dissolve: frozenset[str] = MARKS) -> Program:
    """Return the program, in bodies too, without what ``dissolve`` names: ``marks`` (``detach``,
    hidden writes), ``customs`` (derivatives), ``calls`` (nested compiled ones)."""
    final = dissolve == EVERYTHING
    apart = final and any(
        adds_apart(n.target, n.args, n.meta.get("val")) for n in program.graph.nodes
    )
    backwards = map(for_backward, program.graph.find_nodes(op="call_function", target=layer))
    if not (apart or any(backwards) or marked(program)):
        return program

    def inner(body: Program) -> Program:
        """Return a body lowered; a lowered body returns itself."""
        key = ("lowered", dissolve)
        made = body.once(key, lambda: lowered(body, dissolve))
        return made.once(key, lambda: made)

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        target: Any = n.target
        if "marks" in dissolve and (target in IDENTITIES or target is hidden_write):
            return remap(n.args[target is hidden_write], env)
        if target is layer and for_backward(n):
            return b.node(layer_with_workspace, remap(n.args, env), {}, n.meta["val"])
        kind = getattr(target, "dissolved_with", None)
        if kind == "bodies":
            target, places = target.reading({u.args[1] for u in n.users})
            outs = target.inline(b, remap(n.args, env), inner)
            made = dict(zip(places, outs, strict=True))
            return [made.get(i) for i in range(len(n.meta["val"]))]
        if kind in dissolve:
            return target.inline(b, remap(n.args, env), inner)
        return NotImplemented

    return rebuilt(program, "lower", visit, Builder(FINAL, final=final))

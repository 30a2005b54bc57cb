"""Take the hooks of tensors out of a joint program, in which they have acted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from ..graph import Program
from ..trace.emit import Builder, remap
from .tidy import rebuilt


def unhooked(joint: Program) -> Program:
    """Return a joint program whose hooks have acted: hooks of a value inside of a transform belong
    to that transform, and outer ones differentiate without them, as torch.func's do; hooks in
    bodies of control flow and in nested calls, too."""

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        target: Any = n.target
        if getattr(target, "hooked", False):
            return remap(target.parts(n)[1], env)
        if not any(map(has_hooks, inner_programs(target))):
            return NotImplemented
        args = remap(n.args, env)
        if hasattr(target, "bodies"):
            return target.inline(b, args, lambda p: p.once(unhooked, lambda: unhooked(p)))
        call = target.derived((), lambda: unhooked(target.program), "unhooked")
        return b.make("call_function", call, args, {}, n.meta["val"])

    return rebuilt(joint, joint.name, visit) if has_hooks(joint) else joint


def has_hooks(program: Program) -> bool:
    """Return whether a program has hooks, in bodies of control flow and nested calls too."""

    def find() -> bool:
        targets = [n.target for n in program.graph.nodes]
        return any(
            getattr(t, "hooked", False) or any(map(has_hooks, inner_programs(t))) for t in targets
        )

    return program.once(has_hooks, find)


def inner_programs(target: Any) -> Sequence[Program]:
    """Return the programs of a target: its bodies, or that of a nested call."""
    if getattr(target, "dissolved_with", None) == "calls":
        return (target.program,)
    return getattr(target, "bodies", ())

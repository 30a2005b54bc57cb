"""Control flow in the code of a graph module: calls of these functions, with modules as bodies.
They run, and can be captured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function

from ..runtime.graph_module import graph_module
from . import control_flow


def scan(
    body: Callable,
    constants: Sequence[Tensor],
    init: Sequence[Tensor],
    xs: Sequence[Tensor],
    length: int,
    reverse: bool,
) -> list[Tensor]:
    """:func:`aotfunc.scan` with ``body(*constants, *carry, *row) -> (*carry, *result)``."""

    if has_torch_function(given := (*constants, *init, *xs)):  # torch.fx traces it
        return handle_torch_function(scan, given, body, constants, init, xs, length, reverse)

    def step(carry: list, x: list) -> tuple[list, list]:
        outs = list(body(*constants, *carry, *x))
        return outs[: len(init)], outs[len(init) :]

    carry, ys = control_flow.scan(step, list(init), list(xs), length, reverse)
    return [*carry, *ys]


OPERATORS: dict[str, Callable] = {"scan": scan}


def with_operators(gm: fx.GraphModule, dissolve: frozenset[str]) -> fx.GraphModule:
    """The module with its control flow as calls of :data:`OPERATORS`; the bodies are modules in
    it."""
    found = [n for n in gm.graph.nodes if hasattr(n.target, "bodies")]
    for n in found:
        target: Any = n.target
        with gm.graph.inserting_before(n):
            bodies = []
            for k, body in enumerate(target.bodies):
                name = f"{n.name}_body_{k}" if k or len(target.bodies) > 1 else f"{n.name}_body"
                inner = graph_module(body, name, dissolve=dissolve)
                gm.add_submodule(name, with_operators(inner, dissolve))
                bodies.append(gm.graph.get_attr(name))
            args, kwargs = target.form(n.args)
        n.target, n.args, n.kwargs = OPERATORS[target.__name__], (*bodies, *args), kwargs
    if found:
        gm.recompile()
    return gm

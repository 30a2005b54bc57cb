"""What the steps of a chain call: compiled stages, PyTorch's own ops, and writes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from ..backends.eager import compile_graph
from ..graph import Program, needed_for
from ..trace.emit import Builder, paused_gc, remap
from ..trace.modes import outside_inference_mode, without_modes
from ..trace.nested import leaves
from ..trace.shapes.infer import AFFORDABLE, python_meta, zeros_at
from ..trace.shapes.sig import Facts
from ..transforms.fresh import fresh
from ..transforms.walk import builder


def write(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Give a written input its new value; later values are computed from the input."""
    t, new = values
    t.copy_(new)
    return [t]


def stage_numbers(
    nodes: Sequence[Node], cuts: Collection[Node], lone: Collection[Node] = ()
) -> dict[Node, int]:
    """Return the stage that computes each node: a new one begins where something reads a value
    that is to be cut at. The ``lone`` ones are stages of their own."""
    stage: dict[Node, int] = {}
    number, pending, alone = 0, set[Node](), False
    for n in nodes:
        if n.target is operator.getitem:  # an op with several outputs crosses as its items
            stage[n] = stage[n.args[0]]  # type: ignore[index]
        else:
            if alone or n in lone or not pending.isdisjoint(n._input_nodes):
                number += 1
                pending.clear()
            stage[n], alone = number, n in lone
        if n in cuts:
            pending.add(n)
    return stage


def cut_stages(
    program: Program, cuts: Sequence[Node]
) -> list[tuple[Program, list[Node], list[Node]]]:
    """Return ``(program, what it reads, results)`` of each stage cut at these values."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    stage = stage_numbers(nodes, cuts)
    if not any(stage.values()):
        return []
    wanted = {o for o in program.outputs if isinstance(o, Node)}
    wanted |= {i for n in nodes for i in n._input_nodes if stage.get(i, stage[n]) < stage[n]}
    found: list[tuple[Program, list[Node], list[Node]]] = []
    said: dict[Node, Any] = {}
    for k in range(max(stage.values()) + 1):
        mine = [n for n in nodes if stage[n] == k]
        outs = [n for n in mine if n in wanted]
        reach = needed_for(mine, outs)
        body = [n for n in mine if n in reach]
        read = dict.fromkeys(i for n in body for i in n._input_nodes)
        reads = [i for i in read if stage.get(i, -1) < k]
        found.append((stage_of(body, reads, outs, said), reads, outs))
    return found


def stage_of(
    nodes: Sequence[Node], reads: Sequence[Node], outs: Sequence[Node], said: dict[Node, Any]
) -> Program:
    """Return these nodes as a program of what they read, with the ``said`` signatures."""
    with paused_gc():
        b = builder()
        env: dict[Node, Any] = {
            n: b.placeholder(n.name, said.get(n, n.meta["val"]), role=n.meta.get("role"))
            for n in reads
        }
        b.copy(nodes, env, call_moved)
        program = fresh(
            Program(b.finish([env[n] for n in outs]), len(reads), len(outs), (), "stage"), ()
        )
        said.update(zip(outs, program.vals, strict=True))
        return program


def by_autograd(
    reads: Sequence[Node], calls: Sequence[Node], outs: Sequence[Node], said: dict[Node, Any]
) -> Callable[[Sequence[Tensor]], Sequence]:
    """Return the function that calls PyTorch's own ops, for autograd to record."""
    with paused_gc():
        b = Builder(None, merge=False)
        env: dict[Node, Any] = {
            n: b.placeholder(n.name, said.get(n, n.meta["val"])) for n in reads
        }
        b.copy(calls, env, call_moved)
        said.update({n: env[n].meta["val"] for n in outs})
        fn = compile_graph(b.finish([env[n] for n in outs]))

    def call(values: Sequence[Tensor]) -> Sequence:
        with without_modes():
            return fn(*values)

    return call


def saves_a_result(n: Node) -> bool:
    """Return whether the derivative of PyTorch's op reads a result of it."""
    return bool(saved_results(n, n._input_nodes))


def saved_results(n: Node, active: Container[Node]) -> set[int]:
    """Return which results PyTorch's op keeps for its derivative by the ``active`` ones."""
    found = sample_run(n, active)
    if found is None:
        return set()
    _, results, kept = found
    places = {(t.grad_fn, t.output_nr): i for i, t in results.items()}
    return {places[at] for t in kept if (at := (t.grad_fn, t.output_nr)) in places}


def saves(n: Node, x: Node, active: Container[Node]) -> bool:
    """Return whether a node keeps its argument ``x`` for its derivative by the ``active`` ones; so
    does all that is no op of PyTorch's."""
    found = sample_run(n, active)
    return found is None or any(t is found[0][x] for t in found[2])


@outside_inference_mode
def sample_run(
    n: Node, active: Container[Node]
) -> tuple[dict[Node, Tensor], dict[int, Tensor], list[Tensor]] | None:
    """Return ``(arguments, differentiable results, what it keeps)`` of PyTorch's op, run on zeros
    if its meta kernel would import half of PyTorch; None if neither runs."""
    op = n.target
    if not isinstance(op, OpOverload) or op.namespace != "aten":
        return None
    size = sum(x.meta["val"].numel for x in n._input_nodes)
    zeros = python_meta(op) and not Facts(op).random and size < AFFORDABLE

    def example(x: Node) -> Tensor:
        val = x.meta["val"]
        t = zeros_at(val) if zeros else val.fresh()
        return t.requires_grad_(val.differentiable and x in active)

    set_aside = torch._C._autograd._saved_tensors_hooks_set_tracing
    aside = set_aside(True)  # the caller's saved_tensors_hooks
    try:
        with torch.enable_grad(), without_modes(), _disable_current_modes():
            given = {x: example(x) for x in n._input_nodes}
            args, kwargs = remap((n.args, n.kwargs), given)
            found = dict(enumerate(leaves(op(*args, **kwargs))))
    except (RuntimeError, IndexError):
        return None
    finally:
        set_aside(aside)
    results = {i: t for i, t in found.items() if isinstance(t, Tensor) and t.grad_fn is not None}
    made = {t.grad_fn for t in results.values()}
    kept = [getattr(fn, name) for fn in made for name in dir(fn) if name.startswith("_saved_")]
    return given, results, [t for t in leaves(kept) if isinstance(t, Tensor)]


def call_moved(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
    """Copy a call, some of whose arguments may be laid out otherwise."""
    return b.call_like(n, env, moved=True)

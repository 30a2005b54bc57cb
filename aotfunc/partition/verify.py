"""Check a split after every partition: its structure alone, in one pass over the nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from ..errors import PartitionError
from .ops import base, gathers_again, is_single, once
from .roles import Joint, describe, read_joint


def verify(
    fw: fx.GraphModule, bw: fx.GraphModule, joint: fx.GraphModule, *, num_fwd_outputs: int
) -> None:
    """Check that ``fw`` followed by ``bw`` computes what ``joint`` does; raise PartitionError if
    not."""
    check(fw, bw, read_joint(joint.graph, num_fwd_outputs))


def check(fw: fx.GraphModule, bw: fx.GraphModule, roles: Joint) -> None:
    """Check that ``fw`` followed by ``bw`` computes what a joint graph does that was read before;
    raise PartitionError if not.

    Inputs and outputs are in the right order, ``None`` included; every other node is the joint
    graph's node of the same name, on the same arguments; what may run only once does; draws and
    effects all run, in order; no storage is saved twice."""
    named = {n.name: n for n in roles.nodes}
    early, late = list(fw.graph.nodes), list(bw.graph.nodes)
    saved = late_args(early, len(roles.early_outputs))

    expect("forward inputs", inputs_of(early), [n.name for n in roles.early_inputs])
    expect(
        "forward outputs",
        outputs_of(early)[: len(roles.early_outputs)],
        by_name(roles.early_outputs),
    )
    expect(
        "backward inputs",
        [name.removesuffix("_host") for name in inputs_of(late)],
        [*saved, *[n.name for n in roles.late_inputs]],
    )
    back = {n for n in late if is_brought_back(n)}
    expect("gradients", outputs_of(late), by_name(roles.late_outputs))
    for graph in (early, late):
        for n in graph:
            if n.op in ("placeholder", "output") or n in back or is_handed_copy(n):
                continue
            if (original := named.get(first_name(n))) is None:
                raise PartitionError(f"{describe(n)} is not in the joint graph")
            check_copy(n, original)
            if original.name != n.name and once(original):
                raise PartitionError(f"{describe(original)} runs in the backward and again there")

    run_early, run_late = (
        [n.name for n in g if n.op not in ("placeholder", "output") and n not in back]
        for g in (early, late)
    )
    for name in set(run_early) & set(run_late):
        if once(named[name]):
            raise PartitionError(
                f"{describe(named[name])} runs in the forward and again in the backward"
            )
    for name in run_early:
        if name in named and roles.late[roles.index[named[name]]]:
            raise PartitionError(
                f"{describe(named[name])} depends on a cotangent and stands in the forward"
            )
    pinned = {
        n.name: late
        for n, pin, late in zip(roles.nodes, roles.pinned, roles.late, strict=True)
        if pin
    }
    for what, run, side in (("forward", run_early, False), ("backward", run_late, True)):
        due = [name for name, late in pinned.items() if late is side]
        ran = [
            name
            for name in run
            if name in pinned and (pinned[name] is side or not gathers_again(named[name]))
        ]
        expect(f"draws and effects of the {what}", ran, due)
    check_saved([named[s] for s in saved], early[-1].args[0][len(roles.early_outputs) :])


def check_saved(saved: list[Node], handed: Sequence[Node]) -> None:
    """Refuse to hand over a tuple, a storage twice, or an input that will be overwritten."""
    owners: dict[Node, Node] = {}
    for n, given in zip(saved, handed, strict=True):
        if not is_single(n):
            raise PartitionError(f"{describe(n)} is saved, but is no tensor or number")
        if owners.setdefault(base(n), n) is not n:
            raise PartitionError(
                f"{describe(n)} and {describe(owners[base(n)])} are saved and share a storage"
            )
        if n.op == "placeholder" and n.meta.get("mutated") and given.op == "placeholder":
            raise PartitionError(
                f"the input {n.name} is saved as it is, but is overwritten after the forward"
            )


def check_copy(n: Node, original: Node) -> None:
    """Refuse ``n`` unless it is the same call on the same arguments."""
    if n.op != original.op or (n.target is not original.target and n.target != original.target):
        raise PartitionError(f"{n.name} was {original.target} and became {n.target}")
    if not equal_by_name(n.args, original.args) or not equal_by_name(n.kwargs, original.kwargs):
        raise PartitionError(f"the arguments of {describe(original)} became {n.args}, {n.kwargs}")


def equal_by_name(a: Any, b: Any) -> bool:
    """Return whether arguments of nodes of two graphs are equal, where nodes are compared by
    name."""
    if a is b:
        return True
    if a.__class__ is not b.__class__ and not (
        isinstance(a, tuple | list) and isinstance(b, tuple | list)
    ):
        return False
    if a.__class__ is Node:
        return first_name(a) == b.name
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all([equal_by_name(x, y) for x, y in zip(a, b, strict=True)])
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all([equal_by_name(a[k], b[k]) for k in a])
    if isinstance(a, slice):
        return equal_by_name((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return bool(a == b) or (a != a and b != b)


def first_name(n: Node) -> str:
    """Return the name of the node of the joint graph that ``n`` runs, be it once more."""
    return n.meta.get("again", n.name)


def is_clone_of_input(n: Node) -> bool:
    cloned = n.args[0] if n.target is torch.ops.aten.clone.default else None
    return isinstance(cloned, Node) and cloned.op == "placeholder"


def inputs_of(nodes: list[Node]) -> list[str]:
    return [n.name for n in nodes if n.op == "placeholder"]


def outputs_of(nodes: list[Node]) -> list[Any]:
    return by_name(nodes[-1].args[0])  # type: ignore[arg-type]


def by_name(values: Sequence[Any]) -> list[Any]:
    return [v.name if isinstance(v, Node) else v for v in values]


def late_args(early: list[Node], num_outputs: int) -> list[str]:
    """Return the names under which the backward gets what the forward hands over."""
    handed = early[-1].args[0][num_outputs:]  # type: ignore[index]
    return [n.args[0].name if is_handed_copy(n) else n.name for n in handed]


def is_handed_copy(n: Node) -> bool:
    """Return whether the node is made to be handed over: a clone of an input, or a copy on the
    host."""
    hosted = n.target is torch.ops.aten._to_copy.default and n.name.endswith("_host")
    return hosted or (n.name.endswith("_kept") and is_clone_of_input(n))


def is_brought_back(n: Node) -> bool:
    """Return whether the node is the value that its input had before it went to the host."""
    source = n.args[0] if n.target is torch.ops.aten._to_copy.default else None
    return (
        isinstance(source, Node)
        and source.op == "placeholder"
        and (source.name == f"{n.name}_host")
    )


def expect(what: str, got: list[Any], wanted: list[Any]) -> None:
    if got != wanted:
        raise PartitionError(f"{what}: expected {wanted}, got {got}")

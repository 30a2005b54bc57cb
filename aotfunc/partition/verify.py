"""Check a split after every partition: its structure alone, in one pass over the nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from ..errors import PartitionError
from .ops import base, gathers_again, is_single, once
from .roles import Joint, describe, read_joint

aten = torch.ops.aten
Names = Mapping[Node, str]
LISTS = (tuple, list)


def verify(
    fw: fx.GraphModule, bw: fx.GraphModule, joint: fx.GraphModule, *, num_fwd_outputs: int
) -> None:
    """Check that ``fw`` followed by ``bw`` computes ``joint``; raise PartitionError if not."""
    check(fw, bw, read_joint(joint.graph, num_fwd_outputs))


def check(fw: fx.GraphModule, bw: fx.GraphModule, roles: Joint) -> None:
    """Check that ``fw`` followed by ``bw`` computes what a joint graph does that was read before;
    raise PartitionError if not.

    Inputs and outputs are in the right order, ``None`` included; every other node is the joint
    graph's node of the same name, on the same arguments; what may run only once does; draws and
    effects all run, in order; no storage is saved twice."""
    named = {n.name: n for n in roles.nodes}
    early, late = list(fw.graph.nodes), list(bw.graph.nodes)
    first = first_names((*early, *late), named)
    outputs: Any = early[-1].args[0]
    results = outputs[: len(roles.early_outputs)]
    handed = outputs[len(roles.early_outputs) :]
    saved = [first[n] for n in handed]

    expect("forward inputs", inputs_of(early, first), [n.name for n in roles.early_inputs])
    expect("forward outputs", by_name(results, first), by_name(roles.early_outputs))
    due = [*saved, *[n.name for n in roles.late_inputs]]
    expect("backward inputs", inputs_of(late, first), due)
    gradients: Any = late[-1].args[0]
    expect("gradients", by_name(gradients, first), by_name(roles.late_outputs))
    run_early, run_late = (
        [n for n in nodes if n.op not in ("placeholder", "output") and not is_moved(n, first)]
        for nodes in (early, late)
    )
    for n in (*run_early, *run_late):
        if (original := named.get(first[n])) is None:
            raise PartitionError(f"{describe(n)} is not in the joint graph")
        check_copy(n, original, first)
        if original.name != n.name and once(original):
            raise PartitionError(f"{describe(original)} runs in the backward and again there")
    for n in run_early:
        if roles.late[roles.index[named[first[n]]]]:
            raise PartitionError(f"{describe(n)} depends on a cotangent and stands in the forward")
    for name in {first[n] for n in run_early} & {first[n] for n in run_late}:
        if once(named[name]):
            raise PartitionError(
                f"{describe(named[name])} runs in the forward and again in the backward"
            )
    pinned = {
        n.name: late
        for n, pin, late in zip(roles.nodes, roles.pinned, roles.late, strict=True)
        if pin
    }
    for what, run, side in (("forward", run_early, False), ("backward", run_late, True)):
        due = [name for name, late in pinned.items() if late is side]
        names = [first[n] for n in run if first[n] in pinned]
        ran = [x for x in names if pinned[x] is side or not gathers_again(named[x])]
        expect(f"draws and effects of the {what}", ran, due)
    check_saved([named[s] for s in saved], handed)


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


def check_copy(n: Node, original: Node, first: Names) -> None:
    """Refuse ``n`` unless it is the same call on the same arguments."""
    if n.op != original.op or (n.target is not original.target and n.target != original.target):
        raise PartitionError(f"{n.name} was {original.target} and became {n.target}")
    same = equal_by_name(n.args, original.args, first)
    named = n.kwargs or original.kwargs
    if not same or (named and not equal_by_name(n.kwargs, original.kwargs, first)):
        raise PartitionError(f"the arguments of {describe(original)} became {n.args}, {n.kwargs}")


def equal_by_name(a: Any, b: Any, first: Names) -> bool:
    """Return whether arguments of two graphs' nodes are equal, with nodes by their names."""
    if a is b:
        return True
    if a.__class__ is Node:
        return b.__class__ is Node and first[a] == b.name
    if isinstance(a, LISTS) and isinstance(b, LISTS):
        if len(a) != len(b):
            return False
        for x, y in zip(a, b, strict=True):  # literals are shared
            if x is not y and not equal_by_name(x, y, first):
                return False
        return True
    if a.__class__ is not b.__class__:
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all([equal_by_name(a[k], b[k], first) for k in a])
    if isinstance(a, slice):
        return equal_by_name((a.start, a.stop, a.step), (b.start, b.stop, b.step), first)
    return bool(a == b) or (a != a and b != b)


def first_names(nodes: Iterable[Node], named: Collection[str]) -> dict[Node, str]:
    """Return for each node of the halves the name of the node of the joint graph that it stands
    for: its own, else the one that it was given with the name."""
    return {n: n.name if n.name in named else n.meta.get("original", n.name) for n in nodes}


def is_moved(n: Node, first: Names) -> bool:
    """Return whether the node is the value of another one that is handed over: a clone of an
    input, a copy on the host, or that copy, an input there, brought back."""
    if n.target is not aten.clone.default and n.target is not aten._to_copy.default:
        return False
    source = n.args[0]
    return isinstance(source, Node) and n.name != source.name and first[n] == first[source]


def inputs_of(nodes: Sequence[Node], first: Names) -> list[str]:
    return [first[n] for n in nodes if n.op == "placeholder"]


def by_name(values: Sequence[Any], first: Names | None = None) -> list[Any]:
    """Return values with nodes replaced by their names, or by those that they stand for."""
    return [(first[v] if first else v.name) if isinstance(v, Node) else v for v in values]


def expect(what: str, got: list[Any], wanted: list[Any]) -> None:
    if got != wanted:
        raise PartitionError(f"{what}: expected {wanted}, got {got}")

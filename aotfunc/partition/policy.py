"""The two partitions: what may be saved, what may be computed again, and at which price.

Both are the same cut (``solve.py``) with other prices. Some values cost nothing or are ruled out,
for everyone:

- views and constants are never saved: a view is redone from the tensor that owns the storage;
- of tuples the parts are saved; inputs and parameters are kept by the caller anyway, so saving
  them is free;
- draws, effects and unknown ops never run twice;
- the inside of a ``torch.utils.checkpoint`` region is not saved, except draws and what the forward
  reads outside;
- *free* values, which only the backward needs, run once on either side, so only what must be kept
for them counts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx import Node

from .cost import Cost, Roofline, nbytes
from .ops import base, is_random, is_single, is_symbol, is_view, once, region
from .roles import Joint, PartitionError, ancestors, describe, read_joint
from .solve import INF, min_cut
from .split import module, split
from .verify import verify


def default_partition(
    joint_module: fx.GraphModule,
    joint_inputs: Sequence[Any] = (),
    *,
    num_fwd_outputs: int,
    **functorch: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split without computing any kernel twice, saving as few bytes as that allows.

    ``joint_module`` maps ``(*primals, *tangents)`` to ``(*outputs, *gradients)``. Returns
    ``fw(*primals) -> (*outputs, *saved)`` and ``bw(*saved, *tangents) -> gradients``. Values that
    no output needs (``cos(x)`` for the derivative of ``sin(x)``) are computed on the side where
    less has to be kept for them. ``joint_inputs`` and further keywords are accepted because
    callers of functorch's partitioners pass them. Raises PartitionError if an output depends on a
    tangent.

    >>> fw, bw = default_partition(joint, num_fwd_outputs=1)  # doctest: +SKIP
    >>> print(table(residuals(fw)))  # doctest: +SKIP
    """
    return partition(joint_module, num_fwd_outputs, Roofline(), INF)


def min_cut_rematerialization_partition(
    joint_module: fx.GraphModule,
    joint_inputs: Sequence[Any] = (),
    *,
    num_fwd_outputs: int,
    cost: Cost | None = None,
    price: float = 1.0,
    **functorch: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split at the least "bytes saved + ``price`` x recomputation time", which is found exactly.

    As :func:`default_partition` otherwise. ``cost`` says how long an op takes, in bytes of memory
    traffic (default: :class:`Roofline`). Under it and at a price of 1 only what a backend fuses is
    worth computing again; products, convolutions and reductions run once. A price of 0 saves the
    least that is possible."""
    return partition(joint_module, num_fwd_outputs, cost or Roofline(), price)


def partition(
    joint_module: fx.GraphModule, num_fwd_outputs: int, cost: Cost, price: float
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Read the joint graph, choose what to save, split, verify."""
    joint = read_joint(joint_module.graph, num_fwd_outputs)
    reasons = choose(joint, cost, price)
    early, late = split(joint, list(reasons))
    fw, bw = module(joint_module, early, "forward"), module(joint_module, late, "backward")
    fw.meta["num_fwd_outputs"] = num_fwd_outputs
    fw.meta["reasons"] = {n.name: reason for n, reason in reasons.items()}
    verify(fw, bw, joint_module, num_fwd_outputs=num_fwd_outputs)
    return fw, bw


def choose(joint: Joint, cost: Cost, price: float) -> dict[Node, str]:
    """The nodes to save, tensors before sizes, each with the reason."""
    if not joint.needed:
        return {}
    nodes = joint.nodes
    inside, border = regions(joint)
    relevant = [i for i, wanted in enumerate(ancestors(joint.inputs, joint.needed)) if wanted]
    local = {i: k for k, i in enumerate(relevant)}

    save, redo, again, why = [], [], [], []
    for i in relevant:
        n = nodes[i]
        fixed = INF if n.op == "placeholder" or once(n) or i in border else 0.0
        time = cost.time(n)
        # the price of a second run; inside a checkpointed region that was asked for, and the price
        # only breaks ties
        second = time and (min(price, 1.0) * time if i in inside else price * time)
        again.append(fixed or second)
        redo.append(fixed or (second if joint.forward[i] else 0.0))
        save.append(saving_cost(n, i in inside and i not in border))
        why.append(reason(n, i in border, price == INF))

    inputs = [[local[p] for p in joint.inputs[i]] for i in relevant]
    needed = [local[i] for i in joint.needed]
    check_feasible([nodes[i] for i in relevant], save, redo, inputs, needed)
    while True:
        saved = min_cut(save, redo, inputs, needed)
        in_forward = ancestors(inputs, [k for k, s in enumerate(saved) if s])
        in_backward = ancestors(inputs, [k for k in needed if not saved[k]], stop=saved)
        # a free value turned out to run on both sides: its second run has its price after all
        twice = [
            k
            for k in range(len(save))
            if in_forward[k] and in_backward[k] and not saved[k] and redo[k] < again[k]
        ]
        if not twice:
            break
        for k in twice:
            redo[k] = again[k]
    chosen = [k for k in range(len(save)) if saved[k]]
    chosen.sort(key=lambda k: is_symbol(nodes[relevant[k]]))
    return {nodes[relevant[k]]: why[k] for k in chosen}


def saving_cost(n: Node, inside: bool) -> float:
    """What saving the value of ``n`` costs: bytes, next to nothing for sizes and inputs, infinite
    where ruled out."""
    if is_symbol(n):
        return 1.0
    if n.op == "placeholder":  # free, but not worth holding for its sizes alone
        return float(nbytes(n.meta.get("val"))) if n.meta.get("mutated") else 8.0
    if n.op == "get_attr" or is_view(n) or not is_single(n) or (inside and not once(producer(n))):
        return INF
    return float(nbytes(n.meta["val"]))


def producer(n: Node) -> Node:
    """The node that computes ``n``: for a part of a tuple that of the tuple."""
    while n.target is operator.getitem:
        n = n.all_input_nodes[0]
    return n


def reason(n: Node, border: bool, never: bool) -> str:
    """Why a saved value is saved, for the report."""
    if n.op == "placeholder":
        return "parameter" if n.meta.get("role") == "param" else "input"
    if is_symbol(n):
        return "size"
    if is_random(producer(n)):
        return "random: may run only once"
    if once(producer(n)):
        return "may run only once"
    if border:
        return "border of a checkpointed region"
    return "read by the backward" if never else "cheaper to keep than to compute again"


def regions(joint: Joint) -> tuple[set[int], set[int]]:
    """The nodes inside of checkpointed regions, and those among them that the forward reads
    outside of their region.

    A free value computed from the inside belongs to it: saved, it would take the memory that the
    region is to save."""
    nodes, inputs = joint.nodes, joint.inputs
    lies_in: dict[int, Any] = {}
    for i, n in enumerate(nodes):
        if joint.late[i] or n.op in ("placeholder", "get_attr"):
            continue
        own = region(n)
        if own is None and not joint.forward[i]:
            own = next((lies_in[p] for p in inputs[i] if p in lies_in), None)
        if own is not None:
            lies_in[i] = own
    read = {joint.index[o] for o in joint.early_outputs if isinstance(o, Node)}
    for i in range(len(nodes)):
        if joint.forward[i]:
            read.update(p for p in inputs[i] if p in lies_in and lies_in.get(i) != lies_in[p])
    border = {joint.index[base(nodes[i])] for i in read} & lies_in.keys()
    return set(lies_in), border


def check_feasible(
    nodes: list[Node],
    save: list[float],
    redo: list[float],
    inputs: list[list[int]],
    needed: list[int],
) -> None:
    """Raise PartitionError if the backward needs a value that may be neither saved nor computed
    again."""
    at_hand: list[bool] = []
    for k in range(len(nodes)):
        at_hand.append(save[k] < INF or (redo[k] < INF and all([at_hand[p] for p in inputs[k]])))
    for k in needed:
        if not at_hand[k]:
            while redo[k] < INF:  # to the one that is to blame
                k = next(p for p in inputs[k] if not at_hand[p])
            raise PartitionError(
                f"the backward needs {describe(nodes[k])}, which can neither be saved (it is a "
                "tuple, a view, a constant or inside a checkpointed region) nor computed again "
                "(it draws, has an effect, or nothing may run twice)"
            )

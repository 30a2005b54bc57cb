"""Call others' partition functions, in PyTorch's words, and check what they return."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx import Node

from ..debug import at, user_line
from ..errors import PartitionError
from .ops import is_random
from .roles import Joint, ancestors, describe, read_joint


def cut_by(
    partition: Callable, joint: fx.GraphModule, n_early: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return the two halves that ``partition`` makes of a joint graph with ``n_early`` results.

    A draw that no result depends on would be left to the backward, or out: it is made a result
    meanwhile. Raises PartitionError if the halves do not fit together, or if not every draw runs
    once, where the function drew."""
    roles = read_joint(joint.graph, n_early)
    for n, forward in zip(roles.nodes, roles.forward, strict=True):
        n.meta["partitioner_tag"] = "is_forward" if forward else "is_backward"
    extra = [single(n) for n in early_unread_draws(roles)]
    if extra:
        set_outputs(joint, [*roles.early_outputs, *extra, *roles.late_outputs])
    inputs = [n.meta["val"] for n in joint.graph.nodes if n.op == "placeholder"]
    forward, backward = partition(joint, inputs, num_fwd_outputs=n_early + len(extra))
    erase_leftovers(
        backward, {n.name for n, late in zip(roles.nodes, roles.late, strict=True) if not late}
    )
    check_partition(
        roles, forward, backward, len(extra), getattr(partition, "__name__", repr(partition))
    )
    if extra:
        outs = outputs(forward)
        set_outputs(forward, outs[:n_early] + outs[n_early + len(extra) :])
        forward.meta["num_fwd_outputs"] = n_early
    return forward, backward


def early_unread_draws(roles: Joint) -> list[Node]:
    """Return the draws of the forward that no result depends on."""
    read = ancestors(
        roles.inputs, [roles.index[o] for o in roles.early_outputs if isinstance(o, Node)]
    )
    marks = zip(roles.nodes, roles.late, read, strict=True)
    return [n for n, late, seen in marks if is_random(n) and not late and not seen]


def single(n: Node) -> Node:
    """Return the node, or the first of its several values."""
    val = n.meta["val"]
    if not isinstance(val, tuple | list):
        return n
    with n.graph.inserting_after(n):
        item = n.graph.call_function(operator.getitem, (n, 0))
    item.meta["val"] = val[0]
    return item


def outputs(gm: fx.GraphModule) -> list[Any]:
    return list(next(iter(reversed(gm.graph.nodes))).args[0])  # type: ignore[arg-type]


def set_outputs(gm: fx.GraphModule, values: list[Any]) -> None:
    next(iter(reversed(gm.graph.nodes))).args = (tuple(values),)
    gm.recompile()


def erase_leftovers(backward: fx.GraphModule, early: set[str]) -> None:
    """Drop the draws of the forward that stand in the backward and are not read: PyTorch copies
    them along, and no elimination of dead code dares to take them away."""
    for n in reversed(backward.graph.nodes):
        if is_random(n) and n.name in early and not n.users:
            backward.graph.erase_node(n)
    backward.recompile()


def check_partition(
    roles: Joint, forward: fx.GraphModule, backward: fx.GraphModule, extra: int, name: str
) -> None:
    """Refuse halves that do not fit each other and the joint graph, or in which a draw does not
    run once, on its own side, in order."""

    def wrong(what: str) -> PartitionError:
        return PartitionError(f"partition_fn={name}: {what}{at(user_line())}")

    def inputs(gm: fx.GraphModule) -> int:
        return sum(n.op == "placeholder" for n in gm.graph.nodes)

    residuals = len(outputs(forward)) - len(roles.early_outputs) - extra
    sizes = {
        "inputs of the forward": (inputs(forward), len(roles.early_inputs)),
        "inputs of the backward": (inputs(backward), residuals + len(roles.late_inputs)),
        "gradients": (len(outputs(backward)), len(roles.late_outputs)),
    }
    for what, (got, due) in sizes.items():
        if got != due or residuals < 0:
            raise wrong(
                f"{what}: {got} instead of {due}; the halves are (inputs) -> (results, residuals) "
                "and (residuals, cotangents) -> gradients"
            )
    for what, gm, side in (("forward", forward, False), ("backward", backward, True)):
        drawn = [
            n
            for n, late in zip(roles.nodes, roles.late, strict=True)
            if is_random(n) and late is side
        ]
        draws = [n for n in gm.graph.nodes if is_random(n)]
        if [draw_of(n) for n in draws] != [draw_of(n) for n in drawn]:
            raise wrong(
                f"the {what} draws {', '.join(map(describe, draws)) or 'nothing'}, and should "
                f"draw {', '.join(map(describe, drawn)) or 'nothing'}: random numbers are drawn "
                "once, in the order of the function, and saved for the backward. aotfunc's own "
                "partitions see to that."
            )


def draw_of(n: Node) -> tuple:
    vals = n.meta["val"]
    return n.target, [
        tuple(v.shape)
        for v in (vals if isinstance(vals, tuple | list) else [vals])
        if v is not None
    ]

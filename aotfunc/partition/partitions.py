"""Cut a joint graph into a forward and a backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from ..debug import at, user_line
from ..errors import ArgumentError, PartitionError
from ..graph import n_ops
from ..trace.emit import paused_gc
from .budget import Budget, as_budget
from .cost import Cost, Flops, Roofline
from .ops import is_uneven
from .policies import Policy
from .problem import Choice, Problem
from .profile import Profiled
from .report import Report, bytes_text
from .roles import read_joint
from .solve import INF
from .split import module, split
from .verify import check
from .within import Within


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

    >>> from aotfunc.partition import residuals
    >>> def told(joint, inputs, num_fwd_outputs):
    ...     fw, bw = default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs)
    ...     print([(r.name, r.bytes) for r in residuals(fw)])
    ...     return fw, bw
    >>> f = aot_function(lambda x: x.exp().sin(), "eager", partition_fn=told)
    >>> y = f(torch.ones(2, requires_grad=True))
    [('exp', 8)]
    """
    problem = Problem(read_joint(joint_module.graph, num_fwd_outputs), Roofline())
    return verified_split(joint_module, problem, problem.cheapest(INF))


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
    least that is possible.

    >>> cut = min_cut_rematerialization_partition
    >>> f = aot_function(lambda x: x.sin().exp().cos(), "eager", partition_fn=cut)
    >>> x = torch.ones(2, requires_grad=True)
    >>> len(f.lower(x).graphs["backward"].graph.nodes) > 5  # sin and exp run again
    True
    """
    problem = Problem(read_joint(joint_module.graph, num_fwd_outputs), cost or Roofline())
    return verified_split(joint_module, problem, problem.cheapest(price))


class Partition(NamedTuple):
    """The two halves of a joint graph: ``fw(*inputs) -> (*results, *saved)`` and ``bw(*saved,
    *cotangents) -> gradients``, and the report on them."""

    fw: fx.GraphModule
    bw: fx.GraphModule
    report: Report

    def __repr__(self) -> str:
        sizes = f"forward of {n_ops(self.fw.graph)} ops, backward of {n_ops(self.bw.graph)}"
        return f"<partition: {sizes}, {bytes_text(self.report.bytes)} saved>"


def partition(
    joint: fx.GraphModule,
    *,
    memory_budget: float | int | str | Budget = 1.0,
    policy: Policy | None = None,
    cost: str | Cost = "fused",
    exact: bool = False,
    num_fwd_outputs: int | None = None,
) -> Partition:
    """Split a joint graph so that what the budget allows is saved and the least is computed again.

    ``joint`` maps ``(*inputs, *cotangents)`` to ``(*results, *gradients)``, the first
    ``num_fwd_outputs`` being results; graphs that :meth:`Compiled.lower` calls "joint" know it.

    ``memory_budget``:

    - a share, from 0.0, the least bytes worth having (fewer would only make the simulated peak
      higher), to 1.0, nothing computed twice;
    - a number of bytes or a text such as ``"512MiB"``: at most so much is saved beyond the inputs;
    - ``Peak("6GiB")``: at most so much lives at one time, as simulated;
    - ``Time(0.1)``: at most a tenth of the forward is computed again, and as few bytes are saved.

    Under a share below 1, and a ``Peak`` that is not met without, the backward also computes once
    more what lives at its peak without being read there, for up to 5 % of the forward's time
    (``report.anew``).

    ``policy`` says which values may be saved at all (:mod:`aotfunc.partition.policies`), the
    budget how much of them is.

    ``cost`` is what computing again costs: "fused" for backends that fuse elementwise ops,
    "roofline" for those that run op by op, "flops" to count products, convolutions and attention
    only, "profiled" for measured times, or an object with a ``time(node)``.

    The choice is a minimum cut, the cheapest at its price; the report says how far from the best
    within the budget it can be at most. Where that is over 0.1 % within bytes or time, a better
    one is looked for (:mod:`aotfunc.partition.exact`); ``exact`` looks, also for shares, until it
    is the best. Raises PartitionError if the budget is below the least that is possible, and says
    what that is.

    >>> from aotfunc import jit
    >>> x = torch.ones(256, 256, requires_grad=True)
    >>> joint = jit(lambda x: (x @ x).sin().exp().sum()).lower(x).graphs["joint"]
    >>> partition(joint).report.bytes, partition(joint, memory_budget="300kB").report.bytes
    (524288, 262144)
    >>> partition(joint)
    <partition: forward of 4 ops, backward of 7, 524.3 kB saved>
    """
    count = joint.meta.get("num_fwd_outputs") if num_fwd_outputs is None else num_fwd_outputs
    if count is None:
        raise ArgumentError("partition: num_fwd_outputs must say how many outputs are results")
    budget = as_budget(memory_budget)
    with paused_gc():
        problem = Problem(read_joint(joint.graph, count), as_cost(cost), policy)
        within = Within(problem, exact)
        choice = within.choice(budget)
        run = within.run_under(choice, budget)
        fw, bw = verified_split(joint, problem, choice, (run.early, run.late))
    return Partition(fw, bw, Report(fw, within, choice, budget))


@dataclass(frozen=True)
class Budgeted:
    """:func:`partition` as ``(joint, inputs, *, num_fwd_outputs) -> (fw, bw)``."""

    memory_budget: float | int | str | Budget = 1.0
    policy: Policy | None = None

    def __post_init__(self) -> None:
        as_budget(self.memory_budget)  # said where it is given

    def __call__(
        self,
        joint: fx.GraphModule,
        joint_inputs: Sequence[Any] = (),
        *,
        num_fwd_outputs: int,
        cost: str | Cost = "fused",
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if any(map(is_uneven, joint.graph.nodes)):
            raise PartitionError(
                "a memory_budget or policy would cut the program otherwise on each process, whose "
                f"part of a DTensor (to_local, from_local) has another size{at(user_line())}: "
                "leave it out and use checkpoint, or pad the DTensor"
            )
        fw, bw, _ = partition(
            joint,
            memory_budget=self.memory_budget,
            policy=self.policy,
            cost=cost,
            num_fwd_outputs=num_fwd_outputs,
        )
        return fw, bw


def under(partition_fn: Callable, cost: Cost) -> Callable:
    """Return a partition function under a cost; one that is not ours has costs of its own."""
    ours = partition_fn is min_cut_rematerialization_partition
    if not (ours or isinstance(partition_fn, Budgeted)):
        return partition_fn
    return functools.partial(partition_fn, cost=cost)


def verified_split(
    joint: fx.GraphModule,
    problem: Problem,
    choice: Choice,
    orders: tuple[list[int], list[int]] | None = None,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split the joint graph at a choice, its halves in these orders, and verify them."""
    count = len(problem.joint.early_outputs)
    reasons = problem.reasons(choice)
    early, late = split(problem.joint, list(reasons), problem.offloaded(choice), orders)
    fw, bw = module(joint, early, "forward"), module(joint, late, "backward")
    fw.meta["num_fwd_outputs"] = count
    fw.meta["reasons"] = {n.name: reason for n, reason in reasons.items()}
    check(fw, bw, problem.joint)
    return fw, bw


COSTS: dict[str, Callable[[], Cost]] = {
    "fused": Roofline,
    "roofline": lambda: Roofline(fused=1.0),
    "flops": Flops,
    "profiled": Profiled,
}


def as_cost(given: str | Cost) -> Cost:
    """Return a cost by its name. Raises ArgumentError for another."""
    if not isinstance(given, str):
        return given
    if given not in COSTS:
        raise ArgumentError(f"cost is {given!r}; it is one of {', '.join(COSTS)}, or an object")
    return COSTS[given]()

"""State the problem: for each value that the backward may need, what saving it takes, and what
computing it again takes.

Some values cost nothing, or are ruled out under every policy:

- views and constants are never saved: a view is redone from the tensor that owns the storage;
- of tuples the parts are saved; inputs and parameters are kept by the caller anyway, so saving
  them is free;
- draws, effects and unknown ops never run twice;
- what reads parameters that were gathered runs twice where that was asked for, and never to save
  memory: the processes, whose batches may have other sizes, gather again in the same order;
- nor do whole tensors of processes whose parts have other sizes, for ops on them may communicate;
- the inside of a checkpointed region is not saved, except draws, what the forward reads outside,
  and what the region's policy lets be saved;
- *free* values, which only the backward needs, run once on either side, so only what must be kept
  for them counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx import Node

from ..errors import PartitionError
from ..graph import op_of
from ..trace.records import may_save, verdict
from .cost import Cost, Roofline, Sizes
from .ops import (
    base,
    computed_of_parts,
    gathers_again,
    is_random,
    is_single,
    is_symbol,
    is_view,
    once,
    reads_gathered,
    region,
)
from .policies import Policy, Verdict
from .roles import Joint, ancestors, describe
from .solve import INF, Network


class Choice(NamedTuple):
    """Which of the values are saved, how many bytes that is beyond the inputs, and how much time
    it takes to compute the others again."""

    saved: np.ndarray
    bytes: int
    time: float


class Problem:
    """A joint graph's values that the backward may need; arrays run parallel to ``nodes``."""

    def __init__(self, joint: Joint, cost: Cost, policy: Policy | None = None) -> None:
        self.joint, self.cost = joint, cost
        inside, self.border = regions(joint)
        relevant = [i for i, yes in enumerate(ancestors(joint.inputs, joint.needed)) if yes]
        local = {i: k for k, i in enumerate(relevant)}
        self.nodes = [joint.nodes[i] for i in relevant]
        self.inputs = [[local[p] for p in joint.inputs[i]] for i in relevant]
        self.needed = [local[i] for i in joint.needed]
        #: runs in the forward, whatever is saved
        self.forward = np.array([joint.forward[i] for i in relevant], dtype=bool)
        gathers, uneven = joint.gathers, joint.uneven
        parts = computed_of_parts(joint.nodes) if uneven else ()
        time: Callable[[Node], float] = cost.time
        if type(cost) is Roofline:
            time = partial(cost.time, sizes=joint.sizes)
        time = cache(time)
        verdicts = np.full(len(relevant), Verdict.FREE)
        if policy is not None or inside:
            told = [self.verdict(i, joint.nodes[i], i in inside, policy) for i in relevant]
            verdicts = np.array(told, dtype=int)
        #: that it is computed again was asked for
        self.asked = verdicts == Verdict.RECOMPUTE
        #: it is saved in the memory of the host
        self.hosted = verdicts == Verdict.OFFLOAD
        #: bytes to save it; infinite where that is ruled out
        self.save = np.array(
            [
                saving_cost(n, asked, joint.sizes)
                for n, asked in zip(self.nodes, self.asked.tolist(), strict=True)
            ],
            dtype=float,
        )
        self.save[self.hosted] = 1.0
        #: time to compute it once more; infinite where that is ruled out
        self.time = np.array(
            [
                INF
                if fixed
                or joint.once[i]
                or n.op == "placeholder"
                or (gathers and not asked and reads_gathered(n))
                or (uneven and not asked and n not in parts and not is_view(n))
                else time(n)
                for i, n, asked, fixed in zip(
                    relevant,
                    self.nodes,
                    self.asked.tolist(),
                    (verdicts >= Verdict.OFFLOAD).tolist(),
                    strict=True,
                )
            ],
            dtype=float,
        )
        check_feasible(self)
        self.network = Network(self.inputs, self.needed, ~self.forward & (self.time < INF))
        #: bytes that are not there already: the caller keeps the inputs
        able = (self.save < INF) & ~self.hosted
        self.bytes = np.where(
            able & np.array([counts(n) for n in self.nodes], dtype=bool), self.save, 0.0
        )
        # what takes no memory decides only where memory and time do not
        self.save[self.bytes == 0] *= 1e-9 * max(self.bytes.sum(), 1.0)
        self.forward_time = sum(
            [time(n) for n, f in zip(joint.nodes, joint.forward, strict=True) if f]
        )

    def verdict(self, i: int, n: Node, inside: bool, policy: Policy | None) -> int:
        """Return what may become of a value, by its checkpointed region, else by the policy."""
        if i in self.border:
            return Verdict.SAVE
        if n.op in ("placeholder", "get_attr"):
            return Verdict.FREE
        if inside and not may_save(op_of(n)):
            return Verdict.RECOMPUTE
        given = Verdict.FREE if policy is None else verdict(policy, op_of(n))
        if given == Verdict.OFFLOAD and is_single(n) and not off_host(n):
            given = Verdict.SAVE
        single = is_single(n) and not is_view(n)
        return given if single or given == Verdict.RECOMPUTE else Verdict.FREE

    def again(self, price: float) -> np.ndarray:
        """Return what a second run of each value costs at this price. At an infinite price nothing
        that takes time runs twice, unless it was asked for."""
        if price < INF:
            return np.multiply(self.time, price, where=self.time < INF, out=self.time.copy())
        return np.where(self.asked | (self.time == 0), self.time, INF)

    def cheapest(self, price: float) -> Choice:
        """Return the choice with the least "bytes saved + price x time"."""
        return self.choice(self.network.cheapest(self.save, self.again(price)).saved)

    def late(self, saved: np.ndarray) -> np.ndarray:
        """Return the values that the backward computes when these are saved."""
        held = saved.tolist()
        return np.array(
            ancestors(self.inputs, [k for k in self.needed if not held[k]], stop=held), dtype=bool
        )

    def read(self, saved: np.ndarray) -> np.ndarray:
        """Return the values that the backward reads when these are saved."""
        late = self.late(saved)
        found = np.zeros(len(late), dtype=bool)
        found[[*self.needed, *(p for k in np.flatnonzero(late) for p in self.inputs[k])]] = True
        return found

    def twice(self, saved: np.ndarray) -> np.ndarray:
        """Return the values that run in the forward and again in the backward."""
        early = ancestors(self.inputs, np.flatnonzero(saved & ~self.forward).tolist())
        return (self.forward | np.array(early, dtype=bool)) & self.late(saved)

    def choice(self, saved: np.ndarray) -> Choice:
        """Return the choice that saves these values, with its costs."""
        time = float(self.time[self.twice(saved)].sum())
        return Choice(saved, int(self.bytes[saved].sum()), time)

    def offloaded(self, choice: Choice) -> set[Node]:
        """Return those of the saved nodes whose values go to the host's memory."""
        return {self.nodes[k] for k in np.flatnonzero(choice.saved & self.hosted)}

    def reasons(self, choice: Choice) -> dict[Node, str]:
        """Return the nodes to save, tensors before sizes, each with the reason."""
        chosen = sorted(np.flatnonzero(choice.saved), key=lambda k: is_symbol(self.nodes[k]))
        index, never = self.joint.index, not (self.twice(choice.saved) & (self.time > 0)).any()
        return {
            n: "offloaded to the host"
            if self.hosted[k]
            else reason(n, index[n] in self.border, never, self.time[k] == INF)
            for n, k in [(self.nodes[k], k) for k in chosen]
        }


def off_host(n: Node) -> bool:
    """Return whether the value lies in the memory of an accelerator."""
    device = getattr(n.meta["val"], "device", None)
    return device is not None and torch.device(device).type != "cpu"


def counts(n: Node) -> bool:
    """Return whether keeping the value takes memory of its own."""
    return not is_symbol(n) and (n.op != "placeholder" or bool(n.meta.get("mutated")))


def saving_cost(n: Node, inside: bool, sizes: Mapping[Node, int] | None = None) -> float:
    """Return what it costs to save the value of ``n``: bytes; next to nothing for sizes and
    inputs; infinity where it is ruled out."""
    sizes = Sizes() if sizes is None else sizes
    if is_symbol(n):
        return 1.0
    if n.op == "placeholder":  # free, but not worth holding for its sizes alone
        return float(sizes[n]) if n.meta.get("mutated") else 8.0
    if n.op == "get_attr" or is_view(n) or not is_single(n) or (inside and not once(op_of(n))):
        return INF
    return float(sizes[n])


def reason(n: Node, border: bool, never: bool, must: bool) -> str:
    """Return why a saved value is saved, for the report."""
    if n.op == "placeholder":
        return "parameter" if n.meta.get("role") == "param" else "input"
    if is_symbol(n):
        return "size"
    if is_random(op_of(n)):
        return "random: may run only once"
    if once(op_of(n)):
        return "may run only once"
    if border:
        return "border of a checkpointed region"
    if must:
        return "the policy saves it"
    return "read by the backward" if never else "cheaper to keep than to compute again"


def regions(joint: Joint) -> tuple[set[int], set[int]]:
    """Return the nodes inside of checkpointed regions, and those among them that the forward reads
    outside of their region.

    A free value computed from the inside belongs to it: saved, it would take the memory that the
    region is to save. So does a part that the outside takes of a tuple, for the tuple cannot be
    saved."""
    nodes, inputs = joint.nodes, joint.inputs
    lies_in: dict[int, Any] = {}
    for i, n in enumerate(nodes):
        if joint.late[i] or n.op in ("placeholder", "get_attr"):
            continue
        own = region(n)
        if own is None and (not joint.forward[i] or n.target is getitem):
            own = next((lies_in[p] for p in inputs[i] if p in lies_in), None)
        if own is not None:
            lies_in[i] = own
    read = {joint.index[o] for o in joint.early_outputs if isinstance(o, Node)}
    for i in range(len(nodes)):
        if joint.forward[i]:
            read.update(p for p in inputs[i] if p in lies_in and lies_in.get(i) != lies_in[p])
    border = {joint.index[base(nodes[i])] for i in read} & lies_in.keys()
    return set(lies_in), {i for i in border if not gathers_again(nodes[i])}


def check_feasible(problem: Problem) -> None:
    """Raise PartitionError if the backward needs a value neither saved nor recomputed."""
    able, again = problem.save < INF, problem.again(INF) < INF
    at_hand: list[bool] = []
    for k, inputs in enumerate(problem.inputs):
        at_hand.append(able[k] or (again[k] and all([at_hand[p] for p in inputs])))
    for k in problem.needed:
        if not at_hand[k]:
            while again[k]:  # to the one that is to blame
                k = next(p for p in problem.inputs[k] if not at_hand[p])
            raise PartitionError(
                f"the backward needs {describe(problem.nodes[k])}, which can neither be saved (it "
                "is a tuple, a view, a constant or inside a checkpointed region) nor computed "
                "again (it draws, has an effect, or nothing may run twice)"
            )

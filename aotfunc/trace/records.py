"""The steps of a recording: which values each makes and writes, and how it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..debug import Line, at
from ..errors import PartitionError
from .shapes.instr import Instr
from .shapes.sig import Sig, Slot, fill

aten = torch.ops.aten

# A record is (instr, refs of its tensors, grad enabled?, region, line). `instr` is an Instr for an
# op, or an object of another layer with the same duty: `facts` and `emit(functionalizer,
# record)`, see capture.calls.Step.
Record = tuple[Any, tuple[int, ...], bool, Any, Line | None]


class Region(NamedTuple):
    """A checkpointed region in which a policy says what may be saved."""

    number: int
    policy: Callable[[Node], int]


def may_save(n: Node) -> bool:
    """Return whether the policy of its region lets the value of a node be saved."""
    region = n.meta.get("region")
    return region.__class__ is Region and bool(verdict(region.policy, n))


def verdict(policy: Callable[[Node], int], n: Node) -> int:
    """Return what a policy says of a node. Raises PartitionError for what is no Verdict."""
    given = policy(n)
    if isinstance(given, int) and 0 <= given <= 3:
        return given
    raise PartitionError(
        f"a policy returns a Verdict, not {given!r}, as {policy!r} does for "
        f"{n.name}{at(n.meta.get('line'))}"
    )


def instr_run(instr: Any, values: list[Tensor]) -> list[Tensor]:
    """Run one recorded step and return its new results as a flat list."""
    if not isinstance(instr, Instr):
        return instr.run(values)
    if instr.op is aten.view_as_real.default:
        values = [v.resolve_conj() for v in values]
    kwargs = {k: fill(v, values) for k, v in instr.kwargs.items()} if instr.kwargs else {}
    outs = instr.op._op(*fill(instr.args, values), **kwargs)
    facts = instr.facts
    if instr.simple:
        return [outs]
    if facts.writes:
        return [
            x
            for o, same in zip(
                outs if isinstance(outs, tuple | list) else (outs,), facts.same, strict=False
            )
            if same is None
            for x in flat_tensors(o)
        ]
    return flat_tensors(outs)


def flat_tensors(outs: Any) -> list:
    if isinstance(outs, list | tuple):
        return [x for o in outs for x in flat_tensors(o)]
    return [outs] if isinstance(outs, Tensor | Sig) else []


def result_sigs(instr: Any) -> list:
    """Return the signatures of the new values that a step makes."""
    if instr.__class__ is not Instr:
        return new_sigs(instr)
    if instr.made is None:
        instr.made = new_sigs(instr)
    return instr.made


def new_sigs(instr: Any) -> list:
    if not instr.facts.writes:
        return flat_tensors(instr.outs)
    outs = instr.outs if isinstance(instr.outs, tuple) else (instr.outs,)
    return [
        sig
        for o, same in zip(outs, instr.facts.same, strict=False)
        if same is None
        for sig in flat_tensors(o)
    ]


def n_new_values(instr: Any) -> int:
    """Return how many new values a step makes."""
    return len(result_sigs(instr))


class Roots:
    """The root of each view, and how often each root was written, up to the recording's end."""

    def __init__(self, count: int, conjugates: Iterable[int] = ()) -> None:
        self.done, self.number = 0, count
        self.of: dict[int, int] = {}  # view -> the value whose storage it shares
        self.written: Counter[int] = Counter()  # roots
        # inputs, and views of them, with the lazy conjugate bit
        self.conjugates = set(conjugates)

    def extended(self, records: list[Record]) -> Roots:
        of = self.of
        for k in range(self.done, len(records)):
            instr, refs, *_ = records[k]
            made = range(self.number, self.number + n_new_values(instr))
            self.number = made.stop
            if instr.facts.view_of is not None and refs:
                of.update(dict.fromkeys(made, of.get(refs[0], refs[0])))
                if (refs[0] in self.conjugates) is not (instr_op(instr) is aten._conj.default):
                    self.conjugates.update(made)
            self.written.update([of.get(refs[s], refs[s]) for s in written_slots(instr)])
        self.done = len(records)
        return self


def instr_op(instr: Any) -> Any:
    return getattr(instr, "op", None)


def written_slots(instr: Any) -> list[int]:
    """Return the positions of the tensors that a step writes."""
    if not instr.facts.writes:
        return []
    if not isinstance(instr, Instr):
        return list(instr.facts.writes)
    if instr.written is None:
        instr.written = given_slots(instr)
    return instr.written


def given_slots(instr: Instr) -> list[int]:
    """Return the positions of the tensors that an op's schema says it writes."""
    found = []
    for i in instr.facts.writes:
        a = instr.args[i] if i < len(instr.args) else instr.kwargs.get(instr.facts.names[i])
        found += [
            int(s) for s in (a if isinstance(a, list | tuple) else [a]) if isinstance(s, Slot)
        ]
    return found

"""Learning rates as inputs: a schedule that gives an optimizer another number makes no other
program. A capture finds a tensor in the number's place, which each call makes of its number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...capture.captured import Captured
from ...trace.following import LOW
from .reads import MoreState, Names

#: names by which code reaches a rate, which it could tell from a number
_REACH = frozenset({"lr", "param_groups", "state_dict", "get_lr"})


class Rate:
    """The tensor that stands for a learning rate."""

    def __init__(self, number: float) -> None:
        self.number, self.tensor = number, torch.tensor(number, dtype=torch.float64)

    def now(self, number: Any) -> Tensor:
        """Return the tensor of a call, the same one for the same number. Raises TypeError where
        the rate is no number any more."""
        if type(number) is not float:
            raise TypeError
        if number is not self.number:  # 0.0 == -0.0
            self.number, self.tensor = number, torch.tensor(number, dtype=torch.float64)
        return self.tensor


def has_rate(group: dict[str, Any]) -> bool:
    """Return whether a group's rate may be a tensor: a low precision would round it."""
    known = type(group.get("lr")) is float and type(group.get("params")) is list
    return known and not any(p.dtype in LOW for p in group["params"])


@contextmanager
def as_tensors(rates: Sequence[tuple[dict[str, Any], Rate]]) -> Iterator[None]:
    """Put the tensors in their groups inside the block. Raises MoreState where a rate is bound
    anew."""
    for group, rate in rates:
        group["lr"] = rate.tensor
    bound = False
    try:
        yield
    finally:
        for group, rate in rates:
            if group.get("lr") is rate.tensor:
                group["lr"] = rate.number
            else:
                bound = True
    if bound:
        raise MoreState


def check_rates(rates: Sequence[tuple[dict[str, Any], Rate]], rec: Captured, names: Names) -> None:
    """Raise MoreState where a rate is written to, as a schedule does, or is a result, or where the
    user's code may read one: it sees numbers."""
    trace = rec.trace
    if rates and not _REACH.isdisjoint(names.attributes):
        raise MoreState
    roots = {trace.root(ref) for _, r in rates if (ref := trace.seen_as(r.tensor)) is not None}
    if any(trace.root(ref) in roots for ref in rec.refs) or any(
        trace.roots().written[root] for root in roots
    ):
        raise MoreState

"""Record what optimizers decide by a number in a tensor: both branches, of which each call takes
what one has written.

In their code ``item()`` gives a tensor, and ``max`` and ``min`` of tensors are tensors."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import _adafactor, asgd, radam

from .traced import is_frozen, under_way

#: what asks for numbers only to compute with them, and to decide
COMPUTING = {
    *("_single_tensor_adafactor", "_single_tensor_asgd"),
    "GradScaler._maybe_opt_step.<locals>.<genexpr>",
}


def computed_item(item: Callable) -> Callable:
    """Return ``Tensor.item``, which gives optimizers a double."""

    @functools.wraps(item)
    def method(x: Tensor) -> Any:
        return x.double() if asks_to_compute(sys._getframe(1)) else item(x)

    return method


def asks_to_compute(asking: FrameType) -> bool:
    """Return whether an optimizer asks, while a number would be frozen."""
    return is_frozen() and asking.f_code.co_qualname in COMPUTING


def extreme(builtin: Callable, beats: Callable) -> Callable:
    """Return ``max`` or ``min`` of two numbers, one of them in a tensor."""

    @functools.wraps(builtin)
    def choice(a: Any, b: Any) -> Any:
        if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
            return builtin(a, b)
        return torch.where(beats(b, a), b, a)  # as Python's with NaN, too

    return choice


class Branch:
    """A branch under way, where a question is answered so; ``asked``: the question."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.asked: Tensor | None = None


def deciding(read: Callable) -> Callable:
    """Return ``Tensor.__bool__``, which a branch under way answers once."""

    @functools.wraps(read)
    def method(x: Tensor) -> bool:
        branch = under_way.branch
        if branch is None or branch.asked is not None:
            return read(x)
        branch.asked = x
        return branch.answer

    return method


def both_branches(step: Callable, tensors: Sequence[Tensor]) -> Any:
    """Take a ``step`` with either answer to its question. ``tensors`` are then as by the right
    one."""
    around, before, after = under_way.branch, copies(tensors), []
    for answer in (True, False):
        overwrite(tensors, before)
        branch = under_way.branch = Branch(answer)
        try:
            result = step()
        finally:
            under_way.branch = around
        if branch.asked is None:
            return result
        after.append(copies(tensors))
    yes = branch.asked != 0
    overwrite(tensors, [torch.where(yes, *ends) for ends in zip(*after, strict=True)])
    return result


@torch.no_grad()
def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


@torch.no_grad()
def overwrite(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for t, value in zip(tensors, values, strict=True):
        t.copy_(value)


def decided(single: Callable) -> Callable:
    """Return an optimizer's function, which decides for each parameter."""

    @functools.wraps(single)
    def step(*lists: Any, **options: Any) -> None:
        if not is_frozen() or options["capturable"] or options["differentiable"]:
            return single(*lists, **options)
        for each in zip(*lists, strict=True):
            both_branches(lambda each=each: single(*[[t] for t in each], **options), each)

    return step


MAX, MIN = extreme(max, operator.gt), extreme(min, operator.lt)
DECISIONS: dict[tuple[Any, str], Callable] = {
    (Tensor, "item"): computed_item(Tensor.item),
    (asgd, "max"): MAX,
    (_adafactor, "max"): MAX,
    (_adafactor, "min"): MIN,
    (asgd, "_single_tensor_asgd"): decided(asgd._single_tensor_asgd),
    (radam, "_single_tensor_radam"): decided(radam._single_tensor_radam),
}

"""``rearrange``: split, reorder and merge the dimensions of a tensor by a pattern."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError

Group = list[str]  # names of the axes merged in one dimension
REST: Group = ["..."]  # stands for any number of dimensions


def rearrange(tensor: Tensor | Sequence[Tensor], pattern: str, **axes_lengths: int) -> Tensor:
    """Return ``tensor`` with its dimensions as in ``pattern``, ``"left -> right"``: each side
    names the axes, ``...`` stands for any, those in parentheses are merged in one dimension, ``1``
    is a dimension of size 1. Several tensors are stacked first. ``axes_lengths``: the sizes of
    axes that do not follow from the shape.

    Raises ArgumentError if the pattern is malformed, its sides name different axes, or it does not
    match the shape.

    >>> rearrange(torch.zeros(2, 12), "b (h c) -> b c h", h=3).shape
    torch.Size([2, 4, 3])
    """
    x = tensor if isinstance(tensor, Tensor) else torch.stack(list(tensor))

    def wrong(what: str) -> ArgumentError:
        return ArgumentError(
            f"rearrange: {what}: {pattern!r} for a tensor of shape {list(x.shape)}"
        )

    sides = pattern.split("->")
    if len(sides) != 2:
        raise wrong("the pattern is not of the form 'left -> right'")
    left, right = (parse_side(side) for side in sides)
    if left is None or right is None:
        raise wrong("a side is not a list of axes")
    rest = [f"...{i}" for i in range(x.dim() - sum(g is not REST for g in left))]
    left, right = (spelled_out(side, rest) for side in (left, right))
    if len(left) != x.dim():
        raise wrong(f"the left side has {len(left)} dimensions")
    names, wanted = [a for g in left for a in g], [a for g in right for a in g]
    if len(set(names)) < len(names) or sorted(names) != sorted(wanted):
        raise wrong("the sides do not name the same axes, each once")
    sizes = dict(axes_lengths)
    for group, n in zip(left, x.shape, strict=True):
        known = math.prod(sizes.get(a, 1) for a in group)
        unknown = [a for a in group if a not in sizes]
        if len(unknown) > 1 or (n % known if unknown else n != known):
            raise wrong(f"the sizes of {' '.join(group) or '()'} do not follow from {n}")
        sizes.update(dict.fromkeys(unknown, n // max(known, 1)))
    x = x.reshape([sizes[a] for a in names]).permute([names.index(a) for a in wanted])
    return x.reshape([math.prod(sizes[a] for a in group) for group in right])


def parse_side(side: str) -> list[Group] | None:
    """Return the dimensions of one side; None if it has anything but axes."""
    found: list[Group] = []
    for merged, dots, name, other in re.findall(r"(\([^()]*\))|(\.\.\.)|(\w+)|(\S)", side):
        inner = merged[1:-1].split()
        if other or not all(a in ("...", "1", "") or a.isidentifier() for a in (*inner, name)):
            return None
        found.append(REST if dots else inner if merged else [] if name == "1" else [name])
    return found


def spelled_out(side: list[Group], rest: list[str]) -> list[Group]:
    """Return a side with the names of ``rest`` for the dots, in parentheses as they are."""
    found: list[Group] = []
    for g in side:
        found += (
            [[a] for a in rest]
            if g is REST
            else [[b for a in g for b in (rest if a == "..." else [a])]]
        )
    return found

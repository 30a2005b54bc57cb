"""Check the targets of a loss before a kernel reads them, as an op."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("aotfunc", "FRAGMENT")
_library.define("class_of(Tensor target, int classes, int ignore_index) -> Tensor")


def targets(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Return the targets, with 0 for ignored ones. Raises IndexError for one that is no class."""
    low, high = map(int, target.aminmax())
    if low >= 0 and high < classes and not low <= ignore_index <= high:
        return target.clone()
    known = target.where(target != ignore_index, 0)
    for t in map(int, known.aminmax()):
        if not 0 <= t < classes:
            raise IndexError(f"Target {t} is out of bounds.")
    return known


_library.impl("class_of", targets, "CPU")
# not empty_like, which imports sympy
_library.impl("class_of", lambda target, *_: target.clone(), "Meta")
class_of = torch.ops.aotfunc.class_of.default

"""Exchange values between the samples of a ``vmap``: sums, means, maxima and gathered values over
an axis that ``vmap(axis_name=…)`` has named, or over several, by a tuple of names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..capture.axes import AXES
from ..capture.tree import flatten, unflatten
from ..debug import at, user_line
from ..errors import ArgumentError
from ..transforms.rules import axes as ops

Name = str | tuple[str, ...]


def each_name(axis_name: Any) -> tuple:
    """Return the names of axes, the outermost first, or raise ArgumentError for an unknown one."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    for name in names or [axis_name]:
        if name not in AXES.sizes:
            known = ", ".join(map(repr, AXES.sizes)) or "none"
            raise ArgumentError(
                f"no vmap around this call has axis_name={name!r}; known is {known}"
                f"{at(user_line(2))}. A compiled function does not see the vmaps outside of it"
            )
    return names


def axis_size(axis_name: Name) -> int:
    """Return how many samples there are. Raises ArgumentError, as :func:`psum` and its kind do, if
    no ``vmap`` around the call has this ``axis_name``; a compiled function sees only the ``vmap``s
    inside of it.

    >>> vmap(lambda x: x / axis_size("i"), axis_name="i")(torch.ones(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return math.prod([AXES.sizes[name] for name in each_name(axis_name)])


def axis_index(axis_name: Name) -> Tensor:
    """Return the number of the sample, a 0-dim int64 tensor. Of several axes the last one counts
    fastest.

    >>> vmap(lambda x: x + axis_index("i"), axis_name="i")(torch.zeros(3))
    tensor([0., 1., 2.])
    """
    first, *rest = each_name(axis_name)
    index = ops.axis_index(torch.zeros((), dtype=torch.int64), first)
    for name in rest:
        index = index * AXES.sizes[name] + ops.axis_index(torch.zeros_like(index), name)
    return index


def map_tensors(f: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Return ``f`` of each tensor of a tree."""
    leaves, spec = flatten(x)
    return unflatten([f(torch.as_tensor(leaf)) for leaf in leaves], spec)


def psum(x: Any, axis_name: Name) -> Any:
    """Return the sum of ``x``, a tensor or a tree of tensors, over all samples: the same for each
    of them. Derivatives are those of all samples' results together: the cotangent of ``x`` is the
    sum of the cotangents of the result. Bools are counted.

    >>> vmap(lambda x: x / psum(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.7500])
    """
    return map_tensors(lambda x: psum_tensor(x, axis_name), x)


def pmean(x: Any, axis_name: Name) -> Any:
    """Return the mean over all samples; of bools, the share that is true.

    >>> vmap(lambda x: x - pmean(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([-1.,  1.])
    """
    size = axis_size(axis_name)
    return map_tensors(lambda x: psum_tensor(x, axis_name) / size, x)


def pmax(x: Any, axis_name: Name) -> Any:
    """Return the elementwise maximum over all samples; the samples that have it share its gradient
    equally.

    >>> vmap(lambda x: pmax(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0]))
    tensor([3., 3.])
    """
    return map_tensors(lambda x: gathered_samples(x, axis_name).amax(0), x)


def pmin(x: Any, axis_name: Name) -> Any:
    """Return the elementwise minimum over all samples, as :func:`pmax` does the maximum.

    >>> vmap(lambda x: x - pmin(x, "i"), axis_name="i")(torch.tensor([2.0, 5.0]))
    tensor([0., 3.])
    """
    return map_tensors(lambda x: gathered_samples(x, axis_name).amin(0), x)


def all_gather(x: Any, axis_name: Name, axis: int = 0) -> Any:
    """Return the values of all samples, stacked at the new dimension ``axis``.

    >>> vmap(lambda x: all_gather(x, "i").sort().values, axis_name="i")(torch.tensor([2, 1]))
    tensor([[1, 2],
            [1, 2]])
    """
    return map_tensors(lambda x: gathered_samples(x, axis_name).movedim(0, axis), x)


def psum_tensor(x: Tensor, axis_name: Name) -> Tensor:
    x = x.long() if x.dtype == torch.bool else x
    for name in each_name(axis_name):
        x = ops.psum(x, name)
    return x


def gathered_samples(x: Tensor, axis_name: Name) -> Tensor:
    names = each_name(axis_name)
    for name in reversed(names):
        x = ops.all_gather(x, AXES.sizes[name], name)
    return x.flatten(0, len(names) - 1)

"""Ops whose number of results depends on values, with a given size instead: ``nonzero``,
``masked_select``, ``unique``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError


def nonzero(x: Tensor, *, size: int, fill_value: int = 0, as_tuple: bool = False) -> Any:
    """Return the indices of the first ``size`` elements of ``x`` that are not zero, of shape
    ``[size, x.dim()]``; rows beyond the last one are ``fill_value``. ``as_tuple``: a column for
    each dimension, as an index takes them; one for a tensor without dimensions.

    This and the other functions of fixed size are captured, compiled and batched, where
    ``torch.nonzero`` has no shape to capture; the options are those of ``jax.numpy``. Raises
    ArgumentError for a size that is no number of elements, and a ``fill_value`` that is no index.

    >>> nonzero(torch.tensor([0.0, 3.0, 0.0, 5.0]), size=3, fill_value=-1)
    tensor([[ 1],
            [ 3],
            [-1]])
    """
    check_size("nonzero", size)
    if not isinstance(fill_value, int):
        kind = type(fill_value).__name__
        raise ArgumentError(f"nonzero: fill_value must be an int, an index, not of type {kind}")
    x = x.unsqueeze(0) if as_tuple and not x.dim() else x
    found = torch.nonzero_static(x, size=size, fill_value=fill_value)
    return found.unbind(1) if as_tuple else found


def masked_select(x: Tensor, mask: Tensor, *, size: int, fill_value: float | Tensor = 0) -> Tensor:
    """Return a vector of the first ``size`` elements of ``x`` where ``mask``, which is broadcast
    with it, is true; elements beyond the last one are ``fill_value``, a number or a tensor of one
    element. The derivative is that of ``x[mask]``, and with respect to ``fill_value``. Raises
    ArgumentError for a ``mask`` that is not bool, a ``fill_value`` of more elements or of a kind
    that ``x`` does not hold (floating beside whole numbers), and a size as in :func:`nonzero`.

    >>> x, mask = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])
    >>> masked_select(x, mask, size=3)
    tensor([1., 3., 0.])
    >>> grad(lambda x: masked_select(x, mask, size=3).square().sum())(x)
    tensor([2., 0., 6.])
    """
    check_size("masked_select", size)
    if mask.dtype is not torch.bool:
        raise ArgumentError(f"masked_select: mask has dtype {mask.dtype}; it must be bool")
    x, mask = torch.broadcast_tensors(x, mask)
    return masked_elements("masked_select", x.flatten(), mask.flatten(), size, fill_value)


def unique(
    x: Tensor,
    *,
    size: int,
    fill_value: float | Tensor | None = None,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> Any:
    """Return a vector of the ``size`` least values among the elements of ``x``, in order; elements
    beyond the last one are ``fill_value``, by default the least value.

    With ``return_inverse`` also the position of each element of ``x`` in it (``size`` or more for
    values that it leaves out), with ``return_counts`` how many elements have each value, as
    ``torch.unique``. The first of equal elements gets the cotangent. Raises ArgumentError for an
    empty ``x`` without ``fill_value``, a complex ``x``, and as :func:`masked_select`.

    >>> unique(torch.tensor([3, 1, 3, 2]), size=4, fill_value=0, return_counts=True)
    (tensor([1, 2, 3, 0]), tensor([1, 1, 2, 0]))
    """
    check_size("unique", size)
    if x.is_complex():
        raise ArgumentError(f"unique: x has dtype {x.dtype}, whose elements have no order")
    if fill_value is None and not x.numel():
        raise ArgumentError("unique: x is empty, and has no least value; give a fill_value")
    values, order = x.flatten().sort(stable=True)
    first = torch.cat([torch.ones_like(values[:1], dtype=torch.bool), values[1:] != values[:-1]])
    fill_value = values[0] if fill_value is None else fill_value
    found = [masked_elements("unique", values, first, size, fill_value)]
    place = first.cumsum(0) - 1
    if return_inverse:
        found.append(torch.zeros_like(place).scatter(0, order, place).view(x.shape))
    if return_counts:
        ones, counts = torch.ones_like(place), place.new_zeros(size + 1)
        found.append(counts.scatter_add(0, place.clamp(max=size), ones)[:size])
    return tuple(found) if len(found) > 1 else found[0]


def masked_elements(name: str, x: Tensor, mask: Tensor, size: int, fill_value: Any) -> Tensor:
    """Return the elements of a vector where ``mask`` is true, followed by the fill value."""
    given = isinstance(fill_value, Tensor)
    if given and fill_value.numel() != 1:
        raise ArgumentError(
            f"{name}: fill_value has shape {list(fill_value.shape)}; it must have one element"
        )
    kind = fill_value.dtype if given else torch.tensor(fill_value).dtype
    truth = x.dtype is torch.bool and not given and fill_value in (0, 1)
    if not truth and not torch.can_cast(kind, x.dtype):
        what = "complex" if kind.is_complex else f"of {kind}"
        raise ArgumentError(f"{name}: fill_value is {what}, and x has dtype {x.dtype}")
    filler = torch.as_tensor(fill_value, dtype=x.dtype, device=x.device).reshape(1)
    places = torch.nonzero_static(mask, size=size, fill_value=len(x)).flatten()
    return torch.cat([x, filler]).index_select(0, places)


def check_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ArgumentError(f"{name}: size must be a number of elements, not {size!r}")

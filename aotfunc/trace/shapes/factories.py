"""Shape rules of new tensors: ranges, grids, identities, draws. See :mod:`.rules`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .algebra import like
from .rules import new, shape_rule, sure, sure_in_order
from .sig import Sig, contiguous_stride, make_sig

aten = torch.ops.aten


def created(
    size: Sequence[int],
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Sig:
    sure(layout in (None, torch.strided) and not pin_memory and all(n >= 0 for n in size))
    where = torch.device(device) if device is not None else torch.device("cpu")
    return make_sig(
        tuple(size), contiguous_stride(tuple(size)), dtype or torch.get_default_dtype(), where
    )


@shape_rule(aten.zeros, aten.ones)
def _zeros(size, **options):
    return created(size, **options)


@shape_rule(aten.full)
def _full(size, value, *, dtype=None, **options):
    of_value = {bool: torch.bool, int: torch.int64, float: torch.get_default_dtype()}.get(
        type(value)
    )
    sure(dtype or of_value)
    return created(size, dtype=dtype or of_value, **options)


@shape_rule(aten.scalar_tensor)
def _scalar_tensor(value, *, dtype=None, **options):
    with torch._C._DisableTorchDispatch():  # the kernel may refuse the number
        made = aten.scalar_tensor.default(value, dtype=dtype)
    return created((), dtype=made.dtype, **options)


@shape_rule(aten.new_empty, aten.new_zeros, aten.new_ones)
def _new(x, size, *, dtype=None, device=None, **options):
    return created(size, dtype=dtype or x.dtype, device=device or x.device, **options)


@shape_rule(aten.new_full)
def _new_full(x, size, value, **options):
    return _new(x, size, **options)


# ----- ranges and grids --------------------------------------------------------------------------


@shape_rule(aten.arange)
def _arange(end, **options):
    return _arange_step(0, end, **options)


@shape_rule(aten.arange.start, aten.arange.start_step)
def _arange_step(start, end, step=1, *, dtype=None, **options):
    whole = all(type(n) is int for n in (start, end, step))
    sure(
        step
        and (
            whole or dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        )
    )
    sure((end - start) * step >= 0 and math.isfinite((end - start) / step))
    length = -((start - end) // step) if whole else math.ceil((end - start) / step)
    return created((length,), dtype=dtype or (torch.int64 if whole else None), **options)


@shape_rule(aten.linspace, aten.logspace)
def _linspace(start, end, steps, base=10.0, **options):
    sure(not any(isinstance(n, complex) for n in (start, end, base)))
    return created((steps,), **options)


@shape_rule(aten.eye)
def _eye(n, **options):
    return created((n, n), **options)


@shape_rule(aten.eye.m)
def _eye_m(n, m, **options):
    return created((n, m), **options)


def below(row: int, column: int, offset: int) -> int:
    """Return how many elements of a matrix lie on or below a diagonal."""
    sure(row >= 0 and column >= 0)
    return sum(min(max(i + offset + 1, 0), column) for i in range(row))


@shape_rule(aten.tril_indices)
def _tril_indices(row, column, offset=0, *, dtype=torch.int64, **options):
    return created((2, below(row, column, offset)), dtype=dtype or torch.int64, **options)


@shape_rule(aten.triu_indices)
def _triu_indices(row, column, offset=0, *, dtype=torch.int64, **options):
    above = row * column - below(row, column, offset - 1)
    return created((2, above), dtype=dtype or torch.int64, **options)


# ----- draws -------------------------------------------------------------------------------------


@shape_rule(aten.rand, aten.rand.generator, aten.randn, aten.randn.generator)
def _rand(size, *, generator=None, **options):
    drawn = created(size, **options)
    sure(drawn.differentiable)
    return drawn


@shape_rule(aten.normal.float_float)
def _normal(mean, std, size, **options):
    sure(std >= 0)
    return _rand(size, **options)


@shape_rule(aten.randint, aten.randint.generator)
def _randint(high, size, *, generator=None, dtype=None, **options):
    sure(high > 0)
    return created(size, dtype=dtype or torch.int64, **options)


@shape_rule(aten.randint.low, aten.randint.low_generator)
def _randint_low(low, high, size, **options):
    return _randint(high - low, size, **options)


@shape_rule(aten.randperm, aten.randperm.generator)
def _randperm(n, **options):
    return _randint(1, (n,), **options)


@shape_rule(aten.randint_like, aten.randint_like.generator)
def _randint_like(x, high, *, generator=None, dtype=None, memory_format=None, **options):
    sure(high > 0 and not any(options.values()))
    return like(x, dtype, memory_format)


@shape_rule(aten.randint_like.low_dtype, aten.randint_like.low_generator_dtype)
def _randint_like_low(x, low, high, **options):
    return _randint_like(x, high - low, **options)


@shape_rule(aten.normal_functional)
def _normal_functional(x, mean=0.0, std=1.0, *, generator=None):
    sure(x.differentiable and std >= 0)
    return like(x)


@shape_rule(aten.multinomial)
def _multinomial(x, count, replacement=False, *, generator=None):
    sure(x.dtype.is_floating_point and x.ndim in (1, 2) and 0 not in x.shape)
    sure(count > 0 and (replacement or count <= x.shape[-1]))
    sure_in_order(x)
    return new(x, (*x.shape[:-1], count), torch.int64)

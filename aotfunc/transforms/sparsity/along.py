"""Ops that keep slices of their arguments apart: along dimensions, and normalisations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten


def slices(shape: Sequence[int], dims: Any) -> tuple[Tensor, list[int]]:
    """Return each element's number of its slice along ``dims`` (None: all), and these."""
    given = dims if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    every = [d % len(shape) for d in given] if shape else []
    every = every or list(range(len(shape)))
    kept = [1 if i in every else n for i, n in enumerate(shape)]
    return torch.arange(math.prod(kept)).view(kept).expand(tuple(shape)), every


#: ops whose results at a place depend on all of their arguments along dims; where these stand
ALONG: dict[Any, int] = {
    aten.linalg_vector_norm.default: 2,
    aten.norm.ScalarOpt_dim: 2,
    aten.norm.ScalarOpt_dim_dtype: 2,
    aten.kthvalue.default: 2,
    aten.topk.default: 2,
    aten.sort.stable: 2,
    aten._softmax_backward_data.default: 2,
    aten._log_softmax_backward_data.default: 2,
    **dict.fromkeys(
        (
            *(aten.var.correction, aten.std.correction),
            *(aten.var_mean.correction, aten.std_mean.correction),
            *(aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default),
            *(aten.sort.default, aten.cummax.default, aten.cummin.default),
        ),
        1,
    ),
}


#: nonlinear ops with the pattern of a linear one, and how many arguments that takes
LIKE: dict[Any, tuple[Any, int]] = {
    aten.scatter_reduce.two: (aten.scatter_add.default, 4),
    aten.index_reduce.default: (aten.index_add.default, 4),
}


def by_layers(x: Node, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the group and the channel of each element of ``x``."""
    places, size = torch.arange(x.meta["val"].numel), math.prod(shape)
    return places // size, places % size


def by_channels(x: Node, training: bool) -> tuple[Tensor, Tensor]:
    shape = x.meta["val"].shape
    places = torch.arange(x.meta["val"].numel)
    channels = places // math.prod(shape[2:]) % shape[1]
    return channels if training else places, channels


def by_groups(n: int, c: int, size: int, groups: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(n * c * size)
    return places // (c // groups * size), places // size % c


#: for each: the arguments that have an element for each of the input's, for each group, for each
#: channel; the groups and the channels
NORMALISED: dict[Any, Any] = {
    aten.native_layer_norm.default: lambda x, shape, w, b, *_: (
        ((x,), (), (w, b), *by_layers(x, shape))
    ),
    aten.native_layer_norm_backward.default: lambda g, x, shape, mean, rstd, w, b, *_: (
        ((g, x), (mean, rstd), (w, b), *by_layers(x, shape))
    ),
    aten.native_group_norm.default: lambda x, w, b, n, c, size, groups, *_: (
        ((x,), (), (w, b), *by_groups(n, c, size, groups))
    ),
    aten.native_group_norm_backward.default: lambda g, x, mean, rstd, w, n, c, size, groups, *_: (
        ((g, x), (mean, rstd), (w,), *by_groups(n, c, size, groups))
    ),
    aten._native_batch_norm_legit.no_stats: lambda x, w, b, training, *_: (
        ((x,), (), (w, b), *by_channels(x, training))
    ),
    aten._native_batch_norm_legit_functional.default: lambda x, w, b, mean, var, training, *_: (
        ((x,), (), (w, b, mean, var), *by_channels(x, training))
    ),
    aten._native_batch_norm_legit_no_training.default: lambda x, w, b, mean, var, *_: (
        ((x,), (), (w, b, mean, var), *by_channels(x, False))
    ),
    aten.native_batch_norm_backward.default: (
        lambda g, x, w, mean, var, saved, inverse, training, *_: (
            ((g, x), (), (w, mean, var, saved, inverse), *by_channels(x, training))
        )
    ),
}

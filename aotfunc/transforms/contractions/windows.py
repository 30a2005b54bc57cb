"""Compute the weight gradient of a convolution: its cotangent times the windows of its image,
summed over images and windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import Dims, labels_of

aten = torch.ops.aten

WEIGHT_ONLY = [False, True, False]


class Windows:
    """The windows of an image as a factor, and the meaning of its dimensions: images, groups,
    channels, positions in a window, windows."""

    def __init__(self, dims: Dims, form: tuple) -> None:
        self.kernel, *self.geometry = form[1:]
        self.dims, rank = dims, len(self.kernel)
        self.labels, self.images, self.channels = labels_of(dims), labels_of(dims[:2]), dims[2]
        self.inside, self.places = labels_of(dims[3 : 3 + rank]), labels_of(dims[3 + rank :])

    def convolves(self, others: Collection[int], out: Collection[int]) -> bool:
        """Return whether a product, summed to ``out``, is a convolution's weight gradient."""
        kept = {*self.channels, *self.inside}
        return (
            {*self.images, *self.places}.issubset(others)
            and kept.isdisjoint(others)
            and kept.issubset(out)
            and not set(self.places).intersection(out)
        )

    def of(self, x: Tensor) -> Tensor:
        """Return the windows of ``x``, with groups and channels in one dimension."""
        stride, padding, dilation = self.geometry
        rank = len(self.kernel)
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
        for d, (k, s, a) in enumerate(zip(self.kernel, stride, dilation, strict=True)):
            x = x.unfold(2 + d, a * (k - 1) + 1, s)[..., ::a]
        return x.permute(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank)).contiguous()

    def weight_gradient(
        self, g: Tensor, labels: Sequence[int], x: Tensor, keep: Collection[int], extent: Callable
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Return the windows of ``x`` times ``g``. Images that are kept become groups."""
        count = lambda labels: math.prod(extent(labels))
        apart = [k for k in self.images if k in keep]
        images = [k for k in self.images if k not in keep]
        outs = [k for k in labels if k not in self.labels]
        groups, rank = count(apart), len(self.kernel)
        g = g.permute([labels.index(k) for k in (*images, *apart, *outs, *self.places)])
        places = [count(dim) for dim in self.dims[3 + rank :]]
        g = g.reshape(count(images), groups * count(outs), *places)
        size, mine = x.shape[2:], (*self.images, *self.channels)
        x = x.reshape(*extent(mine), *size)
        order = [mine.index(k) for k in (*images, *apart, *self.channels)]
        x = x.permute(*order, *range(len(order), x.dim()))
        x = x.reshape(count(images), groups * count(self.channels), *size)
        w = x.new_zeros(()).expand(g.shape[1], count(self.channels), *self.kernel)
        geometry = [*[list(v) for v in self.geometry], False, [0] * rank, groups]
        gradient = aten.convolution_backward(g, x, w, None, *geometry, WEIGHT_ONLY)[1]
        out = (*apart, *outs, *self.channels, *self.inside)
        return gradient.reshape(extent(out)), out

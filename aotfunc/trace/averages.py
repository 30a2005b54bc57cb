"""Record batch norm's cumulative average (``momentum=None``), with a counter tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .traced import current


def averaging(forward: Callable) -> Callable:
    """Return ``_BatchNorm.forward`` with the counter as a tensor while capturing."""

    @functools.wraps(forward)
    def method(self, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        count = self.num_batches_tracked
        if current() is None or self.momentum is not None or not self.training or count is None:
            return forward(self, x)
        self._check_input_dim(x)
        count.add_(1)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        # this leaves the batch's statistics there
        out = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        with torch.no_grad():
            for average, new in ((self.running_mean, mean), (self.running_var, var)):
                average.add_((new - average) / count)
        return out

    return method

"""List backward ops that read an argument only to decide where the gradient goes.

Their derivative by it is zero, and PyTorch's formulas return zeros.
"""

from __future__ import annotations

from .schema import aten
from .table import flat

flat(
    aten.threshold_backward,
    aten.leaky_relu_backward,
    aten.hardtanh_backward,
    aten.hardshrink_backward,
    aten.softshrink_backward,
    aten.rrelu_with_noise_backward,
    aten.nll_loss_backward,
    aten.nll_loss2d_backward,
)
flat(aten._prelu_kernel_backward, by=(1, 2))  # unless both results have a gradient
for rank in (1, 2, 3):
    flat(
        getattr(aten, f"reflection_pad{rank}d_backward"),
        getattr(aten, f"replication_pad{rank}d_backward"),
    )
for rank in (2, 3):
    flat(
        getattr(aten, f"avg_pool{rank}d_backward"),
        getattr(aten, f"_adaptive_avg_pool{rank}d_backward"),
        getattr(aten, f"max_pool{rank}d_with_indices_backward"),
        getattr(aten, f"adaptive_max_pool{rank}d_backward"),
        getattr(aten, f"fractional_max_pool{rank}d_backward"),
    )

"""Rules of the discrete Fourier transforms: linear maps, each the transpose of its inverse up to
scaling.

``normalization`` is 0 for none, 1 for a division by ``sqrt(n)``, 2 by ``n``; the transpose is
scaled in the same way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .batching import shifted
from .schema import aten
from .table import linear


def scale_halves(x: Tensor, dim: int, last: int, factor: float) -> Tensor:
    """Scale the entries of a one-sided spectrum of ``last`` points that stand for two."""
    inner = (last - 1) // 2
    return (
        x
        if inner == 0
        else aten.slice_scatter(x, x.narrow(dim, 1, inner) * factor, dim, 1, 1 + inner)
    )


def from_complex(g: Tensor, x: Tensor, dim: Any, normalization: int, forward: bool) -> Tensor:
    return aten._fft_c2c(g, dim, normalization, not forward)


def from_real(g: Tensor, x: Tensor, dim: Any, normalization: int, onesided: bool) -> Tensor:
    if not onesided:
        return aten._fft_c2c(g, dim, normalization, False).real
    # the real part of an inverse transform of the spectrum with nothing in its other half
    last = x.shape[dim[-1]]
    return aten._fft_c2r(scale_halves(g, dim[-1], last, 0.5), dim, normalization, last)


def to_real(g: Tensor, x: Tensor, dim: Any, normalization: int, last: int) -> Tensor:
    return scale_halves(aten._fft_r2c(g, dim, normalization, True), dim[-1], last, 2.0)


linear(aten._fft_c2c, from_complex, batch=shifted(aten._fft_c2c, "dim"))
linear(aten._fft_r2c, from_real, batch=shifted(aten._fft_r2c, "dim"))
linear(aten._fft_c2r, to_real, batch=shifted(aten._fft_c2r, "dim"))

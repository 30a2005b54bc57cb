"""Rules of the activation functions and their backward ops.

Each backward op is linear in its first argument: the formula for that one is the op itself; the
formula for the activation's input is the second derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .batching import align, elementwise
from .choices import keep
from .schema import aten, tensor_args
from .table import pointwise, series_as, vjp_of, vmap_of

# ----- piecewise linear: the second derivative is zero -------------------------------------------

pointwise(aten.relu, lambda g, out, x: aten.threshold_backward(g, out, 0))
pointwise(aten.threshold, lambda g, out, x, t, value: aten.threshold_backward(g, x, t))
pointwise(aten.threshold_backward, lambda h, out, g, x, t: aten.threshold_backward(h, x, t))
pointwise(aten.leaky_relu, lambda g, out, x, slope: aten.leaky_relu_backward(g, x, slope, False))
pointwise(
    aten.leaky_relu_backward,
    lambda h, out, g, x, slope, is_out: aten.leaky_relu_backward(h, x, slope, is_out),
)
pointwise(aten.hardtanh, lambda g, out, x, low, high: aten.hardtanh_backward(g, x, low, high))
pointwise(
    aten.hardtanh_backward, lambda h, out, g, x, low, high: aten.hardtanh_backward(h, x, low, high)
)
pointwise(aten.hardsigmoid, lambda g, out, x: aten.hardsigmoid_backward(g, x))
pointwise(aten.hardsigmoid_backward, lambda h, out, g, x: aten.hardsigmoid_backward(h, x))
pointwise(aten.hardshrink, lambda g, out, x, width: aten.hardshrink_backward(g, x, width))
pointwise(
    aten.hardshrink_backward, lambda h, out, g, x, width: aten.hardshrink_backward(h, x, width)
)
pointwise(aten.softshrink, lambda g, out, x, width: aten.softshrink_backward(g, x, width))
pointwise(
    aten.softshrink_backward, lambda h, out, g, x, width: aten.softshrink_backward(h, x, width)
)
pointwise(
    aten.rrelu_with_noise_backward,
    lambda h, out, g, x, noise, low, high, train, is_out: aten.rrelu_with_noise_backward(
        h, x, noise, low, high, train, is_out
    ),
)


# ----- smooth ones -------------------------------------------------------------------------------


def gelu_second(h: Tensor, out: Tensor, g: Tensor, x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":  # x cdf(x) differentiated twice
        return h * g * ((2 - x * x) * (x * x * -0.5).exp() * (1 / math.sqrt(2 * math.pi)))
    a, b = math.sqrt(2 / math.pi), 0.044715
    t, slope = aten.tanh(a * (x + b * x**3)), a * (1 + 3 * b * (x * x))
    return h * g * ((1 - t * t) * (slope + x * (3 * a * b * x - t * (slope * slope))))


def silu_first(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    if not x.is_complex():
        return aten.silu_backward(g, x)
    s = aten.sigmoid(x)  # aten's backward is for real numbers
    return g * (s * (1 + x * (1 - s)))


def silu_second(h: Tensor, out: Tensor, g: Tensor, x: Tensor) -> Tensor:
    s = aten.sigmoid(x)
    return h * g * (s * (1 - s) * (2 + x * (1 - 2 * s)))


def mish_second(h: Tensor, out: Tensor, g: Tensor, x: Tensor) -> Tensor:
    s, t = aten.sigmoid(x), aten.tanh(aten.softplus(x))
    return h * g * ((1 - t * t) * s * (2 + x * (1 - s - 2 * s * t)))


def softplus_second(
    h: Tensor, out: Tensor, g: Tensor, x: Tensor, beta: float, threshold: float
) -> Tensor:
    second = aten.sigmoid_backward(h * g, aten.sigmoid(x * beta)) * beta
    return second.masked_fill(x * beta > threshold, 0)  # the op is the identity up there


def elu_second(
    h: Tensor, out: Tensor, g: Tensor, a: float, b: float, c: float, is_out: bool, x: Tensor
) -> Tensor:
    """Differentiate ``elu`` twice: ``b x`` for positive ``x``, else ``a b (exp(c x) - 1)``."""
    return keep(x < 0, h * g * (c if is_out else (c * x).exp() * (a * b * c * c)))


pointwise(
    aten.gelu, lambda g, out, x, approximate: aten.gelu_backward(g, x, approximate=approximate)
)
pointwise(
    aten.gelu_backward,
    lambda h, out, g, x, approximate: aten.gelu_backward(h, x, approximate=approximate),
    gelu_second,
)


@vmap_of(aten.gelu_backward)
def _(g: Tensor, x: Tensor, approximate: str, *, batched: tuple[bool, bool]) -> Tensor:
    rank = max(g.dim() - batched[0], x.dim() - batched[1])
    g, x = (t if b else t.unsqueeze(0) for t, b in zip((g, x), batched, strict=True))
    g, x = align(g, rank), align(x, rank)
    # oneDNN's kernel does not broadcast
    return aten.gelu_backward(*torch.broadcast_tensors(g, x), approximate=approximate)


pointwise(aten.silu, silu_first)
series_as(aten.silu, lambda x: x * torch.sigmoid(x))
pointwise(aten.silu_backward, lambda h, out, g, x: aten.silu_backward(h, x), silu_second)
pointwise(aten.mish, lambda g, out, x: aten.mish_backward(g, x))
pointwise(aten.mish_backward, lambda h, out, g, x: aten.mish_backward(h, x), mish_second)
pointwise(
    aten.softplus, lambda g, out, x, beta, threshold: aten.softplus_backward(g, x, beta, threshold)
)
pointwise(
    aten.softplus_backward,
    lambda h, out, g, x, beta, threshold: aten.softplus_backward(h, x, beta, threshold),
    softplus_second,
)
series_as(
    aten.softplus_backward,
    lambda g, x, beta, threshold: torch.where(
        x * beta > threshold, g, g * torch.sigmoid(x * beta)
    ),
)
pointwise(aten.elu, lambda g, out, x, a, b, c: aten.elu_backward(g, a, b, c, False, x))
pointwise(aten.celu, lambda g, out, x, a: aten.elu_backward(g, a, 1, 1 / a, False, x))
pointwise(
    aten.elu_backward,
    lambda h, out, g, a, b, c, is_out, x: aten.elu_backward(h, a, b, c, is_out, x),
    elu_second,
)
pointwise(aten.hardswish, lambda g, out, x: aten.hardswish_backward(g, x))
pointwise(
    aten.hardswish_backward,
    lambda h, out, g, x: aten.hardswish_backward(h, x),
    lambda h, out, g, x: keep((x > -3) & (x < 3), h * g / 3),
)


# ----- more than one output, or a dimension ------------------------------------------------------


@vjp_of(aten.log_sigmoid_forward, diff_outputs=(0,))
def _(g: tuple[Tensor, None], outs: tuple[Tensor, Tensor], x: Tensor) -> list[Tensor]:
    return [aten.log_sigmoid_backward(g[0], x, outs[1])]


@vmap_of(aten.log_sigmoid_forward)
def _(x: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
    out, buffer = aten.log_sigmoid_forward(x)
    # the buffer is empty if the device needs none
    return out, buffer if buffer.dim() == x.dim() else buffer.expand(size, 0)


def as_batch(op: OpOverload) -> Any:
    """Return the vmap rule of an elementwise op that does not broadcast: batch all tensors."""
    return lambda *args: elementwise(op)(*args, batched=(True,) * len(tensor_args(op)))


pointwise(
    aten.log_sigmoid_backward,
    lambda h, out, g, x, buffer: aten.log_sigmoid_backward(h, x, buffer),
    lambda h, out, g, x, buffer: -aten.sigmoid_backward(h * g, aten.sigmoid(x)),
)


for op in (aten.log_sigmoid_backward.default, aten.rrelu_with_noise_backward.default):
    vmap_of(op)(as_batch(op))


@vjp_of(aten._prelu_kernel)
def _(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> list[Tensor]:
    return list(aten._prelu_kernel_backward(g, x, w))


@vjp_of(aten._prelu_kernel_backward)
def _(
    hs: tuple[Tensor | None, ...], outs: Any, g: Tensor, x: Tensor, w: Tensor
) -> list[Tensor | None]:
    hx, hw = hs  # cotangents of (g w or g, g x or 0), the first where x < 0
    left = [h * other for h, other in ((hx, w), (hw, x)) if h is not None]
    along_g = torch.where(x >= 0, 0 if hx is None else hx, sum(left[1:], left[0]))
    negative = (None if h is None else (g * h).masked_fill(x >= 0, 0) for h in (hw, hx))
    return [along_g, *negative]


for op in (aten._prelu_kernel.default, aten._prelu_kernel_backward.default):
    vmap_of(op)(as_batch(op))


@vjp_of(aten.rrelu_with_noise_functional, diff_outputs=(0,))
def _(
    g: Any, outs: Any, x: Tensor, noise: Tensor, low: float, high: float, train: bool
) -> list[Tensor | None]:
    return [aten.rrelu_with_noise_backward(g[0], x, outs[1], low, high, train, False), None]


@vjp_of(aten.glu)
def _(g: Tensor, out: Tensor, x: Tensor, dim: int) -> list[Tensor]:
    return [aten.glu_backward(g, x, dim)]


@vjp_of(aten.glu_backward)
def _(h: Tensor, out: Tensor, g: Tensor, x: Tensor, dim: int) -> list[Tensor]:
    a, b = x.chunk(2, dim)
    ha, hb = h.chunk(2, dim)
    s = aten.sigmoid(b)
    slope = s * (1 - s)
    along_a = g * slope * hb
    along_b = g * slope * (ha + hb * a * (1 - 2 * s))
    return [ha * s + hb * a * slope, torch.cat([along_a, along_b], dim)]


def last_of_unbatched(op: Any, x_at: int) -> Any:
    """Return the vmap rule of glu and its backward: ``dim`` is past the batch of all."""

    def batch(*args: Any) -> Tensor:
        dim = args[-1] % (args[x_at].dim() - 1) + 1
        return op(*args[:-1], dim)

    return batch


vmap_of(aten.glu)(last_of_unbatched(aten.glu, 0))
vmap_of(aten.glu_backward)(last_of_unbatched(aten.glu_backward, 1))

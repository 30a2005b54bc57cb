"""Rules of drawing random numbers: no derivative; under vmap one draw for all samples or one for
each.

``randomness="different"`` draws the whole batch at once. ``randomness="same"`` makes the draw of
one sample, as the op would without vmap, and shares it; parameters that differ between the samples
are applied to the shared draw, or refused if that is not possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .batching import align, expand_lead
from .pointwise import functional
from .schema import aten, call_op, tensor_args
from .table import broadcast_shapes, jvp_of, nondiff, pointwise, vjp_of, vmap_of


def one_draw(draw: Tensor, size: int) -> Tensor:
    """Return one sample's draw as a batch."""
    return draw.expand(size, *draw.shape)


def as_batches(tensors: Any, batched: Any, size: int) -> list[Tensor]:
    """Return the tensors as batches, ranks equal so that they broadcast sample by sample."""
    rank = max(x.dim() - b for x, b in zip(tensors, batched, strict=True))
    return [align(expand_lead(x, b, size), rank) for x, b in zip(tensors, batched, strict=True)]


def no_shared_draw() -> NotImplementedError:
    return NotImplementedError(
        "with randomness='same' it cannot share one draw, because the distribution differs "
        "between samples; use randomness='different', or draw from a fixed distribution and "
        "transform the draw"
    )


# ----- draws of a given shape --------------------------------------------------------------------


def of_size(op: OpOverload) -> Callable[..., Tensor]:
    at = [a.name for a in op._schema.arguments].index("size")

    def batch(*args: Any, size: int, randomness: str) -> Tensor:
        if randomness == "same":
            return one_draw(call_op(op, args), size)
        return call_op(op, [*args[:at], [size, *args[at]], *args[at + 1 :]])

    return batch


def sized(*packets: Any) -> list[OpOverload]:
    """List the overloads that make a tensor of a ``size`` from numbers."""
    ops = [
        getattr(p, name)
        for p in packets
        for name in p.overloads()
        if "names" not in name and "out" not in name
    ]
    return [
        op
        for op in ops
        if "size" in [a.name for a in op._schema.arguments] and not tensor_args(op)
    ]


nondiff(*sized(aten.rand, aten.randn, aten.randint, aten.normal), batch=of_size)


def permutations(op: OpOverload) -> Callable[..., Tensor]:
    def batch(*args: Any, size: int, randomness: str) -> Tensor:
        return (
            one_draw(call_op(op, args), size)
            if randomness == "same"
            else torch.stack([call_op(op, args) for _ in range(size)])
        )

    return batch


nondiff(aten.randperm, aten.randperm.generator, batch=permutations)


# ----- draws of the shape of a tensor ------------------------------------------------------------


def of_shape(op: OpOverload) -> Callable[..., Tensor]:
    """Return the vmap rule of a draw like its first tensor; a 0-dim bound stays unbatched."""
    names = [a.name for a in op._schema.arguments]
    where = tensor_args(op)

    def batch(*args: Any, batched: tuple[bool, ...], size: int, randomness: str) -> Tensor:
        if any(batched[1:]):
            raise no_shared_draw()
        full = list(args)
        like = full[where[0]]
        if randomness == "same":
            full[where[0]] = like[0] if batched[0] else like
            return one_draw(call_op(op, full), size)
        full[where[0]] = expand_lead(like, batched[0], size)
        if "memory_format" in names:  # it may suit the unbatched rank only
            full[names.index("memory_format")] = None
        return call_op(op, full)

    return batch


nondiff(*functional(aten.rand_like, aten.randn_like, aten.randint_like), batch=of_shape)
nondiff(
    *functional(
        aten.uniform,
        aten.normal_functional,
        aten.exponential,
        aten.cauchy,
        aten.geometric,
        aten.log_normal,
    ),
    *functional(aten.random),
    aten.bernoulli.p,
    batch=of_shape,
    zero=True,
)


# ----- draws from a distribution for each element ------------------------------------------------


def of_parameters(op: OpOverload) -> Callable[..., Tensor]:
    """Return the vmap rule of a draw whose tensor arguments are its parameters, and broadcast."""
    where = tensor_args(op)

    def batch(*args: Any, batched: tuple[bool, ...], size: int, randomness: str) -> Tensor:
        full = list(args)
        if randomness == "same":
            if any(batched):
                raise no_shared_draw()
            return one_draw(call_op(op, full), size)
        for i, x in zip(where, as_batches([args[i] for i in where], batched, size), strict=True):
            full[i] = x
        return call_op(op, full)

    return batch


nondiff(aten.poisson, aten.binomial, batch=of_parameters, zero=True)
vmap_of(aten._standard_gamma)(of_parameters(aten._standard_gamma.default))
vmap_of(aten._sample_dirichlet)(of_parameters(aten._sample_dirichlet.default))


@vjp_of(aten._standard_gamma)
def _(g: Tensor, out: Tensor, concentration: Tensor) -> list[Tensor]:
    return [g * aten._standard_gamma_grad(concentration, out)]


nondiff(
    *(aten.bernoulli, aten.bernoulli.Tensor),
    *(aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor),
    zero=True,
)


@vmap_of(aten.bernoulli)
def _(p: Tensor, generator: Any, *, batched: tuple[bool], size: int, randomness: str) -> Tensor:
    if randomness == "different":
        return aten.bernoulli(expand_lead(p, batched[0], size), generator=generator)
    if not batched[0]:
        return one_draw(aten.bernoulli(p, generator=generator), size)
    draw = aten.rand.generator(
        p.shape[1:], generator=generator, dtype=drawn_dtype(p.dtype), device=p.device
    )
    return (draw < p).to(p.dtype)


def drawn_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the numbers that ``bernoulli`` compares with ``dtype``'s."""
    return torch.promote_types(dtype, torch.float32)


@vmap_of(aten.bernoulli.Tensor)
def _(
    x: Tensor, p: Tensor, generator: Any, *, batched: tuple[bool, bool], size: int, randomness: str
) -> Tensor:
    like, p = as_batches([x, p], batched, size)
    if randomness == "different":
        return aten.bernoulli.Tensor(like, p, generator=generator)
    # in the order of memory
    draw = aten.uniform(torch.empty_like(like[0], dtype=drawn_dtype(p.dtype)), generator=generator)
    return (draw < p).to(x.dtype)


def normal(
    mean: Any, std: Any, generator: Any, batched: list[bool], size: int, randomness: str
) -> Tensor:
    """Return ``mean + std * noise``, as the op itself computes it."""
    tensors = [v for v in (mean, std) if isinstance(v, Tensor)]
    values = iter(as_batches(tensors, batched, size))
    mean, std = (next(values) if isinstance(v, Tensor) else v for v in (mean, std))
    shape = broadcast_shapes(*(v.shape for v in (mean, std) if isinstance(v, Tensor)))
    width = 1.0 if isinstance(std, Tensor) else std
    noise = aten.normal.float_float(
        0.0,
        width,
        shape[1:] if randomness == "same" else shape,
        generator=generator,
        dtype=tensors[0].dtype,
        device=tensors[0].device,
    )
    noise = (
        noise * std
        if isinstance(std, Tensor)
        else one_draw(noise, size)
        if randomness == "same"
        else noise
    )
    return noise + mean


@vmap_of(aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor)
def _(
    mean: Any, std: Any, generator: Any, *, batched: tuple[bool, ...], size: int, randomness: str
) -> Tensor:
    return normal(mean, std, generator, list(batched), size, randomness)


nondiff(aten.multinomial)


@vmap_of(aten.multinomial)
def _(p, count, replacement, generator, *, batched, size, randomness) -> Tensor:
    def draw(p: Tensor) -> Tensor:
        return aten.multinomial(p, count, replacement, generator=generator)

    if randomness == "same":
        if not batched[0]:
            return one_draw(draw(p), size)
        if replacement and count != 1:
            raise no_shared_draw()
        valid = ((p >= 0) & p.isfinite()).all() & (p.sum(-1) > 0).all()
        aten._assert_async.msg(
            valid, "multinomial: probabilities must be finite, not negative, and not all zero"
        )
        # as the op draws: the greatest wins
        race = p / aten.exponential(p[0], 1.0, generator=generator)
        return race.argmax(-1, keepdim=True) if count == 1 else race.topk(count)[1]
    p = expand_lead(p, batched[0], size)
    return draw(p.flatten(0, -2)).reshape(*p.shape[:-1], count)


# ----- dropout -----------------------------------------------------------------------------------


def dropout_scale(p: float, train: bool | None) -> float:
    if train is False:
        return 1.0
    return 0.0 if p == 1 else 1 / (1 - p)


@vjp_of(aten.native_dropout, diff_outputs=(0,))
def _(g: Any, outs: Any, x: Tensor, p: float, train: bool | None) -> list[Tensor]:
    return [aten.native_dropout_backward(g[0], outs[1], dropout_scale(p, train))]


@jvp_of(aten.native_dropout)
def _(
    tangents: tuple[Tensor], outs: Any, x: Tensor, p: float, train: bool | None
) -> tuple[Tensor, None]:
    return aten.native_dropout_backward(tangents[0], outs[1], dropout_scale(p, train)), None


@vmap_of(aten.native_dropout, elementwise=True)
def _(
    x: Tensor, p: float, train: bool | None, *, batched: tuple[bool], size: int, randomness: str
) -> tuple[Tensor, Tensor]:
    x = expand_lead(x, batched[0], size)
    if randomness == "different":
        return aten.native_dropout(x, p, train)
    mask = aten.native_dropout(x[0], p, train)[1]
    return x * mask * dropout_scale(p, train), one_draw(mask, size)


pointwise(
    aten.native_dropout_backward,
    lambda h, out, g, mask, scale: aten.native_dropout_backward(h, mask, scale),
)


@vmap_of(aten.rrelu_with_noise_functional)
def _(
    x, noise, low, high, train, generator, *, batched, size, randomness
) -> tuple[Tensor, Tensor]:
    x, noise = expand_lead(x, batched[0], size), expand_lead(noise, batched[1], size)
    if randomness == "different" or not train:
        return aten.rrelu_with_noise_functional(x, noise, low, high, train, generator)
    # drawn in double precision as the op does, one after the other where x is not positive
    slopes = aten.uniform(noise[0].double(), low, high, generator=generator).to(x.dtype).flatten()
    nth = (x <= 0).reshape(size, -1).cumsum(1).sub(1).clamp_min(0).reshape(x.shape)
    noise = torch.where(x <= 0, slopes[nth], 1)
    return x * noise, noise

"""Rules of complex numbers: conjugates, parts, angles and absolute values."""

from __future__ import annotations

import torch
from torch import Tensor

from .batching import elementwise
from .schema import aten
from .table import jvp_of, linear, pointwise, vjp_of, vmap_of, zeros

pointwise(aten.abs, lambda g, out, x: g * aten.sgn(x))


@jvp_of(aten.abs)
def _(tangents: tuple[Tensor], out: Tensor, x: Tensor) -> Tensor:
    product = tangents[0] * aten.sgn(x).conj()
    return product.real if x.is_complex() else product


linear(aten._conj_physical, lambda g, x: g.conj(), batch=elementwise(aten._conj_physical.default))
linear(aten._neg_view, lambda g, x: -g, batch=elementwise(aten._neg_view.default))


@vjp_of(aten.complex)
def _(g: Tensor, out: Tensor) -> list[Tensor]:
    return [g.real, g.imag]


@jvp_of(aten.complex)
def _(tangents: tuple[Tensor | None, ...], out: Tensor, x: Tensor, y: Tensor) -> Tensor:
    tx, ty = tangents
    return aten.complex(
        torch.zeros_like(x) if tx is None else tx, torch.zeros_like(y) if ty is None else ty
    )


@vjp_of(aten.polar)
def _(g: Tensor, out: Tensor) -> list[Tensor]:
    return [(g.conj() * aten.sgn(out)).real, (g.conj() * (out * 1j)).real]


@vjp_of(aten.angle)
def _(g: Tensor, out: Tensor, z: Tensor) -> list[Tensor]:
    if not z.is_complex():
        return [zeros(g)]
    return [torch.where(z == 0, 0, g * 1j / z.conj())]


@jvp_of(aten.angle)
def _(tangents: tuple[Tensor], out: Tensor, z: Tensor) -> Tensor:
    if not z.is_complex():
        return torch.zeros_like(out)
    return torch.where(z == 0, 0, (tangents[0] / z).imag)


def across(t: Tensor, out: Tensor, z: Tensor) -> Tensor:
    """Return ``t``'s part perpendicular to ``z``, over ``|z|``; the map is its own transpose."""
    return torch.where(z == 0, 0, (t - out * (out.conj() * t).real) / z.abs())


@vjp_of(aten.sgn)
def _(g: Tensor, out: Tensor, z: Tensor) -> list[Tensor]:
    return [across(g, out, z) if z.is_complex() else zeros(g)]


@jvp_of(aten.sgn)
def _(tangents: tuple[Tensor], out: Tensor, z: Tensor) -> Tensor:
    return across(tangents[0], out, z) if z.is_complex() else torch.zeros_like(out)


for op in (aten.complex.default, aten.polar.default, aten.angle.default, aten.sgn.default):
    vmap_of(op, elementwise=True)(elementwise(op))

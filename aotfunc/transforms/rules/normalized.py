"""The one function behind all normalisations, and its first and second derivatives.

``hat = (x - mean) * rstd`` with statistics over some dimensions, then a weight and a bias. The ops
differ in the layout, a :class:`NormLayout`, in which they use the formulas.

The saved statistics are outputs that carry a derivative like any other: higher derivatives are
written in plain ops on the mean and the rstd that the forward op saved, and reach ``x`` through
them. The backward ops on the other hand count as functions of the cotangent, ``x`` and the weight
alone, the statistics being those of ``x``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .table import total


@dataclass
class NormLayout:
    """The layout in which one op uses the common formulas.

    ``over`` are the dimensions of the statistics (empty if they are constants, as in evaluation),
    ``shared`` those along which the weight, of ``shape``, is shared. ``image``, ``affine`` and
    ``stat`` reshape ``x``, the weight or bias, and a statistic so that they broadcast, and
    ``back`` undoes ``image``. ``centred`` is false if no mean is subtracted."""

    over: list[int]
    shared: list[int]
    shape: Sequence[int]
    image: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    affine: Callable[[Tensor], Tensor]
    stat: Callable[[Tensor], Tensor]
    centred: bool = True

    def hat(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
        """Return the normalised image."""
        return (self.image(x) - self.stat(mean) if self.centred else self.image(x)) * self.stat(
            rstd
        )

    def mean(self, v: Tensor) -> Tensor:
        return v.mean(self.over, keepdim=True)

    def project(self, v: Tensor, hat: Tensor) -> Tensor:
        """Return what survives, of a change ``v`` of ``x``, but for ``rstd``: a symmetric map."""
        if not self.over:
            return v
        moved = v - self.mean(v) if self.centred else v
        return moved - hat * self.mean(v * hat)


def weighted(v: Tensor | None, w: Tensor | None) -> Tensor | None:
    """Return ``v * w``; a missing weight is one."""
    return v if v is None or w is None else v * w


def forward_tangent(at: NormLayout, tangents: Sequence[Tensor | None], x, weight, mean, rstd):
    """Return tangents of ``(out, mean, rstd)``."""
    tx, tw, tb = tangents
    hat, of_mean, of_rstd = at.hat(x, mean, rstd), None, None
    terms = []
    if tx is not None:
        r, tx = at.stat(rstd), at.image(tx)
        t = r * at.project(tx, hat)
        terms.append(t if weight is None else t * at.affine(weight))
        if at.over:
            of_mean = at.mean(tx).reshape(rstd.shape) if at.centred else None
            of_rstd = (-r * r * at.mean(tx * hat)).reshape(rstd.shape)
    if tw is not None:
        terms.append(hat * at.affine(tw))
    if tb is not None:
        terms.append(at.affine(tb).expand(hat.shape))
    out = total(*terms)
    return out if out is None else at.back(out), of_mean, of_rstd


def of_statistics(
    at: NormLayout, g_mean: Tensor | None, g_rstd: Tensor | None, x, mean, rstd
) -> Tensor | None:
    """Return the cotangent of ``x`` through the saved statistics."""
    if not at.over or (g_mean is None and g_rstd is None):
        return None
    image = at.image(x)
    count = 1
    for d in at.over:
        count = count * image.shape[d]
    g = at.stat(g_mean) / count if g_mean is not None and at.centred else None
    if g_rstd is not None:
        g = total(g, at.stat(-g_rstd * rstd * rstd) * at.hat(x, mean, rstd) / count)
    return None if g is None else at.back(g.expand(image.shape))


def backward_tangent(
    at: NormLayout, tangents: Sequence[Tensor | None], mask, g, x, weight, mean, rstd
):
    """Return tangents of ``(gradient of x, of the weight, of the bias)``."""
    tg, tx, tw = (
        None if t is None else f(t)
        for t, f in zip(tangents, (at.image, at.image, at.affine), strict=True)
    )
    hat, r, go = at.hat(x, mean, rstd), at.stat(rstd), at.image(g)
    w = None if weight is None else at.affine(weight)
    t_hat = r * at.project(tx, hat) if tx is not None else None
    of_x = of_w = of_b = None
    if mask[0]:
        gh = weighted(go, w)
        t_gh = total(weighted(tg, w), None if tw is None else go * tw)
        terms = [] if t_gh is None else [r * at.project(t_gh, hat)]
        if t_hat is not None and at.over:
            terms.append(-r * (t_hat * at.mean(gh * hat) + hat * at.mean(gh * t_hat)))
            terms.append(-r * r * at.mean(tx * hat) * at.project(gh, hat))
        of_x = total(*terms)
        of_x = of_x if of_x is None else at.back(of_x)
    if mask[1]:
        v = total(None if tg is None else tg * hat, None if t_hat is None else go * t_hat)
        of_w = None if v is None else summed_over(v, at)
    if len(mask) > 2 and mask[2] and tg is not None:
        of_b = summed_over(tg, at)
    return of_x, of_w, of_b


def backward_cotangent(
    at: NormLayout, cotangents: Sequence[Tensor | None], g, x, weight, mean, rstd, needs
):
    """Return cotangents of ``(g, x, weight)`` by those of :func:`backward_tangent`'s results."""
    a, b, c = (
        None if t is None else f(t)
        for t, f in zip(cotangents, (at.image, at.affine, at.affine), strict=True)
    )
    hat, r, go = at.hat(x, mean, rstd), at.stat(rstd), at.image(g)
    w = None if weight is None else at.affine(weight)
    ra = r * at.project(a, hat) if a is not None else None
    of_g = of_x = of_w = None
    if needs[0]:
        of_g = total(
            weighted(ra, w),
            None if b is None else hat * b,
            None if c is None else c.expand(hat.shape),
        )
        of_g = of_g if of_g is None else at.back(of_g)
    if needs[1]:
        of_hat = [go * b] if b is not None else []
        through_r = None
        if a is not None and at.over:
            gh = weighted(go, w)
            along = at.mean(gh * hat)
            of_hat.append(-r * (a * along + gh * at.mean(a * hat)))
            through_r = -r * r * hat * at.mean(a * at.project(gh, hat))
        v = total(*of_hat)
        of_x = total(None if v is None else r * at.project(v, hat), through_r)
        of_x = of_x if of_x is None else at.back(of_x)
    if needs[2] and ra is not None:
        of_w = summed_over(go * ra, at)
    return of_g, of_x, of_w


def summed_over(v: Tensor, at: NormLayout) -> Tensor:
    """Sum ``v`` over the dimensions that the weight is shared along."""
    return (v.sum(at.shared) if at.shared else v).reshape(at.shape)

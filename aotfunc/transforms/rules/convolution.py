"""Rules of convolution.

It is linear in the image and in the weight, and its backward op holds the two transposes. Whatever
the stride, padding, dilation, groups or direction, ``<a, image gradient> = <conv(a, w), g>`` and
``<b, weight gradient> = <conv(x, b), g>``: all second derivatives follow from these two.

A batch is never a loop here. If only the images carry it, it is folded into their ``N``; if the
weight carries it too, it becomes groups of one wide convolution, as per-sample gradients do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .batching import all_batched, along_channels, into, out_of, with_batch
from .schema import aten
from .table import jvp_of, total, vjp_of, vmap_of


@vjp_of(aten.convolution)
def _(g, out, x, w, bias, stride, padding, dilation, transposed, output_padding, groups, *, needs):
    sizes = None if bias is None else list(bias.shape)
    mask = [bool(need) for need in needs]
    if not transposed:  # the forward op ignores it, the backward op refuses it
        output_padding = [0] * len(output_padding)
    return aten.convolution_backward(
        g, x, w, sizes, stride, padding, dilation, transposed, output_padding, groups, mask
    )


def convolution_tangent(tangents, x, w, shape, *geometry) -> Tensor | None:
    """Return the tangent of a convolution of this shape from those of ``(x, w, bias)``."""
    tx, tw, tb = tangents
    if tx is None and tw is None:
        return None if tb is None else along_channels(tb, len(shape) - 2).expand(shape)
    return total(
        None if tx is None else aten.convolution(tx, w, tb, *geometry),
        None if tw is None else aten.convolution(x, tw, tb if tx is None else None, *geometry),
    )


@jvp_of(aten.convolution)
def _(tangents, out, x, w, bias, *geometry):
    return convolution_tangent(tangents, x, w, out.shape, *geometry)


@vmap_of(aten.convolution)
def _(x, w, bias, *geometry, batched, size):
    image, weight, offset = batched
    *geometry, groups = geometry
    if not weight:
        inner = None if offset else bias
        if image:
            out = aten.convolution(x.flatten(0, 1), w, inner, *geometry, groups).unflatten(
                0, (size, -1)
            )
        else:
            out = aten.convolution(x, w, inner, *geometry, groups)
        return out + along_channels(bias, x.dim() - 2 - image) if offset else out
    # one set of groups per sample, or wider groups that share the image
    lanes = 1 if image else groups
    if bias is not None:
        bias = into(with_batch(bias, offset, size), 0, lanes)
    w = weight_lanes(w, image, geometry, groups)
    out = aten.convolution(
        into(x, 1) if image else x, w, bias, *geometry, groups * size if image else groups
    )
    return out_of(out, 1, size, lanes)


def weight_lanes(w: Tensor, apart: bool, geometry: Any, groups: int) -> Tensor:
    """Return a batch of weights as one weight: each is a set of groups if ``apart``, else more
    output channels in the same groups."""
    return into(w, 0) if apart else into(w, 1) if geometry[3] else into(w, 0, groups)


@vjp_of(aten.convolution_backward)
def _(cotangents, out, g, x, w, bias_sizes, *geometry, needs):
    a, b, _ = cotangents
    geometry = geometry[:-1]  # without the output mask
    of_g = of_x = of_w = None
    if needs[0]:
        of_g = convolution_tangent(cotangents, x, w, g.shape, *geometry)
    if needs[1] and b is not None:
        of_x = aten.convolution_backward(g, x, b, None, *geometry, [True, False, False])[0]
    if needs[2] and a is not None:
        of_w = aten.convolution_backward(g, a, w, None, *geometry, [False, True, False])[1]
    return of_g, of_x, of_w


@jvp_of(aten.convolution_backward)
def _(tangents, out, g, x, w, bias_sizes, *geometry):
    tg, tx, tw = tangents
    *geometry, mask = geometry
    result = (None, None, None)
    if tg is not None:
        result = aten.convolution_backward(tg, x, w, bias_sizes, *geometry, mask)
    cross = [mask[0] and tw is not None, mask[1] and tx is not None, False]
    if any(cross):
        image, weight = (x if tx is None else tx), (w if tw is None else tw)
        more = aten.convolution_backward(g, image, weight, None, *geometry, cross)
        result = [total(*pair) for pair in zip(result, more, strict=True)]
    return tuple(result)


@vmap_of(aten.convolution_backward)
def _(g, x, w, bias_sizes, *geometry, batched, size):
    outer, image, weight = batched
    *geometry, groups, mask = geometry
    transposed = geometry[3]
    backward = aten.convolution_backward
    of_x = of_w = of_b = None
    gb, xb, wb = all_batched((g, x, w), batched, size)
    some_w = w.new_zeros(()).expand(wb.shape)  # a weight whose shape alone matters
    # which of the two need a set of groups per sample
    apart_x, apart_w = mask[0] and weight, mask[1] and image
    if apart_x or apart_w:
        wide_w = into(wb if apart_x else some_w, 0)
        which = [apart_x, apart_w, False]
        of_x, of_w, _ = backward(
            into(gb, 1), into(xb, 1), wide_w, None, *geometry, groups * size, which
        )
        of_x = out_of(of_x, 1, size) if apart_x else None
        of_w = out_of(of_w, 0, size) if apart_w else None
    if mask[0] and not apart_x and outer:
        folded = backward(
            g.flatten(0, 1), xb.flatten(0, 1), w, None, *geometry, groups, [True, False, False]
        )[0]
        of_x = folded.unflatten(0, (size, -1))
    if mask[1] and not apart_w and outer:
        wide = weight_lanes(some_w, False, geometry, groups)
        of_w = backward(
            into(g, 1, groups), x, wide, None, *geometry, groups, [False, True, False]
        )[1]
        of_w = out_of(of_w, 1, size) if transposed else out_of(of_w, 0, size, groups)
    alone = [bool(mask[0] and of_x is None), bool(mask[1] and of_w is None), False]
    if any(alone):  # nothing this one depends on carries the batch
        # its values do not matter
        x, w = (t.select(0, 0) if b else t for t, b in ((x, image), (w, weight)))
        once = backward(g, x, w, None, *geometry, groups, alone)
        of_x = once[0].expand(size, *x.shape) if alone[0] else of_x
        of_w = once[1].expand(size, *w.shape) if alone[1] else of_w
    if mask[2]:
        of_b = gb.sum([1, *range(3, gb.dim())])
    return of_x, of_w, of_b

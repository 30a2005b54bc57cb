"""Rules of the ops that slide a window: convolution and pooling.

A batch is never a loop here. Where only the images carry it, it is folded into the ``N`` they have
anyway; where the weight carries it too, it becomes groups of one wide convolution, which is what
per-sample gradients run on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverloadPacket

from aotfunc.transforms.rules.batching import along_channels, into, out_of, planes, with_batch
from aotfunc.transforms.rules.table import aten, jvp_of, linear, overload, total, vjp_of, vmap_of

# ----- convolution -------------------------------------------------------------------------------
# The convolution is linear in the image and in the weight, and its backward op holds the two
# transposes. Whatever the stride, padding, dilation, groups or direction, <a, image gradient> =
# <conv(a, w), g> and <b, weight gradient> = <conv(x, b), g>; all the second derivatives follow
# from these two.


@vjp_of(aten.convolution)
def _(g, out, x, w, bias, stride, padding, dilation, transposed, output_padding, groups, *, needs):
    sizes = None if bias is None else list(bias.shape)
    mask = [bool(need) for need in needs]
    if not transposed:  # the forward op ignores it, the backward op refuses it
        output_padding = [0] * len(output_padding)
    return aten.convolution_backward(
        g, x, w, sizes, stride, padding, dilation, transposed, output_padding, groups, mask
    )


@jvp_of(aten.convolution)
def _(tangents, out, x, w, bias, *geometry):
    tx, tw, tb = tangents
    by_image = aten.convolution(tx, w, tb, *geometry) if tx is not None else None
    by_weight = (
        aten.convolution(x, tw, tb if tx is None else None, *geometry) if tw is not None else None
    )
    if tx is None and tw is None and tb is not None:
        return along_channels(tb, out.dim() - 2).expand(out.shape)
    return total(t for t in (by_image, by_weight) if t is not None)


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
    lanes = (
        1 if image else groups
    )  # one set of groups per batch element, or wider groups that share the image
    if bias is not None:
        bias = into(with_batch(bias, offset, size), 0, lanes)
    w = weight_lanes(w, image, geometry, groups)
    out = aten.convolution(
        into(x, 1) if image else x, w, bias, *geometry, groups * size if image else groups
    )
    return out_of(out, 1, size, lanes)


def weight_lanes(w: Tensor, apart: bool, geometry: Any, groups: int) -> Tensor:
    """A batch of weights as one: each a set of groups ``apart``, or more output channels in the
    same groups."""
    return into(w, 0) if apart else into(w, 1) if geometry[3] else into(w, 0, groups)


@vjp_of(aten.convolution_backward)
def _(cotangents, out, g, x, w, bias_sizes, *geometry, needs):
    a, b, c = cotangents
    geometry = geometry[:-1]  # without the output mask
    of_g = of_x = of_w = None
    if needs[0]:
        of_g = total(
            t
            for t in (
                aten.convolution(a, w, c, *geometry) if a is not None else None,
                aten.convolution(x, b, c if a is None else None, *geometry)
                if b is not None
                else None,
                along_channels(c, g.dim() - 2).expand(g.shape)
                if a is None and b is None and c is not None
                else None,
            )
            if t is not None
        )
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
        result = [
            total(t for t in pair if t is not None) for pair in zip(result, more, strict=True)
        ]
    return tuple(result)


@vmap_of(aten.convolution_backward)
def _(g, x, w, bias_sizes, *geometry, batched, size):
    outer, image, weight = batched
    *geometry, groups, mask = geometry
    transposed = geometry[3]
    backward = aten.convolution_backward
    of_x = of_w = of_b = None
    gb, xb, wb = (with_batch(t, b, size) for t, b in zip((g, x, w), batched, strict=True))
    some_w = w.new_zeros(()).expand(wb.shape)  # stands for the weight where only its shape matters
    apart_x, apart_w = (
        mask[0] and weight,
        mask[1] and image,
    )  # which of the two want a set of groups per element
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
        x, w = (
            t.select(0, 0) if b else t for t, b in ((x, image), (w, weight))
        )  # its values do not matter
        once = backward(g, x, w, None, *geometry, groups, alone)
        of_x = once[0].expand(size, *x.shape) if alone[0] else of_x
        of_w = once[1].expand(size, *w.shape) if alone[1] else of_w
    if mask[2]:
        of_b = gb.sum([1, *range(3, gb.dim())])
    return of_x, of_w, of_b


# ----- pooling -----------------------------------------------------------------------------------


def pick(x: Tensor, indices: Tensor, spatial: int) -> Tensor:
    """From each plane of ``x`` the values at ``indices``, which count within the flattened
    plane."""
    return x.flatten(-spatial).gather(-1, indices.flatten(-spatial)).reshape(indices.shape)


def max_pooling(op: OpOverloadPacket, backward: OpOverloadPacket, spatial: int) -> None:
    """Register a pooling with outputs ``(values, indices)`` and its backward op, which takes the
    indices last."""
    vmap_of(op)(planes(op, spatial))
    adaptive = (
        len(overload(backward)._schema.arguments) == 3
    )  # such a backward op reads the geometry off the shapes

    @vjp_of(op)
    def _(g, out, x, *geometry):
        return [backward(g[0], x, *(() if adaptive else geometry), out[1])]

    @jvp_of(op)
    def _(tangents, out, x):
        return pick(tangents[0], out[1], spatial), None

    linear(
        backward,
        lambda g, go, x, *rest: pick(g, rest[-1], spatial),
        None,
        None,
        batch=planes(backward, spatial),
    )


max_pooling(aten.max_pool2d_with_indices, aten.max_pool2d_with_indices_backward, 2)
max_pooling(aten.max_pool3d_with_indices, aten.max_pool3d_with_indices_backward, 3)
max_pooling(aten.adaptive_max_pool2d, aten.adaptive_max_pool2d_backward, 2)
max_pooling(aten.adaptive_max_pool3d, aten.adaptive_max_pool3d_backward, 3)


def average_pooling(op: OpOverloadPacket, backward: OpOverloadPacket, spatial: int) -> None:
    """Register an average pooling and its backward op, which takes the same arguments after the
    cotangent."""
    linear(op, lambda g, x, *geometry: backward(g, x, *geometry), batch=planes(op, spatial))
    linear(
        backward,
        lambda g, go, x, *geometry: op(g, *geometry),
        None,
        batch=planes(backward, spatial),
    )


average_pooling(aten.avg_pool2d, aten.avg_pool2d_backward, 2)
average_pooling(aten.avg_pool3d, aten.avg_pool3d_backward, 3)


def adaptive_average_pooling(
    op: OpOverloadPacket, backward: OpOverloadPacket, spatial: int
) -> None:
    """As :func:`average_pooling`, but the backward op reads the output's size off the
    cotangent."""
    linear(op, lambda g, x: backward(g, x), batch=planes(op, spatial))
    linear(
        backward,
        lambda g, go, x: op(g, go.shape[-spatial:]),
        None,
        batch=planes(backward, spatial),
    )


adaptive_average_pooling(aten._adaptive_avg_pool2d, aten._adaptive_avg_pool2d_backward, 2)
adaptive_average_pooling(aten._adaptive_avg_pool3d, aten._adaptive_avg_pool3d_backward, 3)

linear(
    aten.max_unpool2d,
    lambda g, x, indices: pick(g, indices, 2),
    None,
    batch=planes(aten.max_unpool2d, 2),
)
linear(
    aten.max_unpool3d,
    lambda g, x, indices: pick(g, indices, 3),
    None,
    batch=planes(aten.max_unpool3d, 3),
)


def fractional_pooling(op: OpOverloadPacket, backward: OpOverloadPacket, spatial: int) -> None:
    """As :func:`max_pooling`; where the windows begin is drawn beforehand and given as the last
    argument."""

    @vmap_of(op)
    def _(x: Tensor, kernel: Any, shape: Any, draws: Tensor) -> tuple[Tensor, Tensor]:
        size, images = x.shape[0], x.dim() == spatial + 3
        out = op(x.flatten(0, 1) if images else x, kernel, shape, draws.flatten(0, 1))
        values, indices = (o.unflatten(0, (size, -1)) if images else o for o in out)
        return values, indices

    @vjp_of(op, diff_outputs=(0,))
    def _(g, out, x, kernel, shape):
        return [backward(g[0], x, kernel, shape, out[1])]

    @jvp_of(op)
    def _(tangents, out, x):
        return pick(tangents[0], out[1], spatial), None

    linear(
        backward,
        lambda g, go, x, *rest: pick(g, rest[-1], spatial),
        None,
        None,
        batch=planes(backward, spatial),
    )


fractional_pooling(aten.fractional_max_pool2d, aten.fractional_max_pool2d_backward, 2)
fractional_pooling(aten.fractional_max_pool3d, aten.fractional_max_pool3d_backward, 3)

"""Follow the batch through layers of networks: in front, or among the channels."""

from __future__ import annotations

from typing import Any

from .parts import Mixed, OpCall, Part, part_rule

PADS, BACK = ("reflection", "replication"), ("", "_backward")


@part_rule("nll_loss_forward nll_loss_backward")
def nll_loss(c: OpCall) -> Any:
    names = [name for name in ("self", "target", "grad_output") if name in c.arg]
    part = c.of("self")[1]
    if (
        c.arg["reduction"]
        or c.arg["weight"] is not None
        or any(c.of(name)[1] != Part(0) for name in names)
    ):
        raise Mixed
    return [part, None] if isinstance(c.val, tuple) else part  # the total weight is that of a mean


@part_rule(
    "max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d avg_pool2d_backward "
    "_adaptive_avg_pool2d"
)
@part_rule(
    "max_pool3d_with_indices max_pool3d_with_indices_backward avg_pool3d avg_pool3d_backward"
)
@part_rule("_adaptive_avg_pool2d_backward adaptive_max_pool2d adaptive_max_pool2d_backward")
@part_rule("adaptive_max_pool3d adaptive_max_pool3d_backward max_unpool2d max_unpool3d")
@part_rule(" ".join(f"{way}_pad{d}d{back}" for way in PADS for d in (1, 2, 3) for back in BACK))
@part_rule("channel_shuffle upsample_linear1d upsample_bilinear2d upsample_bicubic2d")
@part_rule("upsample_trilinear3d upsample_nearest1d upsample_nearest2d upsample_nearest3d")
@part_rule("_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d")
def pooled(c: OpCall) -> Any:
    return in_front(c, c.alike()[1])


@part_rule("upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward")
@part_rule("upsample_trilinear3d_backward upsample_nearest1d_backward upsample_nearest2d_backward")
@part_rule("upsample_nearest3d_backward")
@part_rule(" ".join(f"_upsample_nearest_exact{d}d_backward" for d in (1, 2, 3)))
def upsample_backward(c: OpCall) -> Any:
    part = pooled(c)
    c.scaled("input_size", 0, part.each)
    return part


@part_rule("grid_sampler_2d grid_sampler_2d_backward grid_sampler_3d grid_sampler_3d_backward")
def grid_sampler(c: OpCall) -> Any:
    found = in_front(c, c.alike()[1])
    if isinstance(found, list):
        return [p if yes else None for p, yes in zip(found, c.arg["output_mask"], strict=True)]
    return found


@part_rule("pixel_shuffle pixel_unshuffle")
def pixels(c: OpCall) -> Any:
    sig, part = c.alike()
    part.without(range(sig.ndim - 3, sig.ndim))
    return part


@part_rule("im2col col2im")
def blocks(c: OpCall) -> Any:
    sig, part = c.alike()
    if sig.ndim != (3 if "output_size" in c.arg else 4):
        raise Mixed
    return in_front(c, part)


@part_rule(
    "_scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention_for_cpu_backward"
)
def attention(c: OpCall) -> Any:
    part = c.tensors[0][1]
    if any(p != part for _, p in c.tensors):
        raise Mixed
    return in_front(c, part)


@part_rule("native_group_norm")
def native_group_norm(c: OpCall) -> Any:
    _, part = c.only("input")
    c.scaled("N", None, part.each)
    return in_front(c, part)


@part_rule("native_group_norm_backward")
def native_group_norm_backward(c: OpCall) -> Any:
    part = c.of("input")[1]
    shared = c.of("weight")[1] is not None or any(c.arg["output_mask"][1:])
    if (
        part is None
        or part.dim
        or shared
        or any(c.of(name)[1] != part for name in ("grad_out", "mean", "rstd"))
    ):
        raise Mixed
    c.scaled("N", None, part.each)
    return [part, None, None]


def in_front(c: OpCall, part: Part | None) -> Any:
    if part is None or part.dim:
        raise Mixed
    return c.each(part)


@part_rule("native_layer_norm")
def native_layer_norm(c: OpCall) -> Any:
    sig, part = c.only("input")
    part.without(range(sig.ndim - len(c.arg["normalized_shape"]), sig.ndim))
    return c.each(part)


@part_rule("native_layer_norm_backward")
def native_layer_norm_backward(c: OpCall) -> Any:
    sig, part = c.of("input")
    given = [c.of(name)[1] for name in ("grad_out", "mean", "rstd")]
    shared = [c.of(name)[1] for name in ("weight", "bias")]
    if (
        part is None
        or any(p != part for p in given)
        or shared != [None, None]
        or any(c.arg["output_mask"][1:])
    ):
        raise Mixed
    part.without(range(sig.ndim - len(c.arg["normalized_shape"]), sig.ndim))
    return [part, None, None]


@part_rule("convolution")
def convolved(c: OpCall) -> Any:
    if c.of("weight")[1] is None:
        return in_front(c, c.only("input")[1])
    among_channels(c, "input")
    return Part(1, c.val.shape[1] // c.walk.size)


@part_rule("convolution_backward")
def convolution_backward(c: OpCall) -> Any:
    (_, g), (_, x), (_, weight) = c.of("grad_output"), c.of("input"), c.of("weight")
    if weight is None:
        if g is None or g != x or g.dim or any(c.arg["output_mask"][1:]):
            raise Mixed
        return [g, None, None]
    among_channels(c, "input", "grad_output")
    bias = None
    if c.arg["output_mask"][2]:
        bias = Part(0, c.arg["bias_sizes"][0] // c.walk.size)
        c.scaled("bias_sizes", 0, bias.each)
    return [
        p if yes else None for p, yes in zip((x, weight, bias), c.arg["output_mask"], strict=True)
    ]


def among_channels(c: OpCall, *images: str) -> None:
    """Keep the batch among the channels: each sample has its own groups and weights."""
    groups, left = divmod(c.arg["groups"], c.walk.size)
    apart = all((p := c.of(name)[1]) is not None and p.dim == 1 for name in images)
    vectors = [c.of(name)[1] for name in ("weight", "bias") if c.arg.get(name) is not None]
    if left or not groups or not apart or any(p is None or p.dim for p in vectors):
        raise Mixed
    c.scaled("groups", None, groups)

"""Images that are resized, or padded by their own elements: as in eager mode."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from aotfunc import grad, jit
from aotfunc.backends.loops import native
from tests.backends.test_cpp import against_the_interpreter, agree, floats, kernels_of
from tests.kernels import every_kernel

pytestmark = pytest.mark.usefixtures("cache")

IMAGE = floats(2, 3, 5, 18)
CHANNELS_LAST = partial(Tensor.contiguous, memory_format=torch.channels_last)
#: where to: smaller, larger, both, of one size, to one element, a number of times
TO = (
    *({"size": s} for s in ((3, 11), (9, 40), (3, 40), (5, 40), (1, 1), (5, 18))),
    *({"scale_factor": s} for s in (2, 0.5, (1.3, 2.6))),
)


def resized(x, mode, every=TO, **how):
    return [F.interpolate(x, mode=mode, **to, **how) for to in every if fits(x, to)]


def fits(x, to):
    """Return whether no dimension becomes empty."""
    return to.get("scale_factor") != 0.5 or min(x.shape[2:]) > 1


def gradient(f):
    """Return the function of x and weights of all results that gives the gradient of their sum."""
    return grad(lambda x, ws: sum([(y * w).sum() for y, w in zip(f(x), ws, strict=True)]))


@pytest.mark.parametrize(
    ("mode", "corners", "dtype"),
    [
        ("bilinear", False, torch.float32),
        ("bilinear", True, torch.float32),
        ("bicubic", False, torch.float64),
        ("bicubic", True, torch.float32),
    ],
)
def test_interpolated(mode, corners, dtype):
    """Values and gradients in one program each: sizes are arguments of the same kernels."""
    image = IMAGE.to(dtype)
    for x in (image, image[:, :, :1].contiguous(), CHANNELS_LAST(image)):
        f = lambda x: resized(x, mode, align_corners=corners)
        agree(f, x, kernels=None, rtol=1e-4, atol=1e-4)
        f = lambda x: resized(x, mode, TO[1:7:5], align_corners=corners)
        weights = [torch.randn_like(y) for y in f(x)]
        agree(gradient(f), x, weights, kernels=None, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest(mode):
    """The same elements in every size, and where factors contradict sizes."""

    def f(x):
        sizes = [[n * k // 7 + 1 for n in x.shape[2:]] for k in range(0, 23, 3)]
        to = [{"size": s} for s in sizes]
        to += [{"scale_factor": s} for s in (0.7, 1, 1.1, 1.3, 2, 2.3, 3.5)]
        return [F.interpolate(x, mode=mode, **how) for how in to]

    for x in (floats(3, 2, 7), IMAGE, floats(1, 2, 3, 4, 5)):
        agree(f, x, kernels=None)


SPECIAL = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_special_values(mode):
    """Infinity times a weight of zero is NaN, in all layouts and at all places."""
    x = torch.full((1, 2, 9, 30), 1.0)
    x.view(-1)[::37] = SPECIAL.repeat(2)[: len(x.view(-1)[::37])]
    agree(lambda x: resized(x, mode), x, kernels=None)
    f = lambda x: resized(x, mode, TO[6:7])
    agree(gradient(f), x, [y.clone() for y in f(x)], kernels=None)


FACTORS = (3, 1.3, 2.6, 1.7, 3.5, 0.7, 2.2, 1.9)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("bilinear", torch.float32), ("bicubic", torch.float32), ("bicubic", torch.float64)],
)
def test_infinities_beside_weights_that_round_to_zero(mode, dtype):
    """An infinity is NaN, or the element finite, where a weight or a position is a last bit
    off."""
    x = floats(1, 2, 9, 30, dtype=dtype)
    to = [{"scale_factor": (FACTORS[-1 - i], s)} for i, s in enumerate(FACTORS)]
    f = jit(lambda x: resized(x, mode, to), backend=every_kernel)
    for first in range(7):
        x_ = x.clone()
        x_.view(-1)[first::7] = math.inf
        assert_close(f(x_), resized(x_, mode, to), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_images_of_several_sizes_become_one():
    """Two kernels of one index: each with its own scale."""
    f = lambda x, y: resized(x, "bicubic", TO[1:2])[0] + resized(y, "bicubic", TO[1:2])[0]
    agree(f, floats(2, 3, 4, 7), floats(2, 3, 6, 9), kernels=None, rtol=1e-4, atol=1e-4)


def test_a_scale_that_contradicts_the_size():
    """Many elements are the last one."""
    up = torch.ops.aten.upsample_bilinear2d
    f = lambda x: [up(x, [10, 40], False, 1.0, 1.5)]
    agree(f, IMAGE, kernels=None)
    agree(gradient(f), IMAGE, [torch.randn(2, 3, 10, 40)], kernels=None)


def test_volumes():
    x = floats(2, 3, 4, 5, 6)
    for how in ({"scale_factor": 2}, {"size": (7, 3, 9), "align_corners": True}):
        f = lambda x, how=how: [F.interpolate(x, mode="trilinear", **how)]
        agree(f, x, kernels=None, rtol=1e-4, atol=1e-4)
        agree(gradient(f), x, [torch.randn_like(f(x)[0])], kernels=None, rtol=1e-4, atol=1e-4)


PADS = {
    3: [(1, 2), (0, 3), (4, 0)],
    4: [(1, 2, 3, 0), (3, 3, 3, 3), (0, 0, 2, 1), (-1, 2, 1, -2)],
    5: [(1, 2, 0, 1, 1, 0), (2, 2, 2, 2, 2, 2)],
}


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("replicate", torch.float32),
        *(("reflect", d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    ],
)
def test_padded(mode, dtype):
    def f(x):
        return [F.pad(x.sin() * 2, pad, mode) - 1 for pad in PADS[x.dim()]]

    for x in (floats(2, 3, 37), floats(2, 3, 4, 37), floats(2, 1, 4, 4, 5)):
        x = x.to(dtype)
        agree(f, x, kernels=None)
    if dtype is torch.float32:
        agree(gradient(f), x, [torch.randn_like(y) for y in f(x)], kernels=None)
    agree(f, CHANNELS_LAST(IMAGE.to(dtype)), kernels=None)


def test_an_image_of_one_element():
    x = floats(2, 3, 1, 1)
    agree(lambda x: F.pad(x, (2, 1, 0, 3), "replicate") * 2, x, kernels=None)
    agree(lambda x: [*resized(x, "bilinear"), *resized(x, "bicubic")], x, kernels=None)


def test_nothing():
    x = floats(0, 3, 4, 5)
    agree(lambda x: [*resized(x, "bilinear"), F.pad(x, (1, 1, 1, 1), "reflect")], x, kernels=None)


def test_kernels_against_the_interpreter():
    ops = torch.ops.aotfunc
    for dtype, cubic in ((torch.float32, False), (torch.float64, True)):
        for f in (
            lambda x, cubic=cubic: ops.resized(x, 3, 40, 0.45, False, cubic),
            lambda x, cubic=cubic: ops.resized(x, 2, 3, 2.0, True, cubic),
            lambda x, cubic=cubic: ops.resized_backward(x, 3, 7, 7 / 18, False, cubic),
            lambda x: F.pad(x, (3, 4, 1, 2), "reflect"),
            lambda x: F.pad(x, (3, 4, 1, 2), "replicate"),
        ):
            (kernel,) = kernels_of(f, IMAGE.to(dtype))
            against_the_interpreter(kernel)


def test_ops_without_a_kernel():
    """Called, they give the same numbers, and the other one is the transpose."""
    x, how = IMAGE.double(), (0.45, False, True)
    f = lambda x: torch.ops.aotfunc.resized(x, 3, 40, *how)
    agree(f, x)
    agree(lambda g: torch.ops.aotfunc.resized_backward(g, 3, 18, *how), f(x))
    weights = torch.randn_like(f(x))
    back = torch.ops.aotfunc.resized_backward(weights, 3, 18, *how)
    assert_close((f(x) * weights).sum(), (x * back).sum())


def test_resizing_is_a_kernel_at_all_sizes(cache):
    """What would be called in its place multiplies matrices."""
    jit(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), backend="cpp")(
        floats(8, 9, 40, 40)
    )
    assert len(native.LOADED) == 1


def test_padded_windows():
    """Large enough for kernels: the greatest of each, NaN before all others, and its position."""
    x = floats(2, 8, 65, 67)
    special = SPECIAL[torch.randint(len(SPECIAL), x.shape)]
    for y in (x, special, torch.full_like(x, -math.inf)):
        for how in ((3, 2, 1), (3, 1, 1), (2, 2, 1), ((3, 2), (1, 2), (1, 0))):
            pool = lambda x, how=how: F.max_pool2d(x, *how, return_indices=True)
            agree(pool, y, kernels=None)
    agree(lambda x: F.avg_pool2d(x, 3, 1, 1), special, kernels=None)
    agree(lambda x: F.avg_pool2d(x, (2, 3), 1, (0, 1), divisor_override=5), x, kernels=None)

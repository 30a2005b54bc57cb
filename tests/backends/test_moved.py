"""Elements that are repeated, rolled, shuffled and joined, and norms of several steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aotfunc import grad, jit
from tests.backends.test_cpp import against_the_interpreter, agree, floats, kernels_of
from tests.kernels import every_kernel

pytestmark = pytest.mark.usefixtures("cache")


def rotations(q):
    """Quaternions as matrices: a stack of nine results."""
    w, x, y, z = q.unbind(-1)
    rows = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(rows, -1).view(*q.shape[:-1], 3, 3)


JOINED = {
    "rotations": (rotations, (33, 4)),
    "a stack": (lambda x: torch.stack([x.sin(), x * 2, x + 1, x.cos(), x, x * 3]), (5, 33)),
    "many parts": (lambda x: torch.cat([x.sin(), x * 2, x + 1, x.cos(), x], -1), (5, 33)),
    "two parts": (lambda x: torch.cat([x.sin(), x * 2], 0), (5, 33)),
    "and a part": (lambda x: (torch.cat([x.sin(), x * 2], 1), x.sin()), (5, 33)),
    "of rows": (lambda x: torch.cat([x.softmax(-1), x * 2], -1), (5, 33)),
    "of reductions": (
        lambda x: torch.stack([x.sum(1), x.amax(1), x.amin(1), x.mean(1), x.prod(1)], -1),
        (5, 33),
    ),
    "dtypes": (lambda x: torch.cat([x.sin(), x.double() * 2]), (5, 33)),
    "low precision": (lambda x: torch.cat([x.bfloat16().sin(), x.bfloat16() * 2]), (5, 33)),
    "an empty part": (lambda x: torch.cat([x[:0], x * 2]) + 1, (5, 33)),
    "a cross product": (lambda x: torch.linalg.cross(x[:, :3], x[:, 3:]), (7, 6)),
    "one number each": (lambda x: torch.stack([x, x + 1, x - 1, x * 2, x.sin()]), ()),
}


@pytest.mark.parametrize("case", JOINED)
def test_parts_are_stored_side_by_side(case):
    f, shape = JOINED[case]
    x = floats(*shape)
    agree(f, x, rtol=1e-5, atol=1e-5)
    if case != "an empty part":
        for kernel in kernels_of(f, x):
            against_the_interpreter(kernel)


def test_joins_that_are_read_again():
    for f in (
        lambda x: torch.cat([x.sin(), x * 2], -1) + 1,
        lambda x: (lambda s: (s, s.sum(0)))(torch.stack([x.sin(), x * 2])),
        lambda x: (lambda s: (s, s[1] + s[0]))(torch.stack([x.sin(), x * 2])),
        lambda x: torch.cat([x.sin(), x[:2] * 2]),
        lambda x: torch.cat([x.t().sin(), x.t() * 2], 1),
    ):
        agree(f, floats(5, 33), kernels=None)


MOVED = {
    "repeat": lambda x: x.repeat(2, 1, 1, 1, 3) * 2,
    "roll": lambda x: x.roll((1, -2), (1, 2)) * 2,
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2) * 2,
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2) * 2,
    "channel shuffle": lambda x: F.channel_shuffle(x, 2) * 2,
    "nearest": lambda x: F.interpolate(x, scale_factor=2) * 2,
    "nearest, not whole": lambda x: F.interpolate(x, size=(7, 5)) * 2,
    "nearest, one way": lambda x: F.interpolate(x, size=(4, 18)) * 2,
    "a slice anew": lambda x: torch.slice_scatter(x, x[:, :3].sin(), 1, 1, 6, 2) * 2,
    "a row anew": lambda x: torch.select_scatter(x, x[:, 0].sin(), 1, -2) * 2,
    "norms": lambda x: (F.normalize(x, dim=1), x.norm(), torch.linalg.vector_norm(x, 1, (0, 2))),
    "largest": lambda x: (torch.linalg.vector_norm(x, math.inf, 1), torch.aminmax(x, dim=2)[1]),
    "logsumexp": lambda x: (x.logsumexp(1) * 2, x.logsumexp((0, 2), True)),
    "statistics": lambda x: (*torch.std_mean(x, 1), x.nansum(1)),
    "cosine": lambda x: F.cosine_similarity(x, x + 1),
}


@pytest.mark.parametrize("case", MOVED)
def test_moved_and_reduced(case):
    """Values in several layouts, and gradients."""
    f = MOVED[case]
    x = floats(3, 8, 4, 6)
    for y in (x, x.to(memory_format=torch.channels_last), x.double()):
        agree(f, y, kernels=None, rtol=1e-5, atol=1e-5)

    def loss(x):
        found = f(x.sin())
        return sum([y.sin().sum() for y in (found if isinstance(found, tuple) else (found,))])

    got, want = jit(grad(loss), backend=every_kernel)(x), grad(loss)(x)
    assert_close(got, want)


def test_rows_of_infinities():
    x = torch.full((4, 5), -math.inf)
    x[0], x[1, 2], x[2, 1] = 1.0, math.nan, math.inf
    agree(lambda x: torch.ops.aten._safe_softmax(x, -1), x)
    agree(lambda x: x.logsumexp(1), x)


def test_a_value_keeps_the_offset_of_its_memory():
    """A row replaced in a part of a buffer is at the offset of the part, from which later views
    count."""

    def f(a, b):
        a[0] = 7
        b[..., -1:].mul_(3)
        a[:, 2:3].add_(b[:, :1])
        return a.sum() - b.sum()

    for backend in ("cpp", every_kernel):
        mine, theirs = torch.arange(24.0), torch.arange(24.0)
        for buf, g in ((mine, jit(f, backend=backend)), (theirs, f)):
            a = buf[4:].view(2, 10)
            buf[0] = g(a, a[:, 2:6])
        assert torch.equal(mine, theirs)

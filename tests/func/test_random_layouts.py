"""Random programs on arguments that lie anyhow in memory: every value as its graph says, every
transform as on dense arguments.

A program is drawn from a seed: permuted, sliced, expanded and displaced arguments, and ops of
every family, whose results the layouts decide. Tangents, cotangents and batches lie otherwise than
what they belong to. The references are autograd and loops on contiguous copies. AOTFUNC_FUZZ=N
runs N seeds."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from aotfunc import jit, jvp, make_fx, vjp, vmap
from tests.laid import laid
from tests.sweeps import seeds

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("compared")


# programs
# -------------------------------------------------------------------------------------------------


def d(x, draw):
    """One of its dimensions."""
    return draw.randrange(x.dim())


def places(n, count, draw):
    return torch.tensor([draw.randrange(n) for _ in range(count)])


def at_dim(op):
    """An op along a drawn dimension."""

    def drawn(draw, x):
        k = d(x, draw)
        return lambda x: op(x, k)

    return drawn


def image(op):
    """An op on images, or vectors of channels, that are large enough."""

    def drawn(draw, x):
        assert x.dim() == 4 and min(x.shape[2:]) > 1
        return op

    return drawn


def plainly(op):
    return lambda draw, x: op


def permuted(draw, x):
    order = draw.sample(range(x.dim()), x.dim())
    return lambda x: x.permute(order)


def narrowed(draw, x):
    k, step = d(x, draw), draw.choice((1, 2))
    cut = (slice(None),) * k + (slice(draw.randrange(2) if x.shape[k] > 1 else 0, None, step),)
    return lambda x: x[cut]


def indexed(draw, x):
    k, count = d(x, draw), draw.randrange(1, 4)
    i, two = places(x.shape[k], count, draw), draw.random() < 0.3
    if two and k + 1 < x.dim():
        j = places(x.shape[k + 1], count, draw)
        return lambda x: x[(slice(None),) * k + (i, j)]
    return draw.choice(
        (
            lambda x: x[(slice(None),) * k + (i,)],
            lambda x: x.index_select(k, i),
            lambda x: x.index_add(k, i, x.index_select(k, i).sin()),
            lambda x: x.index_fill(k, i, 0.5),
        )
    )


def gathered(draw, x):
    k = d(x, draw)
    index = torch.randint(
        x.shape[k], x.shape, generator=torch.Generator().manual_seed(draw.randrange(99))
    )
    index = laid(draw, index)
    return draw.choice(
        (
            lambda x: x.gather(k, index),
            lambda x: x.scatter_add(k, index, x.cos()),
            lambda x: torch.take_along_dim(x, index, k),
            lambda x: x.masked_fill(index > 0, 0.3),
            lambda x: torch.where(index > 0, x, x.sin()),
        )
    )


def classes(draw, x):
    target = torch.zeros(x.shape[:1] + x.shape[2:], dtype=torch.int64) + draw.randrange(x.shape[1])
    target = laid(draw, target)
    reduction = draw.choice(("none", "mean", "sum"))
    return draw.choice(
        (
            lambda x: F.cross_entropy(x, target, reduction=reduction),
            lambda x: F.nll_loss(F.log_softmax(x, 1), target, reduction=reduction),
        )
    )


def written(draw, x):
    k = d(x, draw)

    def f(x):
        y = x.clone()
        y.select(k, 0).mul_(0.5)
        y.transpose(0, -1).add_(x.transpose(0, -1).sin())
        return y

    return f


FIXED = torch.Generator().manual_seed(7)
WEIGHTS = torch.randn(4, 4, 4, 4, 4, dtype=F64, generator=FIXED) * 0.4


def convolved(draw, x):
    n = x.dim() - 2
    assert n in (1, 2) and min(x.shape[2:]) > 1
    w = laid(draw, WEIGHTS[(slice(3), slice(x.shape[1]), *[slice(2)] * n, *[0] * (3 - n))])
    conv, back = ((F.conv1d, F.conv_transpose1d), (F.conv2d, F.conv_transpose2d))[n - 1]
    pad = draw.randrange(2)
    return draw.choice((lambda x: conv(x, w, padding=pad), lambda x: back(x, w.transpose(0, 1))))


UNARY = {
    "sin": plainly(torch.sin),
    "power": plainly(lambda x: 2**x),
    "softplus": plainly(F.softplus),
    "hardswish": plainly(F.hardswish),
    "hardtanh": plainly(F.hardtanh),
    "gelu": plainly(F.gelu),
    "logit": plainly(lambda x: torch.logit(x.sigmoid() * 0.8 + 0.1)),
    "log_sigmoid": plainly(F.logsigmoid),
    "leaky": plainly(lambda x: F.leaky_relu(x, 0.2)),
    "elu": plainly(F.elu),
    "tanh": plainly(torch.tanh),
    "fraction": plainly(lambda x: x - torch.div(x, 0.7, rounding_mode="floor")),
    "clamp": plainly(lambda x: x.clamp(-0.5, 0.9)),
    "sum": at_dim(lambda x, k: x.sum(k)),
    "sum kept": at_dim(lambda x, k: x - x.mean(k, keepdim=True)),
    "amax": at_dim(lambda x, k: x.amax(k)),
    "max": at_dim(lambda x, k: x.max(k).values),
    "sort": at_dim(lambda x, k: x.sort(k).values),
    "topk": at_dim(lambda x, k: x.topk(1, k).values),
    "logsumexp": at_dim(lambda x, k: x.logsumexp(k)),
    "norm": at_dim(lambda x, k: torch.linalg.vector_norm(x, dim=k)),
    "var": at_dim(lambda x, k: x.var(k, correction=0)),
    "cumsum": at_dim(lambda x, k: x.cumsum(k)),
    "cumprod": at_dim(lambda x, k: x.cumprod(k)),
    "softmax": at_dim(lambda x, k: x.softmax(k)),
    "log_softmax": at_dim(lambda x, k: x.log_softmax(k)),
    "flip": at_dim(lambda x, k: x.flip(k)),
    "roll": at_dim(lambda x, k: x.roll(1, k)),
    "normalize": at_dim(lambda x, k: F.normalize(x, dim=k)),
    "glu": at_dim(lambda x, k: F.glu(torch.cat([x, x.sin()], k), k)),
    "split": at_dim(lambda x, k: torch.cat(list(reversed(x.split(1, k))), k)),
    "stack": at_dim(lambda x, k: torch.stack([x, x.cos()], k).sum(k)),
    "unsqueeze": at_dim(lambda x, k: x.unsqueeze(k).expand(*x.shape[:k], 2, *x.shape[k:]).prod(k)),
    "unfold": at_dim(lambda x, k: x.unfold(k, 1, 1).squeeze(-1)),
    "transpose": at_dim(lambda x, k: x.transpose(0, k)),
    "repeat": at_dim(lambda x, k: x.repeat_interleave(2, k)),
    "renorm": at_dim(lambda x, k: x.renorm(2, k, 1.0)),
    "permute": permuted,
    "slice": narrowed,
    "index": indexed,
    "gather": gathered,
    "classes": lambda draw, x: classes(draw, x) if x.dim() > 1 else 1 / 0,
    "written": written,
    "flatten": plainly(lambda x: x.reshape(-1)),
    "rows": plainly(lambda x: x.reshape(x.shape[0], -1)),
    "tril": plainly(torch.tril),
    "diagonal": plainly(lambda x: x.diagonal(dim1=-2, dim2=-1)),
    "mT": plainly(lambda x: x.mT),
    "gram": plainly(lambda x: x @ x.mT),
    "gram by columns": plainly(lambda x: x.mT @ x),
    "trace": plainly(lambda x: torch.einsum("...ij,...kj->...ik", x, x.sin())),
    "linear": plainly(
        lambda x: F.linear(x, WEIGHTS[0, 0, 0, :3, : x.shape[-1]].mT.contiguous().mT)
    ),
    "pad": plainly(lambda x: F.pad(x, (1, 0), value=0.2)),
    "layer_norm": plainly(lambda x: F.layer_norm(x, x.shape[-1:])),
    "batch_norm": plainly(lambda x: F.batch_norm(x, None, None, training=True)),
    "group_norm": plainly(lambda x: F.group_norm(x, x.shape[1])),
    "instance_norm": image(F.instance_norm),
    "convolution": convolved,
    "max_pool": image(lambda x: F.max_pool2d(x, 2, 1)),
    "avg_pool": image(lambda x: F.avg_pool2d(x, 2, 1)),
    "adaptive": image(lambda x: F.adaptive_avg_pool2d(x, (1, 2))),
    "adaptive max": image(lambda x: F.adaptive_max_pool2d(x, 1)),
    "interpolate": image(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "nearest": image(lambda x: F.interpolate(x, size=(3, 2))),
    "shuffle": image(lambda x: F.pixel_unshuffle(F.pixel_shuffle(torch.cat([x] * 4, 1), 2), 2)),
    "reflect": image(lambda x: F.pad(x, (1, 1, 1, 0), mode="reflect")),
    "contiguous": image(lambda x: x.contiguous(memory_format=torch.channels_last) * x),
    "attention": image(lambda x: F.scaled_dot_product_attention(x, x.sin(), x)),
}

BINARY = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / (1.5 + y * y),
    "atan2": lambda x, y: torch.atan2(x, y * y + 0.4),
    "maximum": torch.maximum,
    "xlogy": lambda x, y: torch.xlogy(x, y.exp()),
    "lerp": lambda x, y: torch.lerp(x, y, 0.25),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "mse": lambda x, y: F.mse_loss(x, y, reduction="none"),
    "mse mean": lambda x, y: F.mse_loss(x, y),
    "smooth_l1": lambda x, y: F.smooth_l1_loss(x, y, reduction="none"),
    "huber": lambda x, y: F.huber_loss(x, y, delta=0.5),
    "kl": lambda x, y: F.kl_div(x, y.exp(), reduction="none"),
    "bce": lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="none"),
    "bce mean": lambda x, y: F.binary_cross_entropy(x.sigmoid() * 0.8 + 0.1, y.sigmoid()),
    "cat": lambda x, y: torch.cat([x, y], -1),
    "matmul": lambda x, y: x @ y.mT,
    "outer": lambda x, y: x.unsqueeze(-1) * y.unsqueeze(-2),
    "cosine": lambda x, y: F.cosine_similarity(x + 2, y, dim=-1),
    "prelu": lambda x, y: F.prelu(x, y.reshape(-1)[:1]),
}

SHAPES = [
    (3,),
    (2, 3),
    (3, 1),
    (2, 3, 2),
    (2, 1, 3),
    (2, 3, 2, 3),
    (2, 3, 3, 2),
    (1, 2, 3, 3),
    (2, 1, 2, 2),
]


def program(seed: int):
    """``(draw, f, dense arguments, names of the steps)``."""
    draw = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    shape = draw.choice(SHAPES)
    shapes = [shape, *draw.sample([shape, shape[1:], (1, *shape[1:])], draw.randrange(3))]
    args = [torch.randn(s, dtype=F64, generator=g) for s in shapes]
    steps, names, pool = [], [], [a.clone() for a in args]
    wanted = draw.randrange(2, 7)
    for _ in range(60):
        if len(steps) == wanted:
            break
        i, j = (max(0, len(pool) - 1 - draw.randrange(3)) for _ in range(2))
        unary = draw.random() < 0.7
        name = draw.choice([*(UNARY if unary else BINARY)])
        try:
            if unary:
                op = UNARY[name](draw, pool[i])
                step = lambda pool, i=i, op=op: op(pool[i])
            else:
                step = lambda pool, i=i, j=j, op=BINARY[name]: op(pool[i], pool[j])
            out = step(pool)
        except Exception:  # this op does not take this shape
            continue
        if 0 < out.numel() < 200 and out.isfinite().all() and out.abs().max() < 20:
            steps.append(step)
            names.append(f"{name}({i})" if unary else f"{name}({i}, {j})")
            pool.append(out)

    def f(*args):
        pool = list(args)
        for step in steps:
            pool.append(step(pool))
        return pool[-1], pool[-2]

    return draw, f, args, names


# references
# -------------------------------------------------------------------------------------------------


def noise(like, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, dtype=F64, generator=g) for x in like]


def gradients(f, args, cts, create=False):
    outs = [o for o in f(*args)]
    found = torch.autograd.grad(
        outs, args, cts, create_graph=create, allow_unused=True, materialize_grads=True
    )
    return list(found)


def leaves(args):
    return [a.detach().contiguous().requires_grad_() for a in args]


def curved(f, args, cts, tangents):
    """The gradient of <cts, J tangents>, by the arguments and by the cotangents (which is J
    tangents)."""
    args, cts = leaves(args), leaves(cts)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        product = sum(
            (g * t).sum() for g, t in zip(gradients(f, args, cts, create=True), tangents)
        )
    found = torch.autograd.grad(product, [*args, *cts], allow_unused=True, materialize_grads=True)
    return list(found[: len(args)]), list(found[len(args) :])


def inner(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def close(got, want, what):
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(g, w, **CLOSE, msg=lambda m, k=k: f"{what}, the {k}-th: {m}")


def steps_of(x):
    return [(n, s) for n, s in zip(x.shape, x.stride()) if n > 1]


def differs(seed: int) -> None:
    draw, f, dense, names = program(seed)
    args = [laid(draw, a) for a in dense]
    if draw.random() < 0.3:
        args[0] = laid(draw, dense[0], expanded=True)
        dense[0] = args[0].contiguous()
        want = f(*dense)
        if not all(o.isfinite().all() and o.abs().max() < 50 for o in want):
            return
    want = f(*dense)
    close(make_fx(f)(*args)(*args), want, "value")
    outs, eager = jit(f)(*args), f(*args)
    close(outs, want, "compiled value")
    # what was written has eager's order of dimensions in memory, and not its strides of those of
    # size 1
    for o, e in (
        zip(outs, eager, strict=True) if not any("written" in name for name in names) else ()
    ):
        assert steps_of(o) == steps_of(e), f"laid out as {steps_of(o)}, eager as {steps_of(e)}"
    cts, tangents = noise(want, 1), noise(dense, 2)
    grads = gradients(f, leaves(dense), cts)
    second, moved = curved(f, dense, cts, tangents)
    if not all(t.isfinite().all() for t in (*grads, *second, *moved)):
        return
    there = lambda ts: tuple([laid(draw, t) for t in ts])

    # reverse and forward
    close(vjp(f, *args)[1](there(cts)), grads, "gradient")
    close(
        jit(lambda args, cts: vjp(f, *args)[1](cts))(tuple(args), there(cts)),
        grads,
        "gradient in a compiled function",
    )
    own = [laid(draw, a).requires_grad_() for a in dense]
    close(gradients(jit(f), own, there(cts)), grads, "gradient of a compiled function")
    close(jvp(f, tuple(args), there(tangents))[1], moved, "tangent")
    pushed = lambda args, tangents: jvp(f, tuple(args), tuple(tangents))[1]
    close(jit(pushed)(tuple(args), there(tangents)), moved, "tangent in a compiled function")

    # pairs
    back = lambda args, tangents, cts: vjp(lambda *a: pushed(a, tangents), *args)[1](cts)
    close(back(args, there(tangents), there(cts)), second, "gradient of the tangent")
    twice = jvp(lambda *a: pushed(a, there(tangents)), tuple(args), there(noise(dense, 3)))[1]
    close([inner(cts, twice)], [inner(second, noise(dense, 3))], "tangent of the tangent")
    again = [laid(draw, a).requires_grad_() for a in dense]
    found = gradients(jit(f), again, there(cts), create=True)
    product = inner(found, tangents)
    if product.requires_grad:
        product = torch.autograd.grad(product, again, allow_unused=True, materialize_grads=True)
        close(product, second, "second derivative of a compiled function")

    # batches
    dims = tuple(draw.randrange(a.dim() + 1) for a in dense)
    batches = [torch.stack([a, a * 0.5, a.sin()], k) for a, k in zip(dense, dims)]
    rows = [[b.select(k, i) for b, k in zip(batches, dims)] for i in range(3)]
    each = [f(*row) for row in rows]
    wanted = [curved(f, row, cts, tangents)[0] for row in rows]
    if not all(t.isfinite().all() for row in (*each, *wanted) for t in row):
        return
    out_dims = tuple(draw.randrange(o.dim() + 1) for o in want)
    stacked = [torch.stack(list(o), k) for o, k in zip(zip(*each), out_dims)]
    got = vmap(f, in_dims=dims, out_dims=out_dims)(*there(batches))
    close(got, stacked, "batch")
    close(
        jit(vmap(f, in_dims=dims, out_dims=out_dims))(*there(batches)),
        stacked,
        "batch in a compiled function",
    )
    pull = lambda args, cts: vjp(f, *args)[1](cts)
    mapped = vmap(pull, in_dims=(dims, None))(there(batches), there(cts))
    close(
        mapped,
        [torch.stack(g) for g in zip(*[gradients(f, leaves(row), cts) for row in rows])],
        "batched gradient",
    )
    mapped = vmap(back, in_dims=(dims, None, None))(there(batches), there(tangents), there(cts))
    close(mapped, [torch.stack(g) for g in zip(*wanted)], "batched gradient of the tangent")


@pytest.mark.limit(60)
@pytest.mark.parametrize("seed", seeds(25))
def test_random_program(seed):
    differs(seed)

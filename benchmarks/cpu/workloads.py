"""What the CPU benchmark runs: which function in which transforms, on which arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu import ghost, in_torch, programs
from benchmarks.graph_programs import mlp_loss, potential
from benchmarks.programs import conv_net, transformer


@dataclass(frozen=True)
class Workload:
    """``program(T, f)`` is what is measured; a training step differentiates ``f`` with respect to
    its first ``wrt`` arguments, and its program gets the cotangent before these."""

    group: str
    function: str  # the key of f in JAX's functions
    f: Callable
    program: Callable[[Any, Callable], Callable]
    args: Callable[[], tuple]
    wrt: int = 0
    by_hand: Callable | None = None  # the same in plain PyTorch, where that is one line
    ghost: Callable | None = None  # DP-SGD without per-sample gradients, by hand
    cold: bool = True  # whether first calls are measured, too: at one size of each


r = torch.randn


def weight(*shape: int) -> Tensor:
    return r(shape) / math.sqrt(shape[-2])


def grid(n: int) -> Tensor:
    """n³ particles near the points of a lattice."""
    return 1.2 * torch.cartesian_prod(*[torch.arange(float(n))] * 3) + 0.05 * r(n**3, 3)


def training_step(
    group: str, f: Callable, wrt: int, args: Callable[[], tuple], **more
) -> Workload:
    """The cotangent is drawn after the arguments."""

    def with_cotangent() -> tuple:
        plain = args()
        return r(f(*plain).shape), *plain

    name = more.pop("function", f.__name__)
    return Workload(group, name, f, programs.step(wrt), with_cotangent, wrt, **more)


def pointwise(quick: bool) -> Iterator[tuple[str, Workload]]:
    group = "Fused pointwise chains"
    functions = {
        "bias + gelu(tanh)": in_torch.bias_gelu_tanh,
        "bias + gelu(erf)": in_torch.bias_gelu,
        "bias + tanh": in_torch.bias_tanh,
        "14 ops": in_torch.chain,
    }
    sizes = {"1k": 1} if quick else {"1k": 1, "1M": 1024, "10M": 10240}
    for size, rows in sizes.items():
        for label, f in functions.items():
            second = (rows, 1024) if f is in_torch.chain else (1024,)
            args = lambda rows=rows, second=second: (r(rows, 1024), r(second))
            cold = quick or size == "1M"
            yield (
                f"{label}, {size}",
                Workload(group, f.__name__, f, programs.itself, args, cold=cold),
            )
            yield f"{label}, {size}, step", training_step(group, f, 2, args, cold=cold)


def rows(quick: bool) -> Iterator[tuple[str, Workload]]:
    group = "Norms and softmax, forward and backward"
    vector = lambda: 1 + 0.1 * r(1024)
    for size, n in ({"1k": 1} if quick else {"1M": 1024, "10M": 10240}).items():
        x = lambda n=n: r(n, 1024)
        target = lambda n=n: torch.randint(1024, (n,))
        each = {
            "residual + layer_norm": (in_torch.residual_layer_norm, 4, (x, x, vector, vector)),
            "layer_norm": (in_torch.layer_norm, 3, (x, vector, vector)),
            "rms_norm": (in_torch.rms_norm, 2, (x, vector)),
            "softmax": (in_torch.softmax, 1, (x,)),
            "log_softmax + nll": (in_torch.log_softmax_nll, 1, (x, target)),
        }
        for label, (f, wrt, makers) in each.items():
            args = lambda makers=makers: tuple(make() for make in makers)
            yield f"{label}, {size}", training_step(group, f, wrt, args, cold=size != "10M")


def per_sample_gradients(quick: bool) -> Iterator[tuple[str, Workload]]:
    group = "Per-sample gradients and DP-SGD"
    batch, inside, width = (4, 16, 8) if quick else (64, 784, 512)
    conv_batch, channels, image = (2, 2, 8) if quick else (32, 8, 28)
    loss, params = conv_net(channels, image)

    def mlp_args():
        p = {"w1": weight(inside, width), "b1": r(width), "w2": weight(width, 10), "b2": r(10)}
        return p, r(batch, inside), torch.randint(10, (batch,))

    def conv_args():
        return params, r(conv_batch, 1, image, image), torch.randint(10, (conv_batch,))

    for label, program in {
        "gradients": programs.per_sample,
        "DP-SGD": programs.clipped_sum,
    }.items():
        yield (
            f"{label}, MLP {inside}-{width}-10, batch {batch}",
            Workload(group, "classifier", in_torch.classifier, program, mlp_args),
        )
        yield (
            f"{label}, conv net {image}×{image}, batch {conv_batch}",
            Workload(group, "conv_net", loss, program, conv_args),
        )


def clipped_sums(quick: bool) -> Iterator[tuple[str, Workload]]:
    """What need not be as large as batch × parameters."""
    group = "DP-SGD of larger networks"
    by_hand = {
        "classifier": ghost.clipped_sum(ghost.classifier),
        "conv_net": ghost.clipped_sum(ghost.conv_net),
        "encoder_block": ghost.clipped_sum(ghost.encoder_block),
    }
    batch, inside, hidden = (4, 16, 8) if quick else (256, 784, 1024)
    channels, image, images = (2, 8, 2) if quick else (64, 16, 64)
    width, length, sequences = (16, 4, 2) if quick else (256, 64, 16)

    def mlp_args():
        p = {"w1": weight(inside, hidden), "b1": r(hidden), "w2": weight(hidden, 10), "b2": r(10)}
        return p, r(batch, inside), torch.randint(10, (batch,))

    loss, params = conv_net(channels, image)

    def conv_args():
        return params, r(images, 1, image, image), torch.randint(10, (images,))

    def block_args():
        shapes = {"qkv": (3, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}
        p = {k: weight(m * width, n * width) for k, (m, n) in shapes.items()}
        p |= {k: 1 + 0.1 * r(width) for k in ("g1", "g2")}
        p |= {k: 0.1 * r(width) for k in ("b1", "b2")}
        return p, r(sequences, length, width), r(sequences, length, width)

    for label, function, f, args in (
        (f"MLP {inside}-{hidden}-10, batch {batch}", "classifier", in_torch.classifier, mlp_args),
        (
            f"conv net {image}×{image}, {channels} channels, batch {images}",
            "conv_net",
            loss,
            conv_args,
        ),
        (
            f"transformer block, {sequences}×{length}×{width}",
            *("encoder_block", in_torch.encoder_block, block_args),
        ),
    ):
        work = Workload(group, function, f, programs.clipped_sum, args, ghost=by_hand[function])
        yield f"DP-SGD, {label}", work


def nested(quick: bool) -> Iterator[tuple[str, Workload]]:
    group = "Ensembles, and transforms of transforms"
    members, width = (2, 8) if quick else (8, 128)
    tasks = 2 if quick else 25

    def members_args():
        p = [weight(members, 64, width), r(members, width), weight(members, width, 10)]
        return [*p, r(members, 10)], r(64, 64), r(64, 10)

    def task_args():
        p = [3 * r(1, 40), r(40), weight(40, 40), r(40), weight(40, 1), r(1)]
        return p, *[r(tasks, 10, 1) for _ in range(4)]

    def net_args(n, hidden, out):
        return lambda: (r(n), weight(n, hidden), weight(hidden, out))

    yield (
        f"ensemble of {members} MLPs",
        Workload(group, "mlp_loss", mlp_loss, programs.ensemble, members_args),
    )
    yield (
        f"MAML, {tasks} tasks of sinusoids",
        Workload(group, "sinusoid_loss", in_torch.sinusoid_loss, programs.maml, task_args),
    )
    for n in [8] if quick else [64, 256]:
        args = net_args(n, 64, 16)
        yield (
            f"Hessian, {n} inputs",
            Workload(group, "scalar_net", in_torch.scalar_net, programs.hessian, args),
        )
    n = 16 if quick else 512
    for program in (programs.jacrev, programs.jacfwd):
        yield (
            f"{program.__name__}, {n}→{n}",
            Workload(group, "vector_net", in_torch.vector_net, program, net_args(n, n, n)),
        )
    side = 2 if quick else 5
    yield (
        f"Lennard-Jones forces, {side**3} particles",
        Workload(group, "potential", potential, programs.grad, lambda: (grid(side),)),
    )
    yield (
        f"Lennard-Jones Hessian-vector product, {side**3} particles",
        Workload(
            group,
            "potential",
            potential,
            programs.hessian_vector_product,
            lambda: (grid(side), r(side**3, 3)),
        ),
    )
    a, b = (2, 2) if quick else (20, 8)

    def cnn_args():
        p = {"k": r(8, 1, 3, 3) / 3, "kb": r(8), "w": weight(512, 3), "b": r(3)}
        return p, r(a, 8, 8), r(b, 8, 8)

    yield (
        f"tangent kernel of a CNN, {a}×{b}",
        Workload(group, "small_cnn", in_torch.small_cnn, programs.tangent_kernel, cnn_args),
    )


#: of the transformer block, in full and for a quick run; JAX's function needs it, too
BLOCK = {
    False: {"layers": 1, "width": 256, "heads": 4, "length": 128, "batch": 4},
    True: {"layers": 1, "width": 16, "heads": 2, "length": 4, "batch": 2},
}


def blocks(quick: bool) -> Iterator[tuple[str, Workload]]:
    group = "Blocks of networks, forward and backward"
    f, args = transformer(**BLOCK[quick])
    shape = "×".join(str(BLOCK[quick][k]) for k in ("batch", "length", "width"))
    yield (
        f"transformer block, {shape}",
        training_step(group, f, 2, lambda: args, function="transformer"),
    )
    batch, c, image = (2, 4, 4) if quick else (4, 64, 28)

    def block_args():
        kernel = lambda: r(c, c, 3, 3) / math.sqrt(9 * c)
        norm = lambda: (1 + 0.1 * r(c), 0.1 * r(c))
        return r(batch, c, image, image), kernel(), *norm(), kernel(), *norm()

    yield (
        f"ResNet block, {batch}×{c}×{image}×{image}",
        training_step(group, in_torch.resnet_block, 7, block_args),
    )


def tiny(quick: bool) -> Iterator[tuple[str, Workload]]:
    group = "Tiny functions"
    yield (
        "grad(sin) of a scalar",
        Workload(group, "sin", torch.sin, programs.grad, lambda: (r(()),)),
    )
    yield (
        "vmap(dot), 8×5",
        Workload(
            group,
            "dot",
            torch.dot,
            programs.vmap,
            lambda: (r(8, 5), r(8, 5)),
            by_hand=lambda a, b: (a * b).sum(-1),
        ),
    )
    vectors = lambda: {f"w{i}": r(100) for i in range(50)}
    yield (
        "SGD update, dict of 50 vectors",
        Workload(group, "sgd", in_torch.sgd, programs.itself, lambda: (vectors(), vectors())),
    )
    yield (
        "tanh(x * w).sum(), 8, step",
        training_step(group, in_torch.scaled_tanh, 2, lambda: (r(8), r(8))),
    )


def workloads(quick: bool) -> dict[str, Workload]:
    """Name -> workload, in the order of the tables."""
    torch.manual_seed(0)
    makers = (pointwise, rows, per_sample_gradients, clipped_sums, nested, blocks, tiny)
    return {name: w for make in makers for name, w in make(quick)}

"""The functions that the benchmarks measure, in PyTorch: a builder returns (loss function,
arguments)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

Program = tuple[Callable[..., torch.Tensor], tuple]


def chain(ops: int, size: int = 32) -> Program:
    """``ops`` pointwise steps of two ops each, then a sum; differentiated with respect to its one
    input."""

    def f(x):
        for _ in range(ops // 2):
            x = torch.sin(x) * 1.01
            x = torch.tanh(x) + 0.5
        return x.sum()

    return f, (torch.linspace(0.1, 1.0, size),)


def transformer(
    layers: int = 12, width: int = 32, heads: int = 4, length: int = 16, batch: int = 2
) -> Program:
    """A pre-norm encoder written out, with respect to all its weights."""
    torch.manual_seed(0)
    w = lambda *shape: torch.randn(*shape) / math.sqrt(shape[-1])
    params = [
        {
            "qkv": w(3 * width, width),
            "out": w(width, width),
            "up": w(4 * width, width),
            "down": w(width, 4 * width),
            "g1": torch.ones(width),
            "b1": torch.zeros(width),
            "g2": torch.ones(width),
            "b2": torch.zeros(width),
        }
        for _ in range(layers)
    ]

    def f(params, x):
        for p in params:
            h = F.layer_norm(x, (width,), p["g1"], p["b1"])
            q, k, v = (
                F.linear(h, p["qkv"])
                .view(batch, length, 3, heads, -1)
                .permute(2, 0, 3, 1, 4)
                .unbind(0)
            )
            scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // heads), -1)
            x = x + F.linear((scores @ v).transpose(1, 2).reshape(batch, length, width), p["out"])
            h = F.layer_norm(x, (width,), p["g2"], p["b2"])
            x = x + F.linear(F.gelu(F.linear(h, p["up"])), p["down"])
        return x.square().mean()

    return f, (params, torch.randn(batch, length, width))


class Bottleneck(nn.Module):
    def __init__(
        self, inside: int, width: int, outside: int, stride: int, statistics: bool
    ) -> None:
        super().__init__()
        norm = lambda n: nn.BatchNorm2d(n, track_running_stats=statistics)
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False),
            norm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            norm(width),
            nn.ReLU(),
            nn.Conv2d(width, outside, 1, bias=False),
            norm(outside),
        )
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.short = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside)
            )

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x))


def resnet(
    depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 4, batch: int = 2, image: int = 32
) -> Program:
    """ResNet-50's stack of bottlenecks at a small width, with respect to all its weights."""
    net = resnet_module(depths, width)
    params = {k: v.detach() for k, v in net.named_parameters()}
    f = lambda p, x, t: F.cross_entropy(functional_call(net, p, (x,)), t)
    return f, (params, torch.randn(batch, 3, image, image), torch.arange(batch) % 10)


def resnet_module(
    depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 4, statistics: bool = False
) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width, track_running_stats=statistics),
    ]
    layers += [nn.ReLU(), nn.MaxPool2d(2)]
    inside = width
    for stage, depth in enumerate(depths):
        for i in range(depth):
            outside = 4 * width * 2**stage
            layers.append(
                Bottleneck(
                    inside, width * 2**stage, outside, 2 if i == 0 and stage else 1, statistics
                )
            )
            inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def conv_net(
    width: int, image: int, classes: int = 10
) -> tuple[Callable, dict[str, torch.Tensor]]:
    """A small convolutional net as a loss of (parameters, one image, one target), for per-sample
    gradients."""
    torch.manual_seed(0)
    side = (image // 2 - 2) // 2
    net = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, classes),
    )
    params = {k: v.detach() for k, v in net.named_parameters()}

    def loss(params, x, t):
        return F.cross_entropy(functional_call(net, params, (x[None],)), t[None])

    return loss, params


CAPTURED: dict[str, Callable[[], Program]] = {
    "chain_100": lambda: chain(100),
    "chain_300": lambda: chain(300),
    "chain_1000": lambda: chain(1000),
    "transformer_12": transformer,
    "resnet_50_like": resnet,
}

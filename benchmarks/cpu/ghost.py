"""DP-SGD as one writes it by hand: the norms of per-sample gradients from what goes into each
layer and what comes back to it ("ghost clipping"), one backward pass for norms and sums.

A forward function returns the samples' losses and its layers, each with its parameters' names,
what it read and what it returned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Linear:
    """``out = read @ w + b``; with ``turned`` the weight is (out, in)."""

    weight: str
    bias: str | None
    read: Tensor
    out: Tensor
    turned: bool = False

    def squares(self, g: Tensor) -> Tensor:
        a, g = as_sequence(self.read), as_sequence(g)
        squares = g.sum(1).square().sum(1) if self.bias else 0
        length, i, o = a.shape[1], a.shape[2], g.shape[2]
        if length * (i + o) < i * o:
            return squares + ((a @ a.mT) * (g @ g.mT)).sum((1, 2))
        return squares + (a.mT @ g).square().sum((1, 2))

    def sums(self, g: Tensor, scale: Tensor) -> dict[str, Tensor]:
        a, g = as_sequence(self.read), as_sequence(g) * scale[:, None, None]
        w = a.flatten(0, 1).t() @ g.flatten(0, 1)
        sums = {self.weight: w.t() if self.turned else w}
        return sums | ({self.bias: g.sum((0, 1))} if self.bias else {})


@dataclass
class Convolution:
    weight: str
    bias: str
    read: Tensor
    out: Tensor
    kernel: Tensor
    padding: int

    def squares(self, g: Tensor) -> Tensor:
        windows = F.unfold(self.read, self.kernel.shape[2:], padding=self.padding)
        flat = g.flatten(2)
        inside, outs, places = windows.shape[1], flat.shape[1], flat.shape[2]
        bias = flat.sum(2).square().sum(1)
        if places * (inside + outs) < inside * outs:
            return bias + ((windows.mT @ windows) * (flat.mT @ flat)).sum((1, 2))
        return bias + (flat @ windows.mT).square().sum((1, 2))

    def sums(self, g: Tensor, scale: Tensor) -> dict[str, Tensor]:
        g = g * scale[:, None, None, None]
        shape, padding = self.kernel.shape, self.padding
        w = torch.nn.grad.conv2d_weight(self.read, shape, g, padding=padding)
        return {self.weight: w, self.bias: g.sum((0, 2, 3))}


@dataclass
class Norm:
    weight: str
    bias: str
    read: Tensor
    out: Tensor

    def gradients(self, g: Tensor) -> tuple[Tensor, Tensor]:
        return (g * F.layer_norm(self.read, self.read.shape[-1:])).sum(1), g.sum(1)

    def squares(self, g: Tensor) -> Tensor:
        scale, shift = self.gradients(g)
        return scale.square().sum(1) + shift.square().sum(1)

    def sums(self, g: Tensor, scale: Tensor) -> dict[str, Tensor]:
        weight, bias = self.gradients(g)
        return {self.weight: scale @ weight, self.bias: scale @ bias}


def as_sequence(x: Tensor) -> Tensor:
    return x[:, None] if x.dim() == 2 else x


def clipped_sum(forward: Callable) -> Callable:
    def run(params: dict[str, Tensor], x: Tensor, t: Tensor) -> dict[str, Tensor]:
        losses, layers = forward(params, x, t)
        gs = torch.autograd.grad(losses.sum(), [layer.out for layer in layers])
        with torch.no_grad():
            pairs = list(zip(layers, gs))
            norms = sum(layer.squares(g) for layer, g in pairs) ** 0.5
            scale = (1 / norms).clip(None, 1.0)
            sums: dict[str, Tensor] = {}
            for layer, g in pairs:
                sums |= layer.sums(g, scale)
        return {k: sums[k] for k in params}

    return run


class Layers(list):
    """The layers that ran, each made by one call."""

    def add(self, kind: type, names: tuple, read: Tensor, out: Tensor, *more: Any) -> Tensor:
        out = out if out.requires_grad else out.requires_grad_()
        self.append(kind(*names, read.detach(), out, *more))
        return out


def classifier(p, x, t):
    layers = Layers()
    h = layers.add(Linear, ("w1", "b1"), x, x @ p["w1"] + p["b1"]).relu()
    out = layers.add(Linear, ("w2", "b2"), h, h @ p["w2"] + p["b2"])
    return F.cross_entropy(out, t, reduction="none"), layers


def conv_net(p, x, t):
    layers = Layers()

    def conv(name, x, padding):
        w, b = f"{name}.weight", f"{name}.bias"
        out = F.conv2d(x, p[w], p[b], padding=padding)
        return layers.add(Convolution, (w, b), x, out, p[w], padding)

    h = F.max_pool2d(conv("0", x, 1).relu(), 2)
    h = F.max_pool2d(conv("3", h, 0).relu(), 2).flatten(1)
    out = layers.add(
        Linear, ("7.weight", "7.bias"), h, F.linear(h, p["7.weight"], p["7.bias"]), True
    )
    return F.cross_entropy(out, t, reduction="none"), layers


def encoder_block(p, x, t, heads=4):
    layers = Layers()
    batch, length, width = x.shape
    linear = lambda name, x: layers.add(Linear, (name, None), x, F.linear(x, p[name]), True)
    norm = lambda g, b, x: layers.add(Norm, (g, b), x, F.layer_norm(x, (width,), p[g], p[b]))
    h = linear("qkv", norm("g1", "b1", x))
    q, k, v = h.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scores = torch.softmax(q @ k.mT / math.sqrt(width // heads), -1)
    x = x + linear("out", (scores @ v).transpose(1, 2).reshape(batch, length, width))
    x = x + linear("down", F.gelu(linear("up", norm("g2", "b2", x))))
    return (x - t).square().mean((1, 2)), layers

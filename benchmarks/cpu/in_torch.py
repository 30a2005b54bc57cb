"""The functions of the workloads, in PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def bias_gelu_tanh(x, b):
    return F.gelu(x + b, approximate="tanh")


def bias_gelu(x, b):
    return F.gelu(x + b)


def bias_tanh(x, b):
    return torch.tanh(x + b)


def chain(x, y):
    """Fourteen ops."""
    t = torch.sin(x) * y
    u = torch.tanh(t + x)
    v = torch.exp(-u * u)
    w = torch.sigmoid(v - y)
    return torch.relu(w * x + torch.cos(t) * 0.5)


def residual_layer_norm(x, r, w, b):
    return F.layer_norm(x + r, x.shape[-1:], w, b)


def layer_norm(x, w, b):
    return F.layer_norm(x, x.shape[-1:], w, b)


def rms_norm(x, w):
    return F.rms_norm(x, x.shape[-1:], w, 1e-6)


def softmax(x):
    return torch.softmax(x, -1)


def log_softmax_nll(x, t):
    return F.nll_loss(F.log_softmax(x, -1), t)


def classifier(p, x, t):
    logits = torch.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return F.cross_entropy(logits[None], t[None])


def encoder_block(p, x, t, heads=4):
    """The loss of one sequence."""
    length, width = x.shape
    h = F.layer_norm(x, (width,), p["g1"], p["b1"])
    q, k, v = F.linear(h, p["qkv"]).view(length, 3, heads, -1).permute(1, 2, 0, 3).unbind(0)
    scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // heads), -1)
    x = x + F.linear((scores @ v).transpose(0, 1).reshape(length, width), p["out"])
    h = F.layer_norm(x, (width,), p["g2"], p["b2"])
    x = x + F.linear(F.gelu(F.linear(h, p["up"])), p["down"])
    return (x - t).square().mean()


def sinusoid_loss(p, x, y):
    h = torch.relu(torch.relu(x @ p[0] + p[1]) @ p[2] + p[3])
    return (h @ p[4] + p[5] - y).square().mean()


def scalar_net(x, w1, w2):
    return (torch.tanh(x @ w1) @ w2).square().sum()


def vector_net(x, w1, w2):
    return torch.tanh(x @ w1) @ w2


def small_cnn(p, x):
    h = F.conv2d(x[None, None], p["k"], p["kb"], padding=1).relu()
    return h.flatten() @ p["w"] + p["b"]


def resnet_block(x, w1, g1, b1, w2, g2, b2):
    h = F.conv2d(x, w1, padding=1)
    h = F.relu(F.batch_norm(h, None, None, g1, b1, training=True))
    h = F.conv2d(h, w2, padding=1)
    return F.relu(F.batch_norm(h, None, None, g2, b2, training=True) + x)


def sgd(params, grads):
    return {k: p - 0.1 * grads[k] for k, p in params.items()}


def scaled_tanh(x, w):
    return torch.tanh(x * w).sum()

"""The functions of the workloads once more, in JAX, under the same names."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cpu.in_torch import sgd
from benchmarks.cpu.workloads import BLOCK
from benchmarks.jax_programs import batch_norm, conv, layer_norm, transformer


def chain(x, y):
    t = jnp.sin(x) * y
    u = jnp.tanh(t + x)
    v = jnp.exp(-u * u)
    w = jax.nn.sigmoid(v - y)
    return jax.nn.relu(w * x + jnp.cos(t) * 0.5)


def rms_norm(x, w):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w


def cross_entropy(logits, t):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, -1), t[:, None], 1).mean()


def classifier(p, x, t):
    logits = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return cross_entropy(logits[None], t[None])


def max_pool(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def conv_net(p, x, t):
    h = conv(x[None], p["0.weight"]) + p["0.bias"][:, None, None]
    h = max_pool(jax.nn.relu(h))
    h = jax.lax.conv_general_dilated(
        h, p["3.weight"], (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    h = max_pool(jax.nn.relu(h + p["3.bias"][:, None, None])).reshape(1, -1)
    return cross_entropy(h @ p["7.weight"].T + p["7.bias"], t[None])


def encoder_block(p, x, t, heads=4):
    length, width = x.shape
    h = layer_norm(x, p["g1"], p["b1"])
    q, k, v = (h @ p["qkv"].T).reshape(length, 3, heads, -1).transpose(1, 2, 0, 3)
    scores = jax.nn.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(width // heads), -1)
    x = x + (scores @ v).swapaxes(0, 1).reshape(length, width) @ p["out"].T
    h = layer_norm(x, p["g2"], p["b2"])
    x = x + jax.nn.gelu(h @ p["up"].T, approximate=False) @ p["down"].T
    return ((x - t) ** 2).mean()


def mlp_loss(p, x, y):
    return ((jnp.tanh(jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[3]) - y) ** 2).mean()


def sinusoid_loss(p, x, y):
    h = jax.nn.relu(jax.nn.relu(x @ p[0] + p[1]) @ p[2] + p[3])
    return ((h @ p[4] + p[5] - y) ** 2).mean()


def potential(x):
    i, j = np.triu_indices(len(x), 1)
    d2 = ((x[i] - x[j]) ** 2).sum(-1)
    s6 = d2**-3
    return 4 * (s6 * s6 - s6).sum()


def small_cnn(p, x):
    h = jax.nn.relu(conv(x[None, None], p["k"]) + p["kb"][:, None, None])
    return h.reshape(-1) @ p["w"] + p["b"]


def resnet_block(x, w1, g1, b1, w2, g2, b2):
    h = jax.nn.relu(batch_norm(conv(x, w1), g1, b1))
    return jax.nn.relu(batch_norm(conv(h, w2), g2, b2) + x)


def functions(quick: bool) -> dict[str, Callable]:
    return {
        "bias_gelu_tanh": lambda x, b: jax.nn.gelu(x + b, approximate=True),
        "bias_gelu": lambda x, b: jax.nn.gelu(x + b, approximate=False),
        "bias_tanh": lambda x, b: jnp.tanh(x + b),
        "chain": chain,
        "residual_layer_norm": lambda x, r, w, b: layer_norm(x + r, w, b),
        "layer_norm": layer_norm,
        "rms_norm": rms_norm,
        "softmax": lambda x: jax.nn.softmax(x, -1),
        "log_softmax_nll": cross_entropy,
        "classifier": classifier,
        "conv_net": conv_net,
        "encoder_block": encoder_block,
        "mlp_loss": mlp_loss,
        "sinusoid_loss": sinusoid_loss,
        "scalar_net": lambda x, w1, w2: ((jnp.tanh(x @ w1) @ w2) ** 2).sum(),
        "vector_net": lambda x, w1, w2: jnp.tanh(x @ w1) @ w2,
        "potential": potential,
        "small_cnn": small_cnn,
        "transformer": transformer(**BLOCK[quick])[0],
        "resnet_block": resnet_block,
        "sin": jnp.sin,
        "dot": jnp.dot,
        "sgd": sgd,
        "scaled_tanh": lambda x, w: jnp.tanh(x * w).sum(),
    }

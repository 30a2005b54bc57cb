"""The capture benchmark's programs once more, in JAX: name -> a builder of (loss function,
arguments)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)


def weight(*shape):
    return jnp.asarray(rng.standard_normal(shape) / math.sqrt(shape[-1]), jnp.float32)


def chain(ops, size=32):
    def f(x):
        for _ in range(ops // 2):
            x = jnp.sin(x) * 1.01
            x = jnp.tanh(x) + 0.5
        return x.sum()

    return f, (jnp.linspace(0.1, 1.0, size),)


def layer_norm(x, g, b):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * g + b


def transformer(layers=12, width=32, heads=4, length=16, batch=2):
    one, zero = jnp.ones(width), jnp.zeros(width)
    params = [
        {
            "qkv": weight(3 * width, width),
            "out": weight(width, width),
            "up": weight(4 * width, width),
            "down": weight(width, 4 * width),
            "g1": one,
            "b1": zero,
            "g2": one,
            "b2": zero,
        }
        for _ in range(layers)
    ]

    def f(params, x):
        for p in params:
            h = layer_norm(x, p["g1"], p["b1"])
            q, k, v = (
                (h @ p["qkv"].T).reshape(batch, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
            )
            scores = jax.nn.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(width // heads), -1)
            x = x + (scores @ v).swapaxes(1, 2).reshape(batch, length, width) @ p["out"].T
            h = layer_norm(x, p["g2"], p["b2"])
            x = x + jax.nn.gelu(h @ p["up"].T, approximate=False) @ p["down"].T
        return (x * x).mean()

    return f, (params, weight(batch, length, width))


def conv(x, w, stride=1):
    pad = (w.shape[-1] - 1) // 2
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


def batch_norm(x, g, b):
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * g[:, None, None] + b[:, None, None]


def resnet(depths=(3, 4, 6, 3), width=4, batch=2, image=32):
    norm = lambda n: (jnp.ones(n), jnp.zeros(n))
    params = {"stem": weight(width, 3, 3, 3), "stem_norm": norm(width), "blocks": []}
    strides, inside = [], width
    for stage, depth in enumerate(depths):
        for i in range(depth):
            w, outside, stride = (
                width * 2**stage,
                4 * width * 2**stage,
                2 if i == 0 and stage else 1,
            )
            block = {
                "w": [weight(w, inside, 1, 1), weight(w, w, 3, 3), weight(outside, w, 1, 1)],
                "n": [norm(w), norm(w), norm(outside)],
            }
            if stride != 1 or inside != outside:
                block["short"] = (weight(outside, inside, 1, 1), norm(outside))
            params["blocks"].append(block)
            strides.append(stride)
            inside = outside
    params["head"] = (weight(10, inside), jnp.zeros(10))
    target = jnp.arange(batch) % 10

    def f(params, x):
        x = jax.nn.relu(batch_norm(conv(x, params["stem"]), *params["stem_norm"]))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        for p, stride in zip(params["blocks"], strides):
            y = jax.nn.relu(batch_norm(conv(x, p["w"][0]), *p["n"][0]))
            y = jax.nn.relu(batch_norm(conv(y, p["w"][1], stride), *p["n"][1]))
            y = batch_norm(conv(y, p["w"][2]), *p["n"][2])
            short = (
                batch_norm(conv(x, p["short"][0], stride), *p["short"][1]) if "short" in p else x
            )
            x = jax.nn.relu(y + short)
        logits = x.mean((2, 3)) @ params["head"][0].T + params["head"][1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1).mean()

    return f, (params, weight(batch, 3, image, image))


CAPTURED = {
    "chain_100": lambda: chain(100),
    "chain_300": lambda: chain(300),
    "chain_1000": lambda: chain(1000),
    "transformer_12": transformer,
    "resnet_50_like": resnet,
}


def capture(f, args):
    """One capture of the gradient, nothing cached from the one before."""
    jax.clear_caches()
    return jax.make_jaxpr(jax.grad(f))(*args)

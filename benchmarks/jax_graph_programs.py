"""The programs of graph_programs.py once more, in JAX: name -> transformed function, for the same
arguments."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

# ----- functions of one tensor -------------------------------------------------------------------


def rational(x):
    return jnp.sin(x) * jnp.exp(x) / (1 + x * x)


def nth(n):
    f = rational
    for _ in range(n):
        f = jax.grad(f)
    return f


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * (x.var(-1, keepdims=True) + 1e-5) ** -0.5


def waves(x):
    return jnp.sin(layer_norm(x)).sum()


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def potential(x):
    i, j = jnp.triu_indices(len(x), 1)  # of static sizes: constants of the jaxpr
    s6 = ((x[i] - x[j]) ** 2).sum(-1) ** -3
    return 4 * (s6 * s6 - s6).sum()


# ----- networks ----------------------------------------------------------------------------------


def mlp(p, x):
    return jnp.tanh(jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[3])


def mlp_loss(p, x, y):
    return ((mlp(p, x) - y) ** 2).mean()


def linear(x, w, b):
    return x @ w.T + b


def cross_entropy(logits, t):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, -1), t[..., None], -1).mean()


def normed(p, x):
    h = linear(x, p["w1"], p["b1"])
    h = (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5) * p["g"] + p[
        "b"
    ]
    return linear(jax.nn.gelu(h, approximate=False), p["w2"], p["b2"])


def normed_loss(p, x, t):
    return cross_entropy(normed(p, x), t)


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), [(1, 1), (1, 1)])


def conv_net(p, x, t, mean=None, var=None):
    wide = lambda v: v[:, None, None]
    h = conv(x, p["k"]) + wide(p["kb"])
    mean, var = (h.mean((0, 2, 3)), h.var((0, 2, 3))) if mean is None else (mean, var)
    h = jax.nn.relu((h - wide(mean)) * wide(lax.rsqrt(var + 1e-5) * p["g"]) + wide(p["b"]))
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return cross_entropy(linear(h.reshape(len(h), -1), p["w"], p["wb"]), t)


def one_image(p, x, t, mean, var):
    return conv_net(p, x[None], t[None], mean, var)


def conv_loss(w, x):
    return jnp.square(jax.nn.relu(conv(x[None], w))).sum()


def attention(q, k, v):
    return jax.nn.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def lstm_loss(p, x, h, c):
    i, f, g, o = jnp.split(linear(x, p["wx"], p["bx"]) + linear(h, p["wh"], p["bh"]), 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jnp.square(jax.nn.sigmoid(o) * jnp.tanh(c)).sum()


def gru_loss(p, x, h):
    xr, xz, xn = jnp.split(linear(x, p["wx"], p["bx"]), 3, -1)
    hr, hz, hn = jnp.split(linear(h, p["wh"], p["bh"]), 3, -1)
    z, n = jax.nn.sigmoid(xz + hz), jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
    return jnp.square((1 - z) * n + z * h).sum()


def embedded_loss(table, w, tokens, t):
    return cross_entropy(table[tokens].mean(1) @ w, t)


# ----- losses, indexing, linear algebra ----------------------------------------------------------


def losses(x, y):
    p = jax.nn.sigmoid(y)
    binary = jnp.maximum(x, 0) - x * p + jnp.log1p(jnp.exp(-jnp.abs(x)))
    near = lambda d: jnp.where(jnp.abs(d) < 1, 0.5 * d * d, jnp.abs(d) - 0.5)
    return binary.mean() + near(x - y).mean() + near(x - p).mean()


def divergence(x, y):
    p, q = jax.nn.log_softmax(y, -1), jax.nn.log_softmax(x, -1)
    return (jnp.exp(p) * (p - q)).sum() / len(x)


def gathered(x, i):
    return jnp.exp(jnp.take_along_axis(x, i, 1)).sum() + (x[i[:, 0]] * x).sum()


def scattered(x, i):
    y = jnp.zeros((4, 6)).at[jnp.arange(4)[:, None], i].add(jnp.sin(x))
    return (y * y).sum()


def sliced(x):
    joined = jnp.concatenate([x[:1], x[2:]])
    return (x[1:, ::2] * x[:-1, 1::2]).sum() + x[0].prod() + jnp.sin(joined).sum()


def scanned(x):
    return jax.nn.logsumexp(jnp.cumsum(x, -1) * x, -1).sum()


def solved(a, b):
    return jnp.square(jnp.linalg.solve(a @ a.mT + jnp.eye(4), b)).sum()


def likelihood(a, y):
    low = jnp.linalg.cholesky(a @ a.mT + jnp.eye(4))
    z = jax.scipy.linalg.solve_triangular(low, y, lower=True)
    return 0.5 * jnp.square(z).sum() + jnp.log(jnp.diagonal(low)).sum()


# ----- transforms put together -------------------------------------------------------------------


def pushed(f):
    return lambda x, t: jax.jvp(f, (x,), (t,))[1]


def forward_over_reverse(p, v, *data):
    return jax.jvp(jax.grad(lambda p: normed_loss(p, *data)), (p,), (v,))[1]


def reverse_over_reverse(p, v, x, y):
    pulled = lambda p: sum((a * b).sum() for a, b in zip(jax.grad(mlp_loss)(p, x, y), v))
    return jax.grad(pulled)(p)


def maml(p, x, y, x2, y2):
    step = jax.grad(mlp_loss)(p, x, y)
    return mlp_loss([w - 0.1 * g for w, g in zip(p, step)], x2, y2)


def tangent_kernel(p, x1, x2):
    j1, j2 = (jax.vmap(jax.jacrev(mlp), (None, 0))(p, x) for x in (x1, x2))
    flat = lambda a: a.reshape(*a.shape[:2], -1)
    parts = [jnp.einsum("naf,mbf->nmab", flat(a), flat(b)) for a, b in zip(j1, j2)]
    return sum(parts[1:], parts[0])


def self_attention(x):
    return jnp.square(attention(x, x, x)).sum()


SAMPLES = (None, 0, 0)

PROGRAMS = {
    **{f"derivative {n} of sin·exp/(1+x²)": nth(n) for n in range(1, 6)},
    "vmap of second derivative": jax.vmap(nth(2)),
    "grad sum sin": jax.grad(lambda x: jnp.sin(x).sum()),
    "grad logsumexp of cumsum": jax.grad(scanned),
    "grad softmax": jax.grad(lambda x: (jax.nn.softmax(x, -1) ** 2).sum()),
    "grad layer norm, by hand": jax.grad(waves),
    "jvp layer norm, by hand": pushed(layer_norm),
    "jvp grad layer norm, by hand": pushed(jax.grad(waves)),
    "hessian Rosenbrock": jax.hessian(rosenbrock),
    "forces Lennard-Jones": jax.grad(potential),
    "hessian Lennard-Jones": jax.hessian(potential),
    "vmap MLP": jax.vmap(mlp, (None, 0)),
    "grad MLP": jax.grad(mlp_loss),
    "vmap grad MLP": jax.vmap(jax.grad(mlp_loss), SAMPLES),
    "jacrev MLP": jax.jacrev(mlp, 1),
    "jacfwd MLP": jax.jacfwd(mlp, 1),
    "hessian MLP": jax.hessian(lambda x, p: mlp(p, x).sum()),
    "jacrev∘jacrev MLP": jax.jacrev(jax.jacrev(mlp, 1), 1),
    "MAML step MLP": jax.grad(maml),
    "neural tangent kernel MLP": tangent_kernel,
    "hessian-vector product MLP": reverse_over_reverse,
    "grad layer_norm net": jax.grad(normed_loss),
    "vmap grad layer_norm net": jax.vmap(jax.grad(normed_loss), SAMPLES),
    "jacfwd∘jacrev layer_norm net": jax.jacfwd(jax.jacrev(normed, 1), 1),
    "hessian-vector product layer_norm net": forward_over_reverse,
    "grad convolution": jax.grad(conv_loss),
    "grad conv net, batch norm in training": jax.grad(conv_net),
    "grad conv net, batch norm in evaluation": jax.grad(conv_net),
    "vmap grad conv net, batch norm in evaluation": jax.vmap(
        jax.grad(one_image), (None, 0, 0, None, None)
    ),
    "grad attention": jax.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)),
    "jvp grad attention": pushed(jax.grad(self_attention)),
    "grad scaled_dot_product_attention": jax.grad(
        lambda q, k, v: jnp.square(attention(q, k, v)).sum(), (0, 1, 2)
    ),
    "grad LSTM cell": jax.grad(lstm_loss),
    "grad GRU cell": jax.grad(gru_loss),
    "grad embedding, cross entropy": jax.grad(embedded_loss),
    "grad BCE, Huber, smooth L1": jax.grad(losses),
    "hessian KL divergence": jax.hessian(divergence),
    "grad gather, indexing": jax.grad(gathered),
    "grad scatter_add": jax.grad(scattered),
    "grad slices, cat, prod": jax.grad(sliced),
    "grad linalg.solve": jax.grad(solved),
    "grad Cholesky likelihood": jax.grad(likelihood),
}

"""The transformed functions whose graphs are counted, in PyTorch: name -> (function of the
transforms, arguments)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

#: a transformed function made out of a namespace of transforms (aotfunc or torch.func), and a
# maker of its arguments
Program = tuple[Callable[[Any], Callable], Callable[[], tuple]]


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def indices(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


# ----- functions of one tensor -------------------------------------------------------------------


def rational(x):
    return torch.sin(x) * torch.exp(x) / (1 + x * x)


def nth(n: int) -> Callable:
    def derivative(T):
        f = rational
        for _ in range(n):
            f = T.grad(f)
        return f

    return derivative


def layer_norm(x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) * (var + 1e-5) ** -0.5


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def potential(x):
    """The Lennard-Jones energy of particles at the rows of ``x``."""
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    d2 = ((x[i] - x[j]) ** 2).sum(-1)
    s6 = d2**-3
    return 4 * (s6 * s6 - s6).sum()


# ----- networks ----------------------------------------------------------------------------------


def mlp(p, x):
    return torch.tanh(torch.tanh(x @ p[0] + p[1]) @ p[2] + p[3])


def mlp_loss(p, x, y):
    return ((mlp(p, x) - y) ** 2).mean()


def normed(p, x):
    """A multilayer perceptron with layer_norm and gelu."""
    h = F.gelu(F.layer_norm(F.linear(x, p["w1"], p["b1"]), (8,), p["g"], p["b"]))
    return F.linear(h, p["w2"], p["b2"])


def normed_loss(p, x, t):
    return F.cross_entropy(normed(p, x), t)


def conv_net(p, x, t, mean=None, var=None):
    """Batch norm with these running statistics, or else (as in training) with those of the
    batch."""
    h = F.conv2d(x, p["k"], p["kb"], padding=1)
    h = F.relu(F.batch_norm(h, mean, var, p["g"], p["b"], training=mean is None))
    h = F.max_pool2d(h, 2).flatten(1)
    return F.cross_entropy(F.linear(h, p["w"], p["wb"]), t)


def conv_loss(w, x):
    return F.conv2d(x[None], w, padding=1).relu().square().sum()


def attention(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def lstm_loss(p, x, h, c):
    i, f, g, o = (F.linear(x, p["wx"], p["bx"]) + F.linear(h, p["wh"], p["bh"])).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return (torch.sigmoid(o) * torch.tanh(c)).square().sum()


def gru_loss(p, x, h):
    xr, xz, xn = F.linear(x, p["wx"], p["bx"]).chunk(3, -1)
    hr, hz, hn = F.linear(h, p["wh"], p["bh"]).chunk(3, -1)
    z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return ((1 - z) * n + z * h).square().sum()


def embedded_loss(table, w, tokens, t):
    return F.cross_entropy(F.embedding(tokens, table).mean(1) @ w, t)


# ----- losses, indexing, linear algebra ----------------------------------------------------------


def losses(x, y):
    p = torch.sigmoid(y)
    return F.binary_cross_entropy_with_logits(x, p) + F.huber_loss(x, y) + F.smooth_l1_loss(x, p)


def divergence(x, y):
    return F.kl_div(
        F.log_softmax(x, -1), F.log_softmax(y, -1), reduction="batchmean", log_target=True
    )


def gathered(x, i):
    return torch.gather(x, 1, i).exp().sum() + (x[i[:, 0]] * x).sum()


def scattered(x, i):
    y = torch.zeros(4, 6).scatter_add(1, i, x.sin())
    return (y * y).sum()


def sliced(x):
    return (x[1:, ::2] * x[:-1, 1::2]).sum() + x[0].prod() + torch.cat([x[:1], x[2:]]).sin().sum()


def scanned(x):
    return torch.logsumexp(torch.cumsum(x, -1) * x, -1).sum()


def solved(a, b):
    return torch.linalg.solve(a @ a.mT + torch.eye(4), b).square().sum()


def likelihood(a, y):
    """Minus the log density of a Gaussian, through a Cholesky factor."""
    low = torch.linalg.cholesky(a @ a.mT + torch.eye(4))
    z = torch.linalg.solve_triangular(low, y, upper=False)
    return 0.5 * z.square().sum() + low.diagonal().log().sum()


# ----- transforms put together -------------------------------------------------------------------


def pushed(f: Callable) -> Callable:
    return lambda T: lambda x, t: T.jvp(f, (x,), (t,))[1]


def forward_over_reverse(T):
    return lambda p, v, *data: T.jvp(T.grad(lambda p: normed_loss(p, *data)), (p,), (v,))[1]


def reverse_over_reverse(T):
    def product(p, v, x, y):
        pulled = lambda p: sum((a * b).sum() for a, b in zip(T.grad(mlp_loss)(p, x, y), v))
        return T.grad(pulled)(p)

    return product


def maml(T):
    """The gradient through one inner step of gradient descent."""

    def outer(p, x, y, x2, y2):
        step = T.grad(mlp_loss)(p, x, y)
        return mlp_loss([w - 0.1 * g for w, g in zip(p, step)], x2, y2)

    return T.grad(outer)


def tangent_kernel(T):
    def kernel(p, x1, x2):
        j1, j2 = (T.vmap(T.jacrev(mlp), (None, 0))(p, x) for x in (x1, x2))
        parts = [torch.einsum("naf,mbf->nmab", a.flatten(2), b.flatten(2)) for a, b in zip(j1, j2)]
        return sum(parts[1:], parts[0])

    return kernel


def layers() -> list:
    return [r(3, 8), r(8), r(8, 2), r(2)]


def normed_params() -> dict:
    return {"w1": r(8, 3), "b1": r(8), "g": r(8), "b": r(8), "w2": r(4, 8), "b2": r(4)}


def conv_params() -> dict:
    return {"k": r(2, 1, 3, 3), "kb": r(2), "g": r(2), "b": r(2), "w": r(4, 18), "wb": r(4)}


def cell_params(gates: int) -> dict:
    return {"wx": r(gates * 5, 3), "bx": r(gates * 5), "wh": r(gates * 5, 5), "bh": r(gates * 5)}


def one_image(p, x, t, mean, var):
    return conv_net(p, x[None], t[None], mean, var)


PROGRAMS: dict[str, Program] = {
    **{
        f"derivative {n} of sin·exp/(1+x²)": (nth(n), lambda: (torch.tensor(0.7),))
        for n in range(1, 6)
    },
    "vmap of second derivative": (lambda T: T.vmap(nth(2)(T)), lambda: (r(5),)),
    "grad sum sin": (lambda T: T.grad(lambda x: torch.sin(x).sum()), lambda: (r(8),)),
    "grad logsumexp of cumsum": (lambda T: T.grad(scanned), lambda: (r(4, 8),)),
    "grad softmax": (
        lambda T: T.grad(lambda x: (torch.softmax(x, -1) ** 2).sum()),
        lambda: (r(4, 8),),
    ),
    "grad layer norm, by hand": (
        lambda T: T.grad(lambda x: layer_norm(x).sin().sum()),
        lambda: (r(4, 8),),
    ),
    "jvp layer norm, by hand": (pushed(layer_norm), lambda: (r(4, 8), r(4, 8))),
    "jvp grad layer norm, by hand": (
        lambda T: pushed(T.grad(lambda x: layer_norm(x).sin().sum()))(T),
        lambda: (r(4, 8), r(4, 8)),
    ),
    "hessian Rosenbrock": (lambda T: T.hessian(rosenbrock), lambda: (r(6),)),
    "forces Lennard-Jones": (lambda T: T.grad(potential), lambda: (r(5, 3),)),
    "hessian Lennard-Jones": (lambda T: T.hessian(potential), lambda: (r(5, 3),)),
    "vmap MLP": (lambda T: T.vmap(mlp, (None, 0)), lambda: (layers(), r(5, 3))),
    "grad MLP": (lambda T: T.grad(mlp_loss), lambda: (layers(), r(5, 3), r(5, 2))),
    "vmap grad MLP": (
        lambda T: T.vmap(T.grad(mlp_loss), (None, 0, 0)),
        lambda: (layers(), r(5, 3), r(5, 2)),
    ),
    "jacrev MLP": (lambda T: T.jacrev(mlp, 1), lambda: (layers(), r(3))),
    "jacfwd MLP": (lambda T: T.jacfwd(mlp, 1), lambda: (layers(), r(3))),
    "hessian MLP": (lambda T: T.hessian(lambda x, p: mlp(p, x).sum()), lambda: (r(3), layers())),
    "jacrev∘jacrev MLP": (lambda T: T.jacrev(T.jacrev(mlp, 1), 1), lambda: (layers(), r(3))),
    "MAML step MLP": (maml, lambda: (layers(), r(5, 3), r(5, 2), r(5, 3), r(5, 2))),
    "neural tangent kernel MLP": (tangent_kernel, lambda: (layers(), r(5, 3), r(4, 3))),
    "hessian-vector product MLP": (
        reverse_over_reverse,
        lambda: (layers(), layers(), r(5, 3), r(5, 2)),
    ),
    "grad layer_norm net": (
        lambda T: T.grad(normed_loss),
        lambda: (normed_params(), r(6, 3), indices(4, 6)),
    ),
    "vmap grad layer_norm net": (
        lambda T: T.vmap(T.grad(normed_loss), (None, 0, 0)),
        lambda: (normed_params(), r(6, 3), indices(4, 6)),
    ),
    "jacfwd∘jacrev layer_norm net": (
        lambda T: T.jacfwd(T.jacrev(normed, 1), 1),
        lambda: (normed_params(), r(3)),
    ),
    "hessian-vector product layer_norm net": (
        forward_over_reverse,
        lambda: (normed_params(), normed_params(), r(6, 3), indices(4, 6)),
    ),
    "grad convolution": (lambda T: T.grad(conv_loss), lambda: (r(2, 1, 3, 3), r(1, 6, 6))),
    "grad conv net, batch norm in training": (
        lambda T: T.grad(lambda p, x, t: conv_net(p, x, t)),
        lambda: (conv_params(), r(3, 1, 6, 6), indices(4, 3)),
    ),
    "grad conv net, batch norm in evaluation": (
        lambda T: T.grad(lambda p, x, t, mean, var: conv_net(p, x, t, mean, var)),
        lambda: (conv_params(), r(3, 1, 6, 6), indices(4, 3), r(2), r(2).exp()),
    ),
    "vmap grad conv net, batch norm in evaluation": (
        lambda T: T.vmap(T.grad(one_image), (None, 0, 0, None, None)),
        lambda: (conv_params(), r(3, 1, 6, 6), indices(4, 3), r(2), r(2).exp()),
    ),
    "grad attention": (
        lambda T: T.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)),
        lambda: (r(2, 4, 8),) * 3,
    ),
    "jvp grad attention": (
        lambda T: pushed(T.grad(lambda x: attention(x, x, x).square().sum()))(T),
        lambda: (r(2, 4, 8), r(2, 4, 8)),
    ),
    "grad scaled_dot_product_attention": (
        lambda T: T.grad(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v).square().sum(), (0, 1, 2)
        ),
        lambda: (r(2, 2, 4, 8),) * 3,
    ),
    "grad LSTM cell": (
        lambda T: T.grad(lstm_loss),
        lambda: (cell_params(4), r(2, 3), r(2, 5), r(2, 5)),
    ),
    "grad GRU cell": (lambda T: T.grad(gru_loss), lambda: (cell_params(3), r(2, 3), r(2, 5))),
    "grad embedding, cross entropy": (
        lambda T: T.grad(embedded_loss),
        lambda: (r(7, 5), r(5, 4), indices(7, 3, 6), indices(4, 3)),
    ),
    "grad BCE, Huber, smooth L1": (lambda T: T.grad(losses), lambda: (r(4, 3), r(4, 3))),
    "hessian KL divergence": (lambda T: T.hessian(divergence), lambda: (r(4, 3), r(4, 3))),
    "grad gather, indexing": (lambda T: T.grad(gathered), lambda: (r(4, 6), indices(4, 4, 3))),
    "grad scatter_add": (lambda T: T.grad(scattered), lambda: (r(4, 3), indices(6, 4, 3))),
    "grad slices, cat, prod": (lambda T: T.grad(sliced), lambda: (r(4, 6),)),
    "grad linalg.solve": (lambda T: T.grad(solved), lambda: (r(4, 4), r(4, 2))),
    "grad Cholesky likelihood": (lambda T: T.grad(likelihood), lambda: (r(4, 4), r(4, 1))),
}

#: the programs of arithmetic, matrix products and reductions alone, where an op of aten is about a
# primitive of JAX
PLAIN = frozenset(
    name
    for name in PROGRAMS
    if name.startswith(("derivative", "vmap of"))
    or name.endswith((" MLP", "Rosenbrock", "sum sin", "Lennard-Jones", "by hand"))
)

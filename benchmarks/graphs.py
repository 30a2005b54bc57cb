"""How many ops the graphs of transformed functions have: aotfunc beside torch.func under torch's make_fx, and JAX.

torch's graphs lose their ``detach`` and ``alias`` nodes and what nobody reads before they are counted; JAX's jaxprs
are counted as ``jax.make_jaxpr`` returns them, inner calls opened. ``python -m benchmarks.graphs`` prints the table
with geometric means; JAX's column needs jax installed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx as torch_make_fx

import aotfunc
from aotfunc import make_fx
from aotfunc.graph import size

from .measure import Report, arguments

aten = torch.ops.aten


def r(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape)


def rational(x):
    return torch.sin(x) * torch.exp(x) / (1 + x * x)


def nth(n: int) -> Callable:
    def derivative(T):
        f = rational
        for _ in range(n):
            f = T.grad(f)
        return f

    return derivative


def mlp(p, x):
    return torch.tanh(torch.tanh(x @ p[0] + p[1]) @ p[2] + p[3])


def mlp_loss(p, x, y):
    return ((mlp(p, x) - y) ** 2).mean()


def layer_norm(x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) * (var + 1e-5) ** -0.5


def attention(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def conv_loss(w, x):
    return F.conv2d(x[None], w, padding=1).relu().square().sum()


LAYERS = lambda: [r(3, 8), r(8), r(8, 2), r(2)]
JVP = lambda f: lambda T: lambda x, t: T.jvp(f, (x,), (t,))[1]

#: name -> (transformed function from the namespace of transforms, its arguments)
PROGRAMS: dict[str, tuple[Callable[[Any], Callable], Callable[[], tuple]]] = {
    **{f"derivative {n} of sin·exp/(1+x²)": (nth(n), lambda: (torch.tensor(0.7),)) for n in range(1, 5)},
    "grad sum sin": (lambda T: T.grad(lambda x: torch.sin(x).sum()), lambda: (r(8),)),
    "grad logsumexp": (lambda T: T.grad(lambda x: torch.logsumexp(x, -1).sum()), lambda: (r(4, 8),)),
    "grad softmax": (lambda T: T.grad(lambda x: (torch.softmax(x, -1) ** 2).sum()), lambda: (r(4, 8),)),
    "grad layer norm": (lambda T: T.grad(lambda x: torch.sin(layer_norm(x)).sum()), lambda: (r(4, 8),)),
    "grad attention": (
        lambda T: T.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)),
        lambda: (r(2, 4, 8),) * 3,
    ),
    "grad MLP": (lambda T: T.grad(mlp_loss), lambda: (LAYERS(), r(5, 3), r(5, 2))),
    "grad convolution": (lambda T: T.grad(conv_loss), lambda: (r(2, 1, 3, 3), r(1, 6, 6))),
    "vmap MLP": (lambda T: T.vmap(mlp, (None, 0)), lambda: (LAYERS(), r(5, 3))),
    "vmap grad MLP": (lambda T: T.vmap(T.grad(mlp_loss), (None, 0, 0)), lambda: (LAYERS(), r(5, 3), r(5, 2))),
    "vmap grad convolution": (lambda T: T.vmap(T.grad(conv_loss), (None, 0)), lambda: (r(2, 1, 3, 3), r(5, 1, 6, 6))),
    "vmap of second derivative": (lambda T: T.vmap(T.grad(T.grad(rational))), lambda: (r(5),)),
    "jvp layer norm": (JVP(layer_norm), lambda: (r(4, 8), r(4, 8))),
    "jvp grad layer norm": (
        lambda T: JVP(T.grad(lambda x: torch.sin(layer_norm(x)).sum()))(T),
        lambda: (r(4, 8), r(4, 8)),
    ),
    "jacrev MLP": (lambda T: T.jacrev(mlp, 1), lambda: (LAYERS(), r(3))),
    "jacfwd MLP": (lambda T: T.jacfwd(mlp, 1), lambda: (LAYERS(), r(3))),
    "hessian Rosenbrock": (lambda T: T.hessian(rosenbrock), lambda: (r(6),)),
    "hessian MLP": (lambda T: T.hessian(lambda x, p: mlp(p, x).sum()), lambda: (r(3), LAYERS())),
}


def ours(program: Callable, args: tuple) -> int:
    return size(make_fx(program(aotfunc))(*args).graph)


def torchs(program: Callable, args: tuple) -> int:
    """Nodes of torch's own graph, once bookkeeping and dead code are gone."""
    graph = torch_make_fx(program(torch.func))(*args).graph
    for n in list(graph.nodes):
        if n.target in (aten.detach.default, aten.alias.default):
            n.replace_all_uses_with(n.args[0])
            graph.erase_node(n)
    graph.eliminate_dead_code()
    return size(graph)


def jaxs() -> dict[str, Callable[[], int]]:
    """The programs in JAX, counted; empty where it is not installed."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return {}

    def count(jaxpr: Any) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            inner = [p.jaxpr for p in eqn.params.values() if hasattr(p, "jaxpr")]
            total += sum(map(count, inner)) if inner else 1
        return total

    def counted(f: Callable, *args: Any) -> Callable[[], int]:
        return lambda: count(jax.make_jaxpr(f)(*args).jaxpr)

    a = lambda *shape: jnp.asarray(r(*shape).numpy())
    layers = [a(3, 8), a(8), a(8, 2), a(2)]
    small = lambda x: jnp.sin(x) * jnp.exp(x) / (1 + x * x)

    def repeated(n: int) -> Callable:
        f = small
        for _ in range(n):
            f = jax.grad(f)
        return f

    net = lambda p, x: jnp.tanh(jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[3])
    loss = lambda p, x, y: ((net(p, x) - y) ** 2).mean()
    norm = lambda x: (x - x.mean(-1, keepdims=True)) * (x.var(-1, keepdims=True) + 1e-5) ** -0.5
    attend = lambda q, k, v: jax.nn.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
    hills = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    waves = lambda x: jnp.sin(norm(x)).sum()
    push = lambda f: lambda x, t: jax.jvp(f, (x,), (t,))[1]

    def conv(w, x):
        y = jax.lax.conv_general_dilated(x[None], w, (1, 1), [(1, 1), (1, 1)])
        return (jax.nn.relu(y) ** 2).sum()

    per_sample = (None, 0)
    return {
        **{f"derivative {n} of sin·exp/(1+x²)": counted(repeated(n), 0.7) for n in range(1, 5)},
        "grad sum sin": counted(jax.grad(lambda x: jnp.sin(x).sum()), a(8)),
        "grad logsumexp": counted(jax.grad(lambda x: jax.nn.logsumexp(x, -1).sum()), a(4, 8)),
        "grad softmax": counted(jax.grad(lambda x: (jax.nn.softmax(x, -1) ** 2).sum()), a(4, 8)),
        "grad layer norm": counted(jax.grad(waves), a(4, 8)),
        "grad attention": counted(jax.grad(lambda q, k, v: attend(q, k, v).sum(), (0, 1, 2)), *[a(2, 4, 8)] * 3),
        "grad MLP": counted(jax.grad(loss), layers, a(5, 3), a(5, 2)),
        "grad convolution": counted(jax.grad(conv), a(2, 1, 3, 3), a(1, 6, 6)),
        "vmap MLP": counted(jax.vmap(net, per_sample), layers, a(5, 3)),
        "vmap grad MLP": counted(jax.vmap(jax.grad(loss), (None, 0, 0)), layers, a(5, 3), a(5, 2)),
        "vmap grad convolution": counted(jax.vmap(jax.grad(conv), per_sample), a(2, 1, 3, 3), a(5, 1, 6, 6)),
        "vmap of second derivative": counted(jax.vmap(repeated(2)), a(5)),
        "jvp layer norm": counted(push(norm), a(4, 8), a(4, 8)),
        "jvp grad layer norm": counted(push(jax.grad(waves)), a(4, 8), a(4, 8)),
        "jacrev MLP": counted(jax.jacrev(net, 1), layers, a(3)),
        "jacfwd MLP": counted(jax.jacfwd(net, 1), layers, a(3)),
        "hessian Rosenbrock": counted(jax.hessian(hills), a(6)),
        "hessian MLP": counted(jax.hessian(lambda x, p: net(p, x).sum()), a(3), layers),
    }


def mean(ratios: list[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f}x" if ratios else "-"


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    report = Report("graphs", "Sizes of graphs", "python -m benchmarks.graphs")
    jax = jaxs()
    rows, by_torch, by_jax = [], [], []
    for name, (program, make) in PROGRAMS.items():
        if options.quick and name not in ("grad sum sin", "vmap grad MLP"):
            continue
        mine, theirs = ours(program, make()), torchs(program, make())
        third = jax[name]() if name in jax else None
        by_torch.append(theirs / mine)
        by_jax += [third / mine] if third else []
        rows.append([name, str(mine), str(theirs), str(third) if third else "-"])
    rows.append(["geometric mean, beside aotfunc", "1", mean(by_torch), mean(by_jax)])
    report.table("Ops (calls without getitem)", ["program", "aotfunc", "torch.func, make_fx", "JAX"], rows)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()

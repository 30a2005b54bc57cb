"""Derivatives of order k along a line by Taylor mode, beside towers of first derivatives and
``jax.experimental.jet``; Laplacians, diagonals, products with Hessians and Gauss-Newton matrices
beside the nested transforms that make whole matrices; sparse Hessians beside dense ones.

``python -m benchmarks.higher_order [--write]``; JAX needs the bench extra. Both packages compute
the same values in float64, checked against each other. A graph's size is its number of ops (for
JAX, of equations of the jaxpr)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.experimental import jet as jax_taylor
from torch import Tensor

import aotfunc
from aotfunc.graph import n_ops
from benchmarks import measure
from benchmarks.measure import Report, arguments, ms

D = torch.float64
WIDTH, DEEPEST_TOWER, DENSE = 32, 6, 1000

#: of processor time, in many short rounds
interleaved = partial(measure.interleaved, rounds=9, budget_s=0.05, clock=time.process_time)


def network(weights: list, tanh: Callable) -> Callable:
    """A network of three layers, with one output."""

    def f(x: Any) -> Any:
        for w in weights:
            x = tanh(w @ x)
        return x.sum()

    return f


def tower(jvp: Callable, f: Callable, x: Any, v: Any, k: int, one: Any) -> Callable:
    """The k-th derivative of ``t -> f(x + t v)``, a jvp of a jvp of …"""
    if k == 0:
        return lambda t: f(x + t * v)
    below = tower(jvp, f, x, v, k - 1, one)
    return lambda t: jvp(below, (t,), (one,))[1]


def first(f: Callable, *args: Any) -> tuple[Any, float]:
    """The result of a first call, and its processor seconds."""
    start = time.process_time()
    result = f(*args)
    return result, time.process_time() - start


def order_row(k: int, weights: list, x: Tensor, v: Tensor) -> list[str]:
    f, jf = network(weights, torch.tanh), network([jnp.array(w) for w in weights], jnp.tanh)
    jx, jv = jnp.array(x), jnp.array(v)
    ours = lambda x, v: aotfunc.jet(f, (x,), ([v, *[None] * (k - 1)],))[1][-1]
    zeros = [jnp.zeros_like(jv)] * (k - 1)
    theirs = lambda x, v: jax_taylor.jet(jf, (x,), ([v, *zeros],))[1][-1]
    compiled, jitted = aotfunc.jit(ours), jax.jit(theirs)
    value, ours_first = first(compiled, x, v)
    expected, theirs_first = first(jitted, jx, jv)
    torch.testing.assert_close(value, torch.tensor(float(expected), dtype=D), rtol=1e-8, atol=0)
    times = interleaved(
        {"ours": lambda: compiled(x, v), "jax": lambda: jitted(jx, jv).block_until_ready()}
    )
    nodes = lambda f: str(n_ops(aotfunc.make_fx(f)(x, v).graph))
    equations = lambda f: str(len(jax.make_jaxpr(f)(jx, jv).eqns))
    towers = ["-", "-"]
    if k <= DEEPEST_TOWER:
        zero, one, of_jax = torch.zeros((), dtype=D), torch.ones((), dtype=D), jnp.ones(())
        towers = [
            nodes(lambda x, v: tower(aotfunc.jvp, f, x, v, k, one)(zero)),
            equations(lambda x, v: tower(jax.jvp, jf, x, v, k, of_jax)(jnp.zeros(()))),
        ]
    return [
        *(str(k), nodes(ours), towers[0], equations(theirs), towers[1]),
        *map(ms, (ours_first, theirs_first, *times.values())),
    ]


def laplacian_row(n: int) -> list[str]:
    weights, x = sample(n)
    f, jf = network(weights, torch.tanh), network([jnp.array(w) for w in weights], jnp.tanh)
    jx = jnp.array(x)
    laplacian = aotfunc.laplacian(f)
    trace = lambda x: aotfunc.hessian(f)(x).trace()
    plain = lambda x: torch.func.hessian(f)(x).trace()
    by_us, by_trace = aotfunc.jit(laplacian), aotfunc.jit(trace)
    by_jax = jax.jit(lambda x: jnp.trace(jax.hessian(jf)(x)))
    expected = torch.tensor(float(by_jax(jx)), dtype=D)
    for run in (laplacian, trace, plain, by_us, by_trace):
        torch.testing.assert_close(run(x), expected, rtol=1e-6, atol=1e-9)
    times = interleaved(
        {
            "laplacian": lambda: by_us(x),
            "trace": lambda: by_trace(x),
            "torch": lambda: plain(x),
            "jax": lambda: by_jax(jx).block_until_ready(),
        }
    )
    nodes = [str(n_ops(aotfunc.make_fx(f)(x).graph)) for f in (laplacian, trace)]
    return [str(n), *nodes, *map(ms, times.values())]


def products(lib: Any, f: Callable, g: Callable, loss: Callable) -> dict[str, Callable]:
    """Functions of a point and a direction, by whole matrices of ``lib``'s transforms."""

    def gauss_newton(x: Tensor, v: Tensor) -> Tensor:
        jacobian = lib.jacrev(g)(x)
        return jacobian.mT @ (lib.hessian(loss)(g(x)) @ (jacobian @ v))

    return {
        "hvp": lambda x, v: lib.hessian(f)(x) @ v,
        "ggn": gauss_newton,
        "diag_hessian": lambda x, v: lib.hessian(f)(x).diagonal(),
    }


def product_rows(n: int) -> list[list[str]]:
    weights, x = sample(n)
    f, v = network(weights, torch.tanh), x.cos()
    hidden = lambda x: (weights[1] @ (weights[0] @ x).tanh()).tanh()
    loss = lambda y: (y**4).sum()
    ours: dict[str, Callable] = {
        "hvp": lambda x, v: aotfunc.hvp(f, (x,), (v,))[1],
        "ggn": lambda x, v: aotfunc.ggn(hidden, loss, x, v),
        "diag_hessian": lambda x, v: aotfunc.diag_hessian(f)(x),
    }
    nested, plain = (products(lib, f, hidden, loss) for lib in (aotfunc, torch.func))
    rows = []
    for name, run in ours.items():
        three = {"ours": run, "nested": nested[name], "torch": plain[name]}
        nodes = [str(n_ops(aotfunc.make_fx(g)(x, v).graph)) for g in three.values()]
        compiled = {k: g if k == "torch" else aotfunc.jit(g) for k, g in three.items()}
        for g in compiled.values():
            torch.testing.assert_close(g(x, v), plain[name](x, v), rtol=1e-6, atol=1e-9)
        times = interleaved({k: partial(g, x, v) for k, g in compiled.items()})
        rows.append([name, str(n), *nodes, *map(ms, times.values())])
    return rows


def sparse_row(n: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dtype=D, generator=generator)
    rosenbrock = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    by_colours, jx = aotfunc.sparse_hessian(rosenbrock), jnp.array(x)
    result, ours_first = first(by_colours, x)
    runs = {"sparse": lambda: by_colours(x)}
    if n <= DENSE:
        dense, by_jax = aotfunc.hessian(rosenbrock), jax.jit(jax.hessian(rosenbrock))
        torch.testing.assert_close(result.to_dense(), dense(x))
        runs["dense"] = lambda: dense(x)
        runs["jax"] = lambda: by_jax(jx).block_until_ready()
    times = interleaved(runs)
    return [
        str(n),
        str(result._nnz()),
        ms(ours_first),
        *(ms(times.get(k)) for k in ("sparse", "dense", "jax")),
    ]


def sample(n: int) -> tuple[list[Tensor], Tensor]:
    """Three matrices and a vector."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, n, dtype=D, generator=generator) / n**0.5 for _ in range(3)]
    return weights, torch.randn(n, dtype=D, generator=generator)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    jax.config.update("jax_enable_x64", True)
    command = "python -m benchmarks.higher_order --write"
    report = Report("higher_order", "Higher derivatives", command)
    weights, x = sample(WIDTH)
    report.table(
        f"k-th derivative along a line, a network of three layers of {WIDTH}",
        ["k", "jet: ops", "tower: ops", "JAX's jet: ops", "JAX's tower: ops"]
        + ["first call", "JAX's", "call", "JAX's"],
        [order_row(k, weights, x, x.cos()) for k in range(1, 4 if args.quick else 11)],
    )
    report.table(
        "Laplacian of a network of three layers of n",
        ["n", "laplacian: ops", "trace of the Hessian: ops", "laplacian", "trace of the Hessian"]
        + ["torch.func's trace", "JAX's trace"],
        [laplacian_row(n) for n in ([8] if args.quick else [16, 64, 256])],
    )
    report.note(
        "In theory: of products of n x n matrices a forward Laplacian takes one for each layer "
        "but the first, whose tangents are the matrix itself: two here. The Hessian takes those "
        "and one for each layer backwards: five. So 0.4 of the time is what theory promises where "
        "products take it. It promises no fewer ops: each layer has values, tangents and sums "
        "there, and values, tangents, cotangents and their tangents here."
    )
    report.table(
        "Products with second derivatives, and their diagonal, beside those of whole matrices",
        ["", "n", "ops", "nested: ops", "torch.func's: ops", "call", "nested", "torch.func's"],
        [row for n in ([8] if args.quick else [16, 64, 256]) for row in product_rows(n)],
    )
    report.note(
        "A product with a matrix has as many ops as each of its n columns, and in theory 1 / n of "
        "the time. A diagonal by Taylor mode costs one product of matrices for each layer but "
        "the first, two here, and the Hessian five: 0.4 of the time. Times are of the processor, "
        "of JAX's threads, too."
    )
    report.table(
        "Hessian of Rosenbrock's function of n numbers",
        ["n", "entries", "first call", "sparse_hessian", "hessian", "JAX's, compiled"],
        [sparse_row(n) for n in ([100] if args.quick else [100, 1000, 10_000, 100_000])],
    )
    if args.write:
        report.write()


if __name__ == "__main__":
    main()

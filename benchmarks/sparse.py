"""Sparse Jacobians of a reaction network and of a PDE on a grid, and the grid's sparse Hessian,
beside dense ones: entries, products, time and memory for n = 10^2 … 10^5.

``python -m benchmarks.sparse [--quick]``. Each line is measured in a process of its own, whose
peak memory above that before the call is shown; dense results, up to about n = 10^3, are
torch.func's and are compared with ours."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import aotfunc
from aotfunc.api.sparse import Entries
from aotfunc.transforms.sparsity.plans import by_symmetry, fewest
from benchmarks.measure import Report, arguments, ms, per_call, timed

D = torch.float64
DENSE = 1100


def reactions(n: int) -> Callable[[Tensor], Tensor]:
    """The rates of change of n species in 2 n reactions A + B -> C, by the law of mass action;
    partners are at most five species apart."""
    generator = torch.Generator().manual_seed(0)
    first = torch.arange(n).repeat(2)
    second, made = ((first + torch.randint(1, 6, (2 * n,), generator=generator)) % n for _ in "bc")
    speeds = torch.rand(2 * n, dtype=D, generator=generator)

    def change(x: Tensor) -> Tensor:
        rate = speeds * x[first] * x[second]
        lost = torch.zeros_like(x).index_add(0, first, rate).index_add(0, second, rate)
        return torch.zeros_like(x).index_add(0, made, rate) - lost

    return change


def brusselator(n: int) -> Callable[[Tensor], Tensor]:
    """Two species that react and diffuse on a periodic square grid (Prigogine and Lefever,
    1968)."""
    side = round((n / 2) ** 0.5)

    def change(x: Tensor) -> Tensor:
        u, v = x.view(2, side, side)
        laplacian = lambda f: sum(f.roll(s, d) for s in (1, -1) for d in (0, 1)) - 4 * f
        both = u * u * v
        return torch.stack([1 - 4 * u + both + laplacian(u), 3 * u - both + laplacian(v)])

    return lambda x: change(x).flatten()


def surface(n: int) -> Callable[[Tensor], Tensor]:
    """The area of a surface over a square grid, whose Hessian couples neighbours."""
    side = round(n**0.5)

    def area(x: Tensor) -> Tensor:
        z = F.pad(x.view(1, side, side), (1, 1, 1, 1))[0]
        slopes = (z[1:, 1:] - z[:-1, 1:]) ** 2 + (z[1:, 1:] - z[1:, :-1]) ** 2
        return (1 + slopes).sqrt().sum()

    return area


PROGRAMS = {
    "reactions": (reactions, aotfunc.sparse_jacobian, torch.func.jacrev, fewest),
    "brusselator": (brusselator, aotfunc.sparse_jacobian, torch.func.jacrev, fewest),
    "surface": (surface, aotfunc.sparse_hessian, torch.func.hessian, by_symmetry),
}


def size_of(name: str, n: int) -> int:
    """The number nearest to n for which there is a grid."""
    per = {"reactions": n, "brusselator": round((n / 2) ** 0.5), "surface": round(n**0.5)}[name]
    return {"reactions": per, "brusselator": 2 * per * per, "surface": per * per}[name]


def peak() -> float:
    """The peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(name: str, n: int, dense: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    make, sparse, plain, plan = PROGRAMS[name]
    f = make(n)
    x = torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(1)) + 1
    call = (plain if dense else sparse)(f)
    aotfunc.sparse_jacobian(torch.sin)(x[:2])  # what is imported at first
    torch.func.jacrev(torch.sin)(x[:2])
    before = peak()
    first = timed(lambda: call(x))
    memory = peak() - before
    found = {"first": first, "memory": memory, "call": per_call(lambda: call(x))}
    if not dense:
        g = aotfunc.grad(f) if plan is by_symmetry else f
        result, made = call(x), Entries(name, g, 0, (x,), {}).plan("benchmark", plan)
        found |= {"entries": result._nnz(), "products": made.n_products}
        if n <= DENSE:
            torch.testing.assert_close(result.to_dense(), plain(f)(x))
    return found


def row(pool: Any, name: str, n: int) -> list[str]:
    ours = pool.apply(measured, (name, n, False))
    theirs = pool.apply(measured, (name, n, True)) if n <= DENSE else {}
    times = [ms(x.get(k)) for k in ("first", "call") for x in (ours, theirs)]
    memory = [f"{x['memory']:.0f} MiB" if x else "-" for x in (ours, theirs)]
    ratio = f"{ours['call'] / theirs['call']:.2f}" if theirs else "-"
    return [name, str(n), str(ours["entries"]), str(ours["products"]), *times, ratio, *memory]


def main() -> None:
    args = arguments(__doc__).parse_args()
    sizes = [100] if args.quick else [100, 1000, 10_000, 100_000]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [row(pool, name, size_of(name, n)) for name in PROGRAMS for n in sizes]
    report = Report("sparse", "Sparse derivatives", "python -m benchmarks.sparse")
    report.table(
        "sparse derivatives of n numbers, beside torch.func's dense ones",
        ["program", "n", "entries", "products", "first call", "dense", "call", "dense", "ratio"]
        + ["memory", "dense"],
        rows,
    )


if __name__ == "__main__":
    main()

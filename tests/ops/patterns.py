"""Patterns of Jacobians, and of gradients' Jacobians, against what is not zero at random points:

    python -m tests.ops.patterns [words of names]

An entry that a pattern lacks would be a wrong number. Prints these, and where a pattern has many
entries that are zero everywhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from aotfunc import jacrev, vjp
from aotfunc.api.sparse import Entries
from aotfunc.errors import RuleError
from aotfunc.transforms.sparsity.dependence import dependence
from tests.ops.table import OPS, RANDOM, dtypes, samples

LARGEST = 80  # numbers in the argument and in the result
NAMES = [n for n, op in OPS.items() if op.supports_autograd and "float64" in dtypes(op)]
NAMES = [name for name in NAMES if name not in RANDOM]
#: where two numbers go to one place, forward and reverse mode differ, as PyTorch's do
AMBIGUOUS = {"nn_functional_max_unpool2d", "nn_functional_max_unpool3d"}


class Compared(NamedTuple):
    """Entries of one Jacobian: of the pattern, not zero somewhere, and these without those."""

    where: str
    pattern: int
    nonzero: int
    missing: int


def functions(name: str, count: int) -> Iterator[tuple[str, Callable, Tensor]]:
    """List functions of one argument to one result, by the op's samples, and their gradients."""
    for k, sample in enumerate(samples(name, "float64", count)):
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        for i, x in enumerate(leaves):
            small = isinstance(x, Tensor) and x.is_floating_point() and x.numel() <= LARGEST

            def results(t: Tensor, i: int = i, leaves: list = leaves, spec=spec) -> list:
                given, args, kwargs = tree_unflatten([*leaves[:i], t, *leaves[i + 1 :]], spec)
                found = tree_leaves(OPS[name].get_op()(given, *args, **kwargs))
                return [o for o in found if isinstance(o, Tensor) and o.is_floating_point()]

            for j, out in enumerate(results(x)[:3] if small and x.numel() else []):
                if out.numel() > LARGEST:
                    continue
                generator = torch.Generator().manual_seed(j)
                ct = torch.randn(out.shape, dtype=out.dtype, generator=generator)
                f = lambda t, j=j, results=results: results(t)[j]
                yield f"{name}, sample {k}, argument {i}, result {j}", f, x
                gradient = lambda t, f=f, ct=ct: vjp(f, t)[1](ct)[0]
                yield f"its gradient: {name}, {k}, {i}, {j}", gradient, x


def points(x: Tensor) -> Iterator[Tensor]:
    """List the argument, numbers close to it, and its numbers in other places."""
    generator = torch.Generator().manual_seed(3)
    yield x
    for _ in range(2):
        yield x * (1 + 0.2 * torch.rand(x.shape, dtype=x.dtype, generator=generator))
        yield x.flatten()[torch.randperm(x.numel(), generator=generator)].view(x.shape)


def compared(name: str, count: int = 2) -> Iterator[Compared]:
    for where, f, x in functions(name, count):
        try:
            call = Entries("sparse_jacobian", f, 0, (x,), {}).call
        except RuleError:  # an argument without a derivative
            continue
        pattern, read = dependence(call.program, call.wrt[0], call.inputs)
        own = any(call.inputs[i] is x for i in read)  # it holds at this point only
        found, nonzero = pattern.toarray(), np.zeros(pattern.shape, bool)
        for z in [x] if own else points(x):
            try:
                dense = jacrev(f)(z).reshape(pattern.shape)
            except RuntimeError:  # outside of the domain: a matrix that is not positive definite
                continue
            if dense.isfinite().all():
                nonzero |= (dense.abs() > 1e-14 * dense.norm()).numpy()
        sizes = found.sum(), nonzero.sum(), (nonzero & ~found).sum()
        yield Compared(where, *map(int, sizes))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    words = sys.argv[1:]
    for name in NAMES:
        if name not in AMBIGUOUS and (not words or any(word in name for word in words)):
            for c in compared(name):
                if c.missing or c.pattern > 2 * max(c.nonzero, 1):
                    kind = f"{c.missing} MISSING" if c.missing else "loose"
                    print(f"{kind}: {c.where}: {c.pattern} for {c.nonzero}", flush=True)

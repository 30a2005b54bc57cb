"""Jacobians and Hessians with few entries, computed by few products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..capture.tree import Arguments
from ..errors import ArgumentError, CaptureError
from ..trace.entering import entry
from ..trace.traced import current
from .call import Call, positions
from .func import grad, linearize, vjp
from .vmap import vmap


def sparse_jacobian(
    f: Callable, argnums: int = 0, *, chunk_size: int | None = None
) -> Callable[..., Tensor]:
    """Return ``jacobian(*args)``, the Jacobian of ``f(*args)``, a tensor of shape ``O``, by the
    tensor ``args[argnums]`` of shape ``I``, as a sparse COO tensor of shape ``O + I``.

    Which entries there are is read off the graph of ``f``; some of them may be zero. Columns that
    share no row have one colour, and one product with the Jacobian computes them all; rows
    likewise, where they need fewer colours (Gebremedhin et al., "What Color Is Your Jacobian?",
    2005). ``chunk_size`` products are made at a time. The entries are differentiable by autograd.
    Raises ArgumentError for an output or argument that is no floating real tensor, CaptureError
    inside of other transforms, which take no sparse tensors.

    >>> f = lambda x: x[1:] * x[:-1]
    >>> sparse_jacobian(f)(torch.tensor([1.0, 2.0, 3.0])).to_dense()
    tensor([[2., 1., 0.],
            [0., 3., 2.]])
    """

    @entry
    @functools.wraps(f)
    def jacobian(*args: Any, **kwargs: Any) -> Tensor:
        return of_call("sparse_jacobian", f, argnums, chunk_size, args, kwargs)

    return jacobian


def sparse_hessian(
    f: Callable, argnums: int = 0, *, chunk_size: int | None = None
) -> Callable[..., Tensor]:
    """Return ``hessian(*args)``, the Hessian of a scalar ``f`` by the tensor ``args[argnums]`` of
    shape ``I``, as a sparse COO tensor of shape ``I + I``; otherwise as :func:`sparse_jacobian`.

    >>> sparse_hessian(lambda x: (x[1:] * x[:-1]).sum())(torch.ones(3)).to_dense()
    tensor([[0., 1., 0.],
            [1., 0., 1.],
            [0., 1., 0.]])
    """

    @entry
    @functools.wraps(f)
    def hessian(*args: Any, **kwargs: Any) -> Tensor:
        slope = grad(f, argnums)
        return of_call("sparse_hessian", slope, argnums, chunk_size, args, kwargs)

    return hessian


def of_call(
    name: str, f: Callable, argnums: int, chunk_size: int | None, args: tuple, kwargs: dict
) -> Tensor:
    if current() is not None:
        raise CaptureError(
            f"{name}: no transform takes its result, which is sparse: call it outside"
        )
    from ..transforms.sparsity import Dependence, coloured  # which imports scipy

    arguments = Arguments(args, kwargs, f)
    chosen = positions(name, arguments, argnums)
    if len(chosen) != 1 or arguments.leaves[chosen[0]].is_complex():
        raise ArgumentError(f"{name}: argument {argnums} must be one real tensor")
    call = Call(name, f, arguments, chosen, False)
    call.check_tensors()
    output, x = call.rec.leaves[0], arguments.leaves[chosen[0]]
    if call.n_out != 1 or not output.is_floating_point():
        raise ArgumentError(f"{name}: the function must return one real floating tensor")

    def of_x(x: Tensor) -> Tensor:
        leaves = list(arguments.leaves)
        leaves[chosen[0]] = x
        given, named = arguments.rebuilt(leaves)
        (result,) = torch.utils._pytree.tree_leaves(f(*given, **named))
        return result

    def read() -> tuple[Any, np.ndarray, bool]:
        found = Dependence(call.program, call.wrt[0], call.inputs)
        pattern = found.of(found.outputs[0]).tocoo()
        columns, rows = coloured(pattern), coloured(pattern.T)
        by_rows = rows.max(initial=-1) < columns.max(initial=-1)
        kept = pattern, rows if by_rows else columns, by_rows
        if not found.by_value:
            call.program.once(("pattern", call.wrt), lambda: kept)
        return kept

    pattern, colours, by_rows = call.program.cache.get(("pattern", call.wrt)) or read()
    values = jacobian_entries(of_x, x, output.shape, pattern, colours, by_rows, chunk_size)
    places = torch.as_tensor(np.stack([pattern.row, pattern.col]).astype(np.int64))
    split = [
        torch.stack(torch.unravel_index(i.to(x.device), s)) if s else i.new_zeros(0, len(i))
        for i, s in zip(places, (tuple(output.shape), tuple(x.shape)), strict=True)
    ]
    shape = (*output.shape, *x.shape)
    return torch.sparse_coo_tensor(torch.cat(split), values, shape, check_invariants=False)


def jacobian_entries(
    f: Callable,
    x: Tensor,
    shape: torch.Size,
    pattern: Any,
    colours: np.ndarray,
    by_rows: bool,
    chunk_size: int | None,
) -> Tensor:
    """Return the entries of the Jacobian in the pattern (a scipy.sparse.coo_array), by products
    with sums of unit vectors, one for each colour."""
    count = int(colours.max(initial=-1)) + 1
    whole = lambda i: torch.as_tensor(i.astype(np.int64), device=x.device)
    row, col, colour = map(whole, (pattern.row, pattern.col, colours))
    if not count:
        return x.new_zeros(0)
    seeds = torch.nn.functional.one_hot(colour, count).T.to(x.dtype)
    if by_rows:
        pull = vjp(f, x)[1]
        along = lambda seed: pull(seed.view(shape))[0]
    else:
        push = linearize(f, x)[1]
        along = lambda seed: push(seed.view(x.shape))
    products = vmap(along, chunk_size=chunk_size)(seeds).reshape(count, -1)
    return products[colour[row], col] if by_rows else products[colour[col], row]

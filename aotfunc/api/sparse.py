"""Compute Jacobians and Hessians with few entries by few products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..capture.blocks import without_loops
from ..capture.makers import of_derivatives
from ..capture.tree import Arguments
from ..errors import ArgumentError, CaptureError
from ..runtime.anomaly import without_nan
from ..runtime.constants import attached
from ..runtime.execute import execute
from ..trace.entering import entry
from ..trace.tape import signature
from ..trace.traced import current
from ..transforms.jacobian import jacobian_products
from ..transforms.lower import CALLS, lowered, marked
from ..transforms.sparsity.plans import (
    ColouredProducts,
    JacobianPlan,
    by_blocks,
    by_symmetry,
    fewest,
)
from .call import Call, positions, tensors_of
from .definitions import product_with_hessian, product_with_jacobian, validated_by
from .func import grad


@validated_by(product_with_jacobian, later=True)
def sparse_jacobian(
    f: Callable, argnums: int = 0, *, chunk_size: int | None = None
) -> Callable[..., Tensor]:
    """Return ``jacobian(*args)``, the Jacobian of ``f(*args)``, a tensor of shape ``O``, by the
    tensor ``args[argnums]`` of shape ``I``, as a sparse COO tensor of shape ``O + I``.

    The graph of ``f`` tells which entries there are; some of them may be zero. Columns that share
    no row have one colour, and one product with the Jacobian computes them all; rows with many
    entries likewise, by products from the left, where these are fewer products in all
    (Gebremedhin et al., "What Color Is Your Jacobian?", 2005).
    ``chunk_size`` products are made at a time. The entries are differentiable by autograd. Raises
    ArgumentError for an output or argument that is no floating real tensor, CaptureError inside of
    other transforms, which take no sparse tensors.

    >>> f = lambda x: x[1:] * x[:-1]
    >>> sparse_jacobian(f)(torch.tensor([1.0, 2.0, 3.0])).to_dense()
    tensor([[2., 1., 0.],
            [0., 3., 2.]])
    """

    @entry
    @functools.wraps(f)
    def jacobian(*args: Any, **kwargs: Any) -> Tensor:
        found = Entries("sparse_jacobian", f, argnums, args, kwargs)
        return found.sparse(found.plan("columns and rows", fewest), chunk_size)

    return jacobian


@validated_by(product_with_hessian, later=True)
def sparse_hessian(
    f: Callable, argnums: int = 0, *, chunk_size: int | None = None
) -> Callable[..., Tensor]:
    """Return ``hessian(*args)``, the Hessian of a scalar ``f`` by the tensor ``args[argnums]`` of
    shape ``I``, as a sparse COO tensor of shape ``I + I``; otherwise as :func:`sparse_jacobian`.

    As the matrix is symmetric, an entry may be read from either of two products: columns are
    coloured so that one of them holds it alone (a star colouring). An arrow takes two products,
    where each of its columns would take one. Symmetry is not assumed if ``f`` states derivatives
    itself (``detach``, custom rules).

    >>> sparse_hessian(lambda x: (x[1:] * x[:-1]).sum())(torch.ones(3)).to_dense()
    tensor([[0., 1., 0.],
            [1., 0., 1.],
            [0., 1., 0.]])
    """

    @entry
    @functools.wraps(f)
    def hessian(*args: Any, **kwargs: Any) -> Tensor:
        found = Entries("sparse_hessian", grad(f, argnums), argnums, args, kwargs)

        def plan(pattern: Any) -> JacobianPlan:
            own = Call("sparse_hessian", f, found.arguments, found.chosen, False)
            rules = marked(lowered(own.program, CALLS))
            return fewest(pattern) if rules else by_symmetry(pattern)

        return found.sparse(found.plan("symmetric", plan), chunk_size)

    return hessian


def hessian_blocks(
    f: Callable, argnums: int = 0, *, chunk_size: int | None = None
) -> Callable[..., Tensor]:
    """Return ``blocks(*args)``, the Hessian of a scalar ``f`` by the elements of each slice
    along the first dimension of ``args[argnums]``, of shape ``[B, *I]``: of shape ``[B, *I,
    *I]``. Only these entries are computed; if there are no others, by one product for each
    element of ``I``."""

    @entry
    @functools.wraps(f)
    def all_blocks(*args: Any, **kwargs: Any) -> Tensor:
        found = Entries("hessian", grad(f, argnums), argnums, args, kwargs)
        if not found.x.dim():
            raise ArgumentError('hessian(structure="blocks"): the argument has no dimension')
        count, *inner = found.x.shape
        size = math.prod(inner)
        step = max(size, 1)
        plan = found.plan("blocks", by_blocks(step))
        values = found.values(plan, chunk_size)
        places, total = plan.row.astype(np.int64) * step + plan.col % step, count * size * size
        if not np.array_equal(places, np.arange(total)):
            values = found.x.new_zeros(total).index_put((found.whole(places),), values)
        return values.view(count, *inner, *inner)

    return all_blocks


class Entries:
    """The entries of a Jacobian at one call of ``f``."""

    def __init__(self, name: str, f: Callable, argnums: int, args: tuple, kwargs: dict) -> None:
        if current() is not None:
            raise CaptureError(
                f"{name}: which entries there are may depend on values, which other transforms "
                "do not have: call it outside"
            )
        self.arguments = Arguments(args, kwargs, f)
        self.chosen = positions(name, self.arguments, argnums)
        if len(self.chosen) != 1 or self.arguments.leaves[self.chosen[0]].is_complex():
            raise ArgumentError(f"{name}: argument {argnums} must be one real tensor")
        self.call = call = Call(name, f, self.arguments, self.chosen, False)
        call.check_tensors()
        output, self.x = call.rec.leaves[0], self.arguments.leaves[self.chosen[0]]
        if call.n_out != 1 or not output.is_floating_point():
            raise ArgumentError(f"{name}: the function must return one real floating tensor")
        self.shape = tuple(output.shape)

    def plan(self, name: str, make: Callable[[Any], JacobianPlan]) -> JacobianPlan:
        """Return the plan for the pattern of the function, kept under ``name`` for as long as the
        values that the pattern depends on (indices, zeros of matrices) are the same."""
        from ..transforms.sparsity.dependence import dependence  # imports scipy

        program, key = self.call.program, ("pattern", name, self.call.wrt)
        plan, read = program.cache.get(key, (None, ()))
        if plan is None or not all(torch.equal(self.call.inputs[i], x) for i, x in read):
            opened = without_loops(lowered(program, CALLS))
            pattern, places = dependence(opened, self.call.wrt[0], self.call.inputs)
            plan = make(pattern.tocoo())
            read = [(i, self.call.inputs[i].detach().clone()) for i in places]
            program.cache[key] = plan, read
        return plan

    def values(self, plan: JacobianPlan, chunk_size: int | None) -> Tensor:
        """Return the entries, by products with sums of unit vectors, one for each colour."""
        call, x = self.call, self.x
        parts = [p for p in plan[2:] if p and p.n_products]
        from_left = [p is plan.rows for p in parts]
        seeds = [
            self.seeds(p).view(-1, *(self.shape if rows else x.shape))
            for p, rows in zip(parts, from_left, strict=True)
        ]
        sigs, (wrt,), chunk = tuple(zip(map(signature, seeds), from_left)), call.wrt, chunk_size
        make = lambda: of_derivatives(jacobian_products(call.program, wrt, sigs, chunk))
        program = call.derived((sigs, chunk), make)
        inputs = [*tensors_of(self.arguments), *seeds, *call.rec.closed_over]
        outs = execute(program, inputs)
        call.results(outs[len(parts) :])
        values = []
        for part, products, rows in zip(parts, outs, from_left, strict=False):
            if rows:
                (products,) = without_nan(program, inputs, [products])
            else:
                (products,) = attached(call.program, call.wrt, call.inputs, [products])
            products = products.reshape(part.n_products, -1)
            values.append(products[self.whole(part.product), self.whole(part.place)])
        if len(parts) < 2:
            return values[0] if values else x.new_zeros(0)
        order = np.argsort(np.concatenate([p.entries for p in parts]))
        return torch.cat(values)[self.whole(order)]

    def seeds(self, part: ColouredProducts) -> Tensor:
        """Return for each colour the sum of its unit vectors, as a row."""
        numbers = torch.arange(part.n_products, device=self.x.device)
        return (self.whole(part.colours) == numbers[:, None]).to(self.x.dtype)

    def whole(self, i: np.ndarray) -> Tensor:
        return torch.as_tensor(i.astype(np.int64), device=self.x.device)

    def sparse(self, plan: JacobianPlan, chunk_size: int | None) -> Tensor:
        values, x = self.values(plan, chunk_size), self.x
        places = torch.as_tensor(np.stack([plan.row, plan.col]).astype(np.int64), device=x.device)
        split = [
            torch.stack(torch.unravel_index(i, s)) if s else i.new_zeros(0, len(i))
            for i, s in zip(places, (self.shape, tuple(x.shape)), strict=True)
        ]
        shape = (*self.shape, *x.shape)
        return torch.sparse_coo_tensor(torch.cat(split), values, shape, check_invariants=False)

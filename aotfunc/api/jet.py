"""Taylor mode: higher derivatives along a direction, without towers of first derivatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..capture.makers import of_derivatives
from ..capture.tree import Arguments, flatten, in_order_of, structure, unflatten
from ..errors import ArgumentError
from ..runtime.execute import execute
from ..trace.entering import entry
from ..trace.tape import signature
from ..transforms.laplacian import diagonal
from ..transforms.laplacian import laplacian as laplacian_pass
from ..transforms.rules.table import total
from ..transforms.taylor import taylor
from .call import Call, like_tangent, positions, tensors_of
from .definitions import (
    diagonal_by_definition,
    ggn_by_definition,
    hvp_by_definition,
    jet_by_definition,
    laplacian_by_definition,
    validated_by,
)
from .func import grad, jvp, vjp


@validated_by(jet_by_definition)
@entry
def jet(
    func: Callable, primals: tuple, series: Sequence, *, factorial_scaled: bool = True
) -> tuple[Any, list]:
    """Return ``(output, derivatives)`` of ``func`` along a curve: ``series[i]`` lists the first,
    second, … derivative of primal ``i`` by the curve's parameter, ``derivatives`` those of the
    output.

    All lists have one length, the order; None stands for zeros. A derivative has the tree and
    shapes of its primal, or of the output. Without ``factorial_scaled`` they are coefficients of
    the Taylor polynomial, k-th derivatives divided by ``k!``. The protocol is
    ``jax.experimental.jet``'s. The cost grows with the square of the order. Raises ArgumentError
    for series unlike the primals.

    >>> x, one = torch.tensor(0.0), torch.tensor(1.0)
    >>> jet(lambda x: torch.exp(2 * x), (x,), ([one, None, None],))
    (tensor(1.), [tensor(2.), tensor(4.), tensor(8.)])
    """
    if not isinstance(primals, tuple) or not primals or len(series) != len(primals):
        raise ArgumentError(
            f"jet: series must hold a list for each primal, {structure(series)} for "
            f"{structure(primals)}"
        )
    if len(lengths := {len(terms) for terms in series}) != 1 or not (order := lengths.pop()):
        raise ArgumentError("jet: the lists in series must have one length, at least 1")
    arguments, everything = Arguments(primals, {}, func), tuple(range(len(primals)))
    chosen = positions("jet", arguments, everything)
    rows = [row for i, terms in enumerate(series) for row in by_leaf(arguments, primals, i, terms)]
    call = Call("jet", func, arguments, chosen, False)
    call.check_tensors()
    given = tuple(tuple(t is not None for t in row) for row in rows)
    base, wrt, n_out = call.program, call.wrt, call.n_out
    program = call.derived(
        (given, order, n_out), lambda: of_derivatives(taylor(base, wrt, given, order, n_out))
    )
    tangents = [
        like_tangent(t if factorial_scaled else t * math.factorial(k), arguments.leaves[i])
        for i, row in zip(chosen, rows, strict=True)
        for k, t in enumerate(row, 1)
        if t is not None
    ]
    outs = execute(program, [*tensors_of(arguments), *tangents, *call.rec.closed_over])
    (output,) = call.results(outs[: base.n_outputs])
    found: list = list(outs[base.n_outputs :])
    for i in range(n_out):
        for k in range(order):
            d = found[i * order + k]
            d = torch.zeros_like(outs[i]) if d is None else d
            found[i * order + k] = d if factorial_scaled else d / math.factorial(k + 1)
    return output, [unflatten(found[k::order], call.spec) for k in range(order)]


def by_leaf(arguments: Arguments, primals: tuple, i: int, terms: Sequence) -> list[list]:
    """Return the terms of the series of primal ``i``, for each of its leaves."""
    leaves = [arguments.leaves[k] for k in arguments.spans[i]]
    rows: list[list] = [[] for _ in leaves]
    for k, term in enumerate(terms, 1):
        flat: list = [None] * len(leaves)
        if term is not None:
            flat, spec = flatten(in_order_of(primals[i], term))
            if spec != arguments.specs[i]:
                raise ArgumentError(
                    f"jet: derivative {k} of {arguments.said(arguments.spans[i].start)} is "
                    f"{structure(term)}, which does not have the structure of its primal"
                )
        for row, x, t in zip(rows, leaves, flat, strict=True):
            if isinstance(t, Tensor) and t.shape != x.shape:
                raise ArgumentError(
                    f"jet: derivative {k} of {arguments.said(arguments.spans[i].start)} has shape "
                    f"{list(t.shape)}, and its primal {list(x.shape)}"
                )
            row.append(t)
    return rows


@validated_by(hvp_by_definition)
def hvp(f: Callable, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    """Return ``(gradient, Hessian times tangents)`` of a scalar ``f``, forward over reverse: trees
    like the primal, or tuples of them for several. Errors are those of :func:`grad` and
    :func:`jvp`.

    >>> hvp(lambda x: (x ** 3).sum(), (torch.ones(2),), (torch.tensor([1.0, 2.0]),))
    (tensor([3., 3.]), tensor([ 6., 12.]))
    """
    argnums = 0 if len(primals) == 1 else tuple(range(len(primals)))
    return jvp(grad(f, argnums), primals, tangents)


@validated_by(ggn_by_definition)
def ggn(f: Callable, loss: Callable, params: Any, tangent: Any) -> Any:
    """Return the generalised Gauss-Newton matrix of ``loss(f(params))`` times ``tangent``, a tree
    like ``params``: ``J^T H J v``, with the Jacobian ``J`` of ``f`` and the Hessian ``H`` of the
    scalar ``loss`` by its argument.

    Errors are those of :func:`jvp` and :func:`grad`. Source: Schraudolph, "Fast Curvature
    Matrix-Vector Products" (2002).

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> ggn(lambda w: x @ w, lambda y: (y ** 2).sum(), torch.zeros(2), torch.tensor([1.0, 0.0]))
    tensor([20., 28.])
    """
    output, pushed = jvp(f, (params,), (tangent,))
    _, curved = jvp(grad(loss), (output,), (pushed,))
    return vjp(f, params)[1](curved)[0]


@validated_by(diagonal_by_definition, later=True)
def diag_hessian(f: Callable, *, chunk_size: int | None = None) -> Callable:
    """Return ``diagonal(x)``, the second derivative of ``f(x)`` by each element of the tensor
    ``x`` of shape ``I``; for an output of shape ``O`` a tensor of shape ``I + O``.

    It uses Taylor mode of order 2 along ``chunk_size`` axes at a time, without the Hessian. Of a
    number it sums products of tangents, which one reverse pass weighs. Raises ArgumentError if
    ``x`` is no real tensor.

    >>> diag_hessian(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
    tensor([ 6., 12.])
    """

    @entry
    def rows(x: Tensor) -> Any:
        found, call = second_derivatives("diag_hessian", f, 0, chunk_size, diagonal, (x,), {})
        each = [torch.cat(parts).reshape(*x.shape, *parts[0].shape[1:]) for parts in found]
        return unflatten(each, call.spec)

    return rows


@validated_by(laplacian_by_definition, later=True)
def laplacian(f: Callable, argnums: int = 0, *, chunk_size: int | None = None) -> Callable:
    """Return ``sums(*args)``, the sum of the second derivatives of ``f(*args)`` by each element of
    the tensor ``args[argnums]``, in the output's tree and shapes.

    It uses Taylor mode of order 2 along ``chunk_size`` axes at a time, without the Hessian, and
    sums second derivatives before linear ops read them. Raises ArgumentError if ``args[argnums]``
    is no real tensor.

    >>> laplacian(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
    tensor(18.)
    """

    @entry
    @functools.wraps(f)
    def sums(*args: Any, **kwargs: Any) -> Any:
        found, call = second_derivatives(
            "laplacian", f, argnums, chunk_size, laplacian_pass, args, kwargs
        )
        return unflatten([functools.reduce(total, parts) for parts in found], call.spec)

    return sums


def second_derivatives(
    name: str,
    f: Callable,
    argnums: int,
    chunk_size: int | None,
    make: Callable,
    args: tuple,
    kwargs: dict,
) -> tuple[list, Call]:
    """Return what the pass ``make`` gives for each leaf of the output and ``chunk_size`` axes of
    an argument at a time, and the call."""
    arguments = Arguments(args, kwargs, f)
    chosen = positions(name, arguments, argnums)
    if len(chosen) != 1:
        raise ArgumentError(f"{name}: argument {argnums} must be a tensor")
    x = arguments.leaves[chosen[0]]
    check_real(name, arguments.said(chosen[0]), x)
    call = Call(name, f, arguments, chosen, False)
    call.check_tensors()
    base, wrt, n_out = call.program, call.wrt[0], call.n_out
    axes = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)
    chunks = axes.split(chunk_size or max(x.numel(), 1))
    found = []
    for i, rows in enumerate(chunks, 1):
        sig, writes = signature(rows), i == len(chunks)
        program = call.derived((sig, writes), partial(make, base, wrt, n_out, sig, writes))
        found.append(execute(program, [*tensors_of(arguments), rows, *call.rec.closed_over]))
    return list(zip(*found, strict=True)), call


def check_real(name: str, what: str, x: Any) -> None:
    """Check that second derivatives along the axes of ``x`` are all that it has."""
    if isinstance(x, Tensor) and x.is_complex():
        raise ArgumentError(
            f"{name}: {what} is complex; take that of lambda u, v: f(torch.complex(u, v)) by u "
            "and by v, or of a complex differentiable function hessian(f, holomorphic=True)"
        )

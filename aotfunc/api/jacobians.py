"""Whole Jacobians, by rows and by columns, and Hessians."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..capture.tree import Arguments, unflatten
from ..errors import ArgumentError
from ..runtime.anomaly import without_nan
from ..runtime.constants import attached
from ..runtime.execute import execute
from ..transforms.jacobian import jacobian_columns, jacobian_rows
from .call import Call, chosen_tree, positions
from .checks import Gradients
from .dynamo import read_by_dynamo
from .readings import jacobian, run_jacobian
from .validate import validated


@validated(Gradients)
@read_by_dynamo(jacobian, run_jacobian)
def jacrev(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    _preallocate_and_copy: bool = False,
) -> Callable:
    """Return the Jacobian by reverse mode: for each output of shape ``O`` and argument of shape
    ``I`` a tensor of shape ``O + I``.

    The result has the output's tree, with the tree of the arguments (a tuple for a tuple
    ``argnums``) in place of each leaf. ``chunk_size``: rows at a time (``_preallocate_and_copy``,
    which torch.func has for them, decides nothing). Complex inputs and outputs are refused.

    >>> jacrev(torch.sin)(torch.zeros(2))
    tensor([[1., 0.],
            [0., 1.]])
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return _jacobian("jacrev", jacobian_rows, func, argnums, has_aux, chunk_size, args, kwargs)

    return wrapper


@validated(Gradients)
@read_by_dynamo(jacobian, run_jacobian)
def jacfwd(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable:
    """Return the Jacobian by forward mode; results as in :func:`jacrev`. ``chunk_size``: columns
    at a time.

    >>> jacfwd(torch.sin)(torch.zeros(2))
    tensor([[1., 0.],
            [0., 1.]])
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return _jacobian(
            "jacfwd",
            jacobian_columns,
            func,
            argnums,
            has_aux,
            chunk_size,
            args,
            kwargs,
            randomness,
        )

    return wrapper


def hessian(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    validate: bool = False,
) -> Callable:
    """Return the Hessian, forward over reverse: ``jacfwd(jacrev(func))``; for a scalar function of
    shape ``I`` a tensor of shape ``I + I``.

    >>> hessian(lambda x: (x ** 3).sum())(torch.ones(2))
    tensor([[6., 0.],
            [0., 6.]])
    """
    inner = jacrev(func, argnums, has_aux=has_aux, chunk_size=chunk_size, validate=validate)
    return jacfwd(inner, argnums, has_aux, chunk_size=chunk_size, validate=validate)


def _jacobian(
    name: str,
    assemble: Callable,
    func: Callable,
    argnums: Any,
    has_aux: bool,
    chunk_size: int | None,
    args: tuple,
    kwargs: dict,
    randomness: str = "error",
) -> Any:
    arguments = Arguments(args, kwargs, func)
    chosen = positions(name, arguments, argnums)
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"{name}: chunk_size must be positive, not {chunk_size}")
    for k in chosen:
        if arguments.leaves[k].is_complex():
            raise ArgumentError(
                f"{name}: {arguments.said(k)} is complex; Jacobians are defined for real "
                "arguments only (use vjp or jvp)"
            )
    call = Call(name, func, arguments, chosen, has_aux)
    call.check_tensors()
    base, wrt, n_out = call.program, call.wrt, call.n_out
    for k, x in enumerate(call.rec.leaves[:n_out]):
        if x.is_complex():
            raise ArgumentError(
                f"{name}: the output{call.path(k)} is complex; Jacobians are defined for real "
                "outputs only (use vjp or jvp)"
            )
        if not x.is_floating_point():
            raise ArgumentError(
                f"{name}: the output{call.path(k)} has dtype {x.dtype}; outputs must be floating"
            )
    if not n_out:
        raise ArgumentError(f"{name}: the function returned no tensors")
    how = (n_out, chunk_size, randomness)
    program = call.derived(how, lambda: assemble(base, wrt, *how))
    outs = execute(program, call.inputs)
    if assemble is jacobian_rows:
        count = n_out * len(wrt)
        outs = (*without_nan(program, call.inputs, outs[:count]), *outs[count:])
    blocks = [outs[i * len(wrt) : (i + 1) * len(wrt)] for i in range(n_out)]
    if assemble is jacobian_columns:
        columns = [attached(base, wrt, call.inputs, c) for c in zip(*blocks, strict=True)]
        blocks = [*zip(*columns, strict=True)]
    result = unflatten([chosen_tree(arguments, argnums, block) for block in blocks], call.spec)
    _, *aux = call.results(outs[n_out * len(wrt) :], n_out)
    return (result, *aux) if has_aux else result

"""Whole Jacobians, by rows and by columns, and Hessians."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..capture.makers import of_derivatives
from ..capture.tree import Arguments, unflatten
from ..errors import ArgumentError
from ..runtime.anomaly import without_nan
from ..runtime.constants import attached
from ..runtime.execute import execute
from ..trace.shapes.sig import floating
from ..transforms.jacobian import jacobian_columns, jacobian_rows
from .call import Call, chosen_tree, positions
from .checks import Gradients
from .dynamo import read_by_dynamo
from .jet import diag_hessian
from .readings import jacobian, run_jacobian
from .sparse import hessian_blocks, sparse_hessian
from .validated import validated


@validated(Gradients)
@read_by_dynamo(jacobian, run_jacobian)
def jacrev(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    holomorphic: bool = False,
    _preallocate_and_copy: bool = False,
) -> Callable:
    """Return the Jacobian by reverse mode: for each output of shape ``O`` and argument of shape
    ``I`` a tensor of shape ``O + I``.

    The result has the output's tree, with the tree of the arguments (a tuple for a tuple
    ``argnums``) in place of each leaf. ``chunk_size``: rows at a time (``_preallocate_and_copy``,
    which torch.func has for them, decides nothing).

    With ``holomorphic`` arguments and outputs are complex, and the entries are the derivatives of
    a function that has one in the complex plane (``z * z``, not ``z.abs()``), as in JAX. Raises
    ArgumentError for complex tensors without it, whose Jacobian would need two entries for each
    (``vjp`` and ``jvp`` take them), and for tensors that are not floating.

    >>> jacrev(torch.sin)(torch.zeros(2))
    tensor([[1., 0.],
            [0., 1.]])
    >>> jacrev(lambda z: z * z, holomorphic=True)(torch.tensor(1 + 2j))
    tensor(2.+4.j)
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        how = Options("jacrev", jacobian_rows, argnums, has_aux, chunk_size, holomorphic)
        return _jacobian(how, func, args, kwargs)

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
    holomorphic: bool = False,
) -> Callable:
    """Return the Jacobian by forward mode; results, complex ones and errors as in :func:`jacrev`.
    ``chunk_size``: columns at a time.

    >>> jacfwd(torch.sin)(torch.zeros(2))
    tensor([[1., 0.],
            [0., 1.]])
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        how = Options(
            "jacfwd", jacobian_columns, argnums, has_aux, chunk_size, holomorphic, randomness
        )
        return _jacobian(how, func, args, kwargs)

    return wrapper


def hessian(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    holomorphic: bool = False,
    structure: str | None = None,
    validate: bool = False,
) -> Callable:
    """Return the Hessian, forward over reverse: ``jacfwd(jacrev(func))``; for a scalar function of
    shape ``I`` a tensor of shape ``I + I``. ``holomorphic`` as in :func:`jacrev`.

    ``structure``: the entries to compute, for one tensor argument: "diagonal", of shape ``I`` (by
    Taylor mode, as :func:`diag_hessian`); "blocks", the square blocks of the slices along its
    first dimension, ``[B, *I]``, of shape ``[B, *I, *I]``; "sparse", those that the graph has, as
    a sparse tensor (:func:`sparse_hessian`). No structure is assumed: these are entries of any
    Hessian. The last two raise CaptureError inside of other transforms, as they look at values;
    ArgumentError for another ``structure``.

    >>> hessian(lambda x: (x ** 3).sum())(torch.ones(2))
    tensor([[6., 0.],
            [0., 6.]])
    """
    if structure is not None:
        if structure not in STRUCTURES:
            raise ArgumentError(f"hessian: structure must be one of {', '.join(STRUCTURES)}")
        if has_aux or holomorphic or validate or not isinstance(argnums, int):
            raise ArgumentError(
                f"hessian(structure={structure!r}) is by one real argument, and excludes has_aux, "
                "holomorphic and validate"
            )
        return STRUCTURES[structure](func, argnums, chunk_size=chunk_size)
    how = {"chunk_size": chunk_size, "holomorphic": holomorphic, "validate": validate}
    return jacfwd(jacrev(func, argnums, has_aux=has_aux, **how), argnums, has_aux, **how)


def hessian_diagonal(func: Callable, argnums: int, *, chunk_size: int | None) -> Callable:
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(args, kwargs, func)
        (k, *others) = positions("hessian", arguments, argnums)
        x = arguments.leaves[k]
        if others or x.is_complex():
            raise ArgumentError(f"hessian: argument {argnums} must be one real tensor")

        def of_x(x: Tensor) -> Any:
            leaves = [*arguments.leaves[:k], x, *arguments.leaves[k + 1 :]]
            given, named = arguments.rebuilt(leaves)
            return func(*given, **named)

        return diag_hessian(of_x, chunk_size=chunk_size)(x)

    return wrapper


STRUCTURES: dict[str, Callable] = {
    "diagonal": hessian_diagonal,
    "blocks": hessian_blocks,
    "sparse": sparse_hessian,
}


class Options(NamedTuple):
    name: str
    assemble: Callable
    argnums: Any
    has_aux: bool
    chunk_size: int | None
    holomorphic: bool
    randomness: str = "error"

    def check(self, what: str, x: Any) -> None:
        """Check that an argument or output is real, or complex for a holomorphic function."""
        if x.is_complex() and not self.holomorphic:
            raise ArgumentError(
                f"{self.name}: {what} is complex; say holomorphic=True if the function is "
                "complex differentiable, and use vjp or jvp for any other"
            )
        if self.holomorphic and not x.is_complex():
            raise ArgumentError(
                f"{self.name}(holomorphic=True): {what} has dtype {x.dtype}; the derivative of a "
                "holomorphic function is one by complex arguments, of complex outputs"
            )


def _jacobian(how: Options, func: Callable, args: tuple, kwargs: dict) -> Any:
    name, assemble, argnums, has_aux, chunk_size, *_ = how
    arguments = Arguments(args, kwargs, func)
    chosen = positions(name, arguments, argnums)
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"{name}: chunk_size must be positive, not {chunk_size}")
    for k in chosen:
        how.check(arguments.said(k), arguments.leaves[k])
    call = Call(name, func, arguments, chosen, has_aux)
    call.check_tensors()
    base, wrt, n_out = call.program, call.wrt, call.n_out
    for k, x in enumerate(call.rec.leaves[:n_out]):
        how.check(f"the output{call.path(k)}", x)
        if not floating(x):
            raise ArgumentError(
                f"{name}: the output{call.path(k)} has dtype {x.dtype}; outputs must be floating"
            )
    if not n_out:
        raise ArgumentError(f"{name}: the function returned no tensors")
    sizes = (n_out, chunk_size, how.randomness)
    program = call.derived(sizes, lambda: of_derivatives(assemble(base, wrt, *sizes)))
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

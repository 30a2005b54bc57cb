"""Differentiate functions that an equation defines by that equation, whatever solves it.

Formulas: implicit function theorem, as in Blondel et al., "Efficient and Modular Implicit
Differentiation" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..capture.tree import Arguments, flatten, structure
from ..errors import ArgumentError
from ..graph import dependents
from ..trace.entering import entry
from ..trace.nested import with_items
from ..trace.shapes.sig import floating
from ..transforms.jvp import jvp as jvp_pass
from .call import Call, positions
from .custom import custom_vjp
from .func import jvp, vjp
from .shapes import closure_convert

Solve = Callable[[Callable, Any], Any]


@entry
def custom_root(
    f: Callable, guess: Any, solve: Solve, tangent_solve: Solve, has_aux: bool = False
) -> Any:
    """Return the ``x`` that ``solve(f, guess)`` finds with ``f(x) = 0``, differentiable with
    respect to all that ``f`` closes over.

    ``x`` and ``f(x)`` have the tree of ``guess``. ``tangent_solve(g, y)`` solves ``g(x) = y`` for
    the linear ``g``, the Jacobian of ``f`` at the root or its transpose. ``solve`` is not
    differentiated, and the guess has no derivative. With ``has_aux`` ``solve`` returns
    ``(x, aux)``, and so does this, with any tree, which has no derivative. The protocol is
    ``jax.lax.custom_root``'s; it works under every transform and to any order. Raises
    ArgumentError if ``f(x)`` has another structure than ``x``.

    >>> def newton(f, x):
    ...     for _ in range(10):
    ...         value, slope = jvp(f, (x,), (torch.ones_like(x),))
    ...         x = x - value / slope
    ...     return x
    >>> def root(a):
    ...     invert = lambda g, y: y / g(torch.ones_like(y))
    ...     return custom_root(lambda x: x**2 - a, torch.tensor(1.0), newton, invert)
    >>> from aotfunc import grad
    >>> root(torch.tensor(4.0)), grad(root)(torch.tensor(4.0))
    (tensor(2.), tensor(0.2500))
    """
    pure, tensors = closure_convert(f, guess)
    return _root(pure, solve, tangent_solve, guess, has_aux, *tensors)


@custom_vjp(nondiff_argnums=(0, 1, 2, 3, 4))
def _root(
    pure: Callable,
    solve: Solve,
    tangent_solve: Solve,
    guess: Any,
    has_aux: bool,
    *tensors: Tensor,
) -> Any:
    with torch.no_grad():
        found = solve(lambda x: check_structure("custom_root", x, pure(x, *tensors)), guess)
    return check_aux("custom_root", found, has_aux)


def _root_forward(
    pure: Callable,
    solve: Solve,
    tangent_solve: Solve,
    guess: Any,
    has_aux: bool,
    *tensors: Tensor,
) -> Any:
    found = _root.f(pure, solve, tangent_solve, guess, has_aux, *tensors)
    return found, (found[0] if has_aux else found, tensors)


def _root_backward(
    pure: Callable,
    solve: Solve,
    tangent_solve: Solve,
    guess: Any,
    has_aux: bool,
    residuals: Any,
    cotangent: Any,
) -> tuple:
    x, tensors = residuals
    cotangent = cotangent[0] if has_aux else cotangent
    pull_x = vjp(lambda x: pure(x, *tensors), x)[1]
    w = custom_linear_solve(lambda u: pull_x(u)[0], cotangent, tangent_solve, tangent_solve)
    return tuple(gradients_of(lambda *tensors: pure(x, *tensors), tensors, tree_map(torch.neg, w)))


_root.defvjp(_root_forward, _root_backward)


@entry
def custom_linear_solve(
    matvec: Callable,
    b: Any,
    solve: Solve,
    transpose_solve: Solve | None = None,
    symmetric: bool = False,
    has_aux: bool = False,
) -> Any:
    """Return the ``x`` that ``solve(matvec, b)`` finds with ``matvec(x) = b``, differentiable with
    respect to ``b`` and all that ``matvec`` closes over.

    ``matvec`` is linear; ``x`` has the tree of ``b``. ``transpose_solve(vecmat, b)`` solves with
    the transpose, for reverse mode; with ``symmetric`` (Hermitian) it is ``solve``. The solvers
    are not differentiated. With ``has_aux`` both return ``(x, aux)``, and so does this, with any
    tree, which has no derivative. The protocol is ``jax.lax.custom_linear_solve``'s. Raises
    ArgumentError in reverse mode without ``transpose_solve`` and ``symmetric``.

    >>> a = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    >>> def solve(matvec, b):  # any solver: here by the matrix
    ...     return torch.linalg.solve(jacfwd(matvec)(b), b)
    >>> from aotfunc import grad, jacfwd
    >>> x = lambda b: custom_linear_solve(lambda v: a @ v, b, solve, solve)
    >>> x(torch.ones(2)), grad(lambda b: x(b).sum())(torch.ones(2))
    (tensor([0.3750, 0.2500]), tensor([0.5000, 0.1250]))
    """
    pure, tensors = closure_convert(matvec, b)
    back = solve if symmetric else transpose_solve
    return _solution(pure, solve, back, symmetric, has_aux, b, *tensors)


@custom_vjp(nondiff_argnums=(0, 1, 2, 3, 4))
def _solution(
    pure: Callable,
    solve: Solve,
    back: Solve | None,
    symmetric: bool,
    has_aux: bool,
    b: Any,
    *tensors: Tensor,
) -> Any:
    with torch.no_grad():
        found = solve(lambda x: check_structure("custom_linear_solve", x, pure(x, *tensors)), b)
    return check_aux("custom_linear_solve", found, has_aux)


def _solution_forward(
    pure: Callable,
    solve: Solve,
    back: Solve | None,
    symmetric: bool,
    has_aux: bool,
    b: Any,
    *tensors: Tensor,
) -> Any:
    found = _solution.f(pure, solve, back, symmetric, has_aux, b, *tensors)
    return found, (found[0] if has_aux else found, tensors)


def _solution_backward(
    pure: Callable,
    solve: Solve,
    back: Solve | None,
    symmetric: bool,
    has_aux: bool,
    residuals: Any,
    ct: Any,
) -> tuple:
    x, tensors = residuals
    ct = ct[0] if has_aux else ct
    if back is None:
        raise ArgumentError(
            "custom_linear_solve: reverse mode solves with the transpose: give transpose_solve, "
            "or symmetric=True"
        )
    transposed = vjp(lambda x: pure(x, *tensors), ct)[1]
    there = (lambda x: pure(x, *tensors)) if symmetric else (lambda u: transposed(u)[0])
    w = custom_linear_solve(there, ct, back, solve, symmetric, has_aux)
    w = w[0] if has_aux else w
    return w, *gradients_of(lambda *tensors: pure(x, *tensors), tensors, tree_map(torch.neg, w))


def _solution_tangents(
    pure: Callable,
    solve: Solve,
    back: Solve | None,
    symmetric: bool,
    has_aux: bool,
    primals: Any,
    tangents: Any,
) -> tuple:
    (_, *tensors), (tangent, *changes) = primals, tangents
    found = _solution(pure, solve, back, symmetric, has_aux, *primals)
    x = found[0] if has_aux else found
    places = [i for i, t in enumerate(changes) if t is not None]
    if places:
        moved = jvp(
            of_some(lambda *tensors: pure(x, *tensors), tensors, places),
            tuple(tensors[i] for i in places),
            tuple(changes[i] for i in places),
        )[1]
        tangent = tree_map(torch.sub, tangent, moved)
    there = lambda x: pure(x, *tensors)
    moved = custom_linear_solve(there, tangent, solve, back, symmetric, has_aux)
    return found, (moved[0], tree_map(lambda _: None, found[1])) if has_aux else moved


_solution.defvjp(_solution_forward, _solution_backward)
_solution.defjvp(_solution_tangents)


def gradients_of(f: Callable, tensors: Sequence[Tensor], cotangent: Any) -> list[Tensor | None]:
    """Return the gradients of ``f(*tensors)`` with respect to the tensors that have one."""
    places = [i for i, t in enumerate(tensors) if floating(t)]
    grads: list[Tensor | None] = [None] * len(tensors)
    if places:
        pull = vjp(of_some(f, tensors, places), *[tensors[i] for i in places])[1]
        for i, g in zip(places, pull(cotangent), strict=True):
            grads[i] = g
    return grads


def of_some(f: Callable, tensors: Sequence[Tensor], places: Sequence[int]) -> Callable:
    """Return ``f(*tensors)`` as a function of the tensors at these places."""

    def call(*some: Tensor) -> Any:
        return f(*with_items(tensors, places, some))

    return call


def check_aux(name: str, found: Any, has_aux: bool) -> Any:
    """Return what a solver returns, which is ``(x, aux)`` with ``has_aux``."""
    if has_aux and not (isinstance(found, tuple) and len(found) == 2):
        raise ArgumentError(
            f"{name}(has_aux=True): the solver must return (x, aux), not {structure(found)}"
        )
    return found


def check_structure(name: str, x: Any, value: Any) -> Any:
    """Return ``value``, which must have the structure of ``x``."""
    if flatten(value)[1] != flatten(x)[1]:
        raise ArgumentError(
            f"{name}: the function of {structure(x)} returns {structure(value)}: they must have "
            "one structure"
        )
    return value


@entry
def linear_transpose(f: Callable, *primals: Any) -> Callable:
    """Return the transpose of a linear ``f``, for arguments like ``primals``, whose values are not
    used: ``transposed(cotangents)`` is a tuple with a tree like each primal.

    Of complex functions it is the adjoint, conjugated as all of PyTorch's cotangents. Raises
    ArgumentError if the derivative of ``f`` depends on the primals. (A constant that ``f`` adds to
    a linear map has no derivative, and is ignored.)

    >>> a = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> linear_transpose(lambda x: a @ x, torch.ones(2))(torch.tensor([1.0, 0.0]))
    (tensor([1., 2.]),)
    """
    arguments, every = Arguments(primals, {}, f), tuple(range(len(primals)))
    call = Call(
        "linear_transpose", f, arguments, positions("linear_transpose", arguments, every), False
    )
    call.check_tensors()
    program, wrt = call.program, call.wrt
    pushed = call.derived((), lambda: jvp_pass(program, wrt, zeros=False))
    moved = dependents(pushed.graph, [pushed.placeholders[i] for i in wrt])
    if not moved.isdisjoint(pushed.outputs[program.n_outputs :]):
        raise ArgumentError("linear_transpose: the function is not linear in its arguments")
    return vjp(f, *primals)[1]

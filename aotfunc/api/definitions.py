"""Say what ``hvp``, ``jet`` and their kind are by other transforms. ``validate=True`` validates
these, and compares the first result with theirs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from math import factorial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ValidationError
from ..trace.entering import entry
from ..trace.nested import with_items
from ..trace.shapes.sig import floating
from .func import grad, jvp, vjp
from .rehearse import rehearsed
from .validated import check_outermost

#: how many derivatives of a jet are compared: forward mode in forward mode grows with each
ORDERS = 3


def validated_by(definition: Callable, later: bool = False) -> Callable:
    """Make a decorator that adds the option ``validate``: the first result is compared with that
    of ``definition``, which takes the same arguments (``later``: and returns a function, too)."""

    def decorate(transform: Callable) -> Callable:
        name, own = transform.__name__, inspect.signature(transform)

        @functools.wraps(transform)
        def make(*args: Any, validate: bool = False, **options: Any) -> Any:
            if not validate:
                return transform(*args, **options)
            if not later:
                return entry(compared)(name, transform, definition, args, options)
            made, meant = transform(*args, **options), definition(*args, **options)

            @entry
            @functools.wraps(made)
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal meant
                if meant is None:
                    return made(*args, **kwargs)
                result, meant = compared(name, made, meant, args, kwargs), None
                return result

            return call

        option = inspect.Parameter("validate", inspect.Parameter.KEYWORD_ONLY, default=False)
        parameters = [*own.parameters.values(), option]
        make.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return make

    return decorate


def compared(name: str, made: Callable, meant: Callable, args: tuple, kwargs: dict) -> Any:
    """Return the result of ``made``, compared with that of ``meant``."""
    check_outermost(name)
    with rehearsed():
        found = meant(*args, **kwargs)
    want, project = found if isinstance(found, Expected) else (found, lambda result: result)
    return same(name, made(*args, **kwargs), want, project)


class Expected(NamedTuple):
    """What is expected, and the projection of the result that is to be it."""

    want: Any
    project: Callable


def same(name: str, result: Any, want: Any, project: Callable) -> Any:
    """Return the result, whose projection must be as wanted up to rounding."""
    with torch.no_grad():
        for x, y in zip(tree_leaves(project(result)), tree_leaves(want), strict=True):
            if not floating(y):
                continue
            eps, largest = torch.finfo(y.dtype).eps, float(y.abs().max()) if y.numel() else 0.0
            noise = eps**0.5 * largest + (1e-7 if eps < 1e-10 else 1e-5)
            apart = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs())
            if x.shape != y.shape or (apart > noise).any():
                raise ValidationError(
                    f"{name}(validate=True): the result differs from that by first derivatives, "
                    f"which are autograd's, by {float(apart.max()):.2g}; numbers up to "
                    f"{largest:.2g} are rounded by {noise:.2g}"
                )
    return result


def hvp_by_definition(f: Callable, primals: tuple, tangents: tuple) -> Any:
    argnums = 0 if len(primals) == 1 else tuple(range(len(primals)))
    return jvp(grad(f, argnums), primals, tangents, validate=True)


def ggn_by_definition(f: Callable, loss: Callable, params: Any, tangent: Any) -> Any:
    output, pushed = jvp(f, (params,), (tangent,), validate=True)
    _, curved = jvp(grad(loss), (output,), (pushed,), validate=True)
    return vjp(f, params, validate=True)[1](curved)[0]


def jet_by_definition(
    func: Callable, primals: tuple, series: Sequence, *, factorial_scaled: bool = True
) -> Any:
    """Return the value and the first :data:`ORDERS` derivatives by the curve's parameter."""
    order = min(len(series[0]), ORDERS)

    def along(t: Tensor) -> Any:
        def moved(x: Tensor, *terms: Tensor) -> Tensor:
            scale = lambda k: factorial(k) if factorial_scaled else 1
            return x + sum(s * (t**k / scale(k)).to(s.dtype) for k, s in enumerate(terms, 1))

        def on_curve(x: Any, row: Sequence) -> Any:
            zeros = tree_map(torch.zeros_like, x)
            return tree_map(moved, x, *[zeros if s is None else s for s in row])

        return func(*map(on_curve, primals, series))

    real = [x.real.dtype for x in tree_leaves(primals) if floating(x)]
    t = torch.zeros((), dtype=functools.reduce(torch.promote_types, real))
    one, g, found = torch.ones_like(t), along, []
    for k in range(1, order + 1):
        d, scale = jvp(g, (t,), (one,), validate=True)[1], 1 if factorial_scaled else factorial(k)
        found.append(tree_map(lambda x, scale=scale: x / scale, d))
        g = functools.partial(pushed_along, g, one)
    return Expected((along(t), found), lambda result: (result[0], result[1][:order]))


def pushed_along(f: Callable, d: Tensor, x: Tensor) -> Any:
    return jvp(f, (x,), (d,))[1]


def twice_along(f: Callable, x: Tensor) -> list:
    """Return the second derivatives along each axis, those along one direction validated."""
    d = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
    jvp(functools.partial(pushed_along, f, d), (x,), (d,), validate=True)
    axes = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)
    return [jvp(functools.partial(pushed_along, f, e), (x,), (e,))[1] for e in axes]


def laplacian_by_definition(f: Callable, argnums: int = 0, **_: Any) -> Callable:
    def sums(*args: Any, **kwargs: Any) -> Any:
        of_one = lambda x: f(*with_items(args, [argnums], [x]), **kwargs)
        return tree_map(lambda *ds: sum(ds), *twice_along(of_one, args[argnums]))

    return sums


def diagonal_by_definition(f: Callable, **_: Any) -> Callable:
    def rows(x: Tensor) -> Any:
        of_leaf = lambda *ds: torch.stack(ds).reshape(*x.shape, *ds[0].shape)
        return tree_map(of_leaf, *twice_along(f, x))

    return rows


def product_with_jacobian(f: Callable, argnums: int = 0, **_: Any) -> Callable:
    """Return a function that returns products with the Jacobian from both sides."""

    def jacobian(*args: Any, **kwargs: Any) -> Any:
        x, of_one = args[argnums], lambda x: f(*with_items(args, [argnums], [x]), **kwargs)
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        y, pushed = jvp(of_one, (x,), (v,), validate=True)
        w = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
        [pulled] = vjp(of_one, x, validate=True)[1](w)

        def both(found: Tensor) -> tuple:
            found = found.coalesce()
            entries, values = found.indices(), found.values()
            at = lambda z, i: z[tuple(i)]
            rows, columns = entries[: y.dim()], entries[y.dim() :]
            put = lambda z, i, values: torch.zeros_like(z).index_put(tuple(i), values, True)
            return put(y, rows, values * at(v, columns)), put(x, columns, values * at(w, rows))

        return Expected((pushed, pulled), both)

    return jacobian


def product_with_hessian(f: Callable, argnums: int = 0, **options: Any) -> Callable:
    return product_with_jacobian(grad(f, argnums), argnums, **options)

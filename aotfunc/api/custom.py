"""Functions with the user's rules: ``custom_vjp``, ``custom_jvp``, ``custom_vmap``."""

from __future__ import annotations

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_map_only

from ..capture.autograd_function import takes_as_given
from ..capture.custom_batching import closed_over
from ..capture.custom_function import CustomRules
from ..capture.tree import structure
from ..debug import outside_dynamo
from ..errors import ArgumentError
from ..trace.entering import entry
from ..trace.traced import current
from .func import functionalize

#: what Dynamo's graph calls for a call of each custom function, which it does not look into
_in_graph: weakref.WeakSet[Callable] = weakref.WeakSet()

_SYMBOLS: dict[type, Callable] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def prepare_custom() -> None:
    """Make calls of custom functions nodes of Dynamo's graphs. Dynamo calls this."""
    for call in [*_in_graph]:
        torch.compiler.allow_in_graph(call)


prepare_custom._dynamo_marked_constant = True  # type: ignore[attr-defined]


def leaf_numbers(x: Any, leaves: list) -> Any:
    """Return a tree with the numbers of its leaves in their place, and append these. Values of
    other classes than the plain ones are leaves, which Dynamo knows or refuses."""
    if x.__class__ is dict and all([isinstance(k, str | int) for k in x]):
        return {k: leaf_numbers(v, leaves) for k, v in x.items()}
    if x.__class__ in (tuple, list):
        return x.__class__([leaf_numbers(v, leaves) for v in x])
    leaves.append(x)
    return len(leaves) - 1


def fixed(x: Any) -> Any:
    """Return a number for a symbol of Dynamo's, or a tensor of a size: it guards on them."""
    if x.__class__ in _SYMBOLS:
        return _SYMBOLS[x.__class__](x)
    place = (*x.shape, *x.stride(), x.storage_offset()) if x.layout is torch.strided else ()
    if not any([isinstance(n, torch.SymInt) for n in place]):
        return x
    return x.as_strided([*map(int, x.shape)], [*map(int, x.stride())], int(x.storage_offset()))


def at_path(tree: Any, path: tuple[int, ...], asked: str, i: int) -> Any:
    """Return the "type", "size" or i-th "key" at a path, or a leaf's "number", as a literal."""
    for k in path:
        tree = [*tree.values()][k] if isinstance(tree, dict) else tree[k]
    if asked == "type":
        return type(tree).__name__
    if asked == "key":
        return [*tree][i]
    return len(tree) if asked == "size" else tree


def with_leaves(at: Callable, leaves: tuple, path: tuple[int, ...] = ()) -> Any:
    """Return the result with these leaves."""
    kind = at(path, "type")
    if kind == "int":
        return leaves[at(path, "number")]
    parts = [with_leaves(at, leaves, (*path, i)) for i in range(at(path, "size"))]
    if kind == "dict":
        return {at(path, "key", i): parts[i] for i in range(len(parts))}
    return tuple(parts) if kind == "tuple" else parts


class CustomFunction(CustomRules):
    """A function with rules of its own. :func:`custom_vjp`, :func:`custom_jvp` and
    :func:`custom_vmap` make it; each takes all rules: ``defvjp``, ``defjvp``, ``def_vmap``."""

    def __init__(self, f: Callable, places: tuple[int, ...]) -> None:
        functools.update_wrapper(self, f)
        super().__init__(f, places)
        self.prepare_call()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.prepare_call()

    def prepare_call(self) -> None:
        """Make the function that Dynamo's graph calls. It does not keep this one alive."""
        last = threading.local()  # another thread may run a call while Dynamo looks at this one
        mine = weakref.ref(self)

        def call(*args: Any, **kwargs: Any) -> tuple:
            leaves: list = []
            args, kwargs = tree_map_only((Tensor, *_SYMBOLS), fixed, (args, kwargs))
            last.form = leaf_numbers(mine()._recorded(*args, **kwargs), leaves)  # type: ignore
            return tuple(leaves)

        def at(path: tuple[int, ...], asked: str, i: int = 0) -> Any:
            return at_path(last.form, path, asked, i)

        def closes() -> bool:
            one = mine()
            rules = one and (one.f, one.forward, one.backward, one.tangents_of, one.batched)
            return any([closed_over(rule) for rule in rules or () if rule is not None])

        at._dynamo_marked_constant = True  # type: ignore[attr-defined]
        closes._dynamo_marked_constant = True  # type: ignore[attr-defined]
        self.in_graph, self.at, self.closes = call, at, closes
        _in_graph.add(call)

    def __repr__(self) -> str:
        return f"<custom function {self.__name__}>"

    def __get__(self, owner: Any, cls: type | None = None) -> Any:
        return self if owner is None else types.MethodType(self, owner)

    def defvjp(self, fwd: Callable, bwd: Callable, symbolic_zeros: bool = False) -> None:
        """State the reverse mode: ``fwd(*args) -> (output, residuals)``, ``bwd(*fixed, residuals,
        cotangents) -> gradients``, a tuple with one for each argument that is not fixed, None for
        zero.

        The cotangents have the output's tree; None stands for an output without a cotangent, and
        with ``symbolic_zeros`` for zeros, too. Residuals are any tree. Higher orders differentiate
        ``fwd``, and without ``defjvp`` forward mode is the transpose of ``bwd``, which is refused
        (CaptureError) if ``bwd`` is not linear in the cotangents."""
        self.forward, self.backward = fwd, bwd
        self.symbolic_zeros = symbolic_zeros

    def defjvp(self, jvp: Callable) -> Callable:
        """State the forward mode: ``jvp(*fixed, primals, tangents) -> (output, output tangents)``;
        both are tuples over the arguments that are not fixed. A tangent is None if its argument is
        no floating tensor; a returned one may be None for zero. Without ``defvjp`` reverse mode is
        the transpose."""
        self.tangents_of = jvp
        return jvp

    def def_vmap(self, rule: Callable) -> Callable:
        """State the batching: ``rule(size, in_batched, *args) -> (output, out_batched)``.
        ``in_batched`` and ``out_batched`` are trees of bools like the arguments and the output; a
        batched tensor has its batch in dimension 0. Tensors that the rule closes over, by
        variables, are the same for all samples."""
        self.batched = rule
        return rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.backward is None and self.tangents_of is None and self.batched is None:
            raise ArgumentError(
                f"{self.__name__} has no rules yet: call its defvjp, defjvp or def_vmap"
            )
        if is_dynamo_compiling() and not self.closes():  # Dynamo's graph would keep the tensors
            prepare_custom()
            leaves = self.in_graph(*args, **kwargs)
            return with_leaves(self.at, leaves)
        return self._recorded(*args, **kwargs)

    @outside_dynamo
    def _recorded(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not takes_as_given(self.f, args):
            args = positional(self.f, args, kwargs)
        if self.places and self.places[-1] >= len(args):
            raise ArgumentError(
                f"nondiff_argnums={self.places}: {self.__name__} got {len(args)} arguments"
            )
        if current() is not None:
            return self.record(*args)
        return self._alone(*args)

    @entry
    def _alone(self, *args: Any) -> Any:
        """Capture and run a call outside of all transforms, differentiable by autograd."""
        return functionalize(self.record)(*args)


def positional(f: Callable, args: tuple, kwargs: dict) -> tuple:
    """Return all arguments by position, defaults included."""
    try:
        signature = inspect.signature(f)
    except ValueError:  # a builtin function has none
        if kwargs:
            raise
        return args
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise ArgumentError(
            f"{getattr(f, '__name__', f)}: a function with rules takes no keyword-only arguments, "
            f"and got {structure(bound.kwargs)}"
        )
    return bound.args


def custom(
    f: Callable | None,
    nondiff_argnums: int | tuple[int, ...],
    nondiff_argnames: str | tuple[str, ...],
) -> Any:
    if f is None:
        return lambda f: custom(f, nondiff_argnums, nondiff_argnames)
    names = (nondiff_argnames,) if isinstance(nondiff_argnames, str) else nondiff_argnames
    places = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else nondiff_argnums
    if any(i < 0 for i in places):
        raise ArgumentError(f"nondiff_argnums={nondiff_argnums!r}: positions count from 0")
    parameters = list(inspect.signature(f).parameters) if names else []
    if unknown := [name for name in names if name not in parameters]:
        raise ArgumentError(
            f"nondiff_argnames={nondiff_argnames!r}: {unknown[0]!r} is no parameter of "
            f"{getattr(f, '__name__', f)}"
        )
    made = f if isinstance(f, CustomFunction) else CustomFunction(f, ())
    made.places = tuple(sorted({*made.places, *places, *map(parameters.index, names)}))
    return made


def custom_vjp(
    f: Callable | None = None,
    *,
    nondiff_argnums: int | tuple[int, ...] = (),
    nondiff_argnames: str | tuple[str, ...] = (),
) -> Any:
    """Return ``f`` with a reverse mode of your own, see :meth:`CustomFunction.defvjp`; the
    protocol is JAX's.

    Arguments and results are trees. Those named in ``nondiff_argnums`` or ``nondiff_argnames``
    have no derivative, may be any Python values, and come first in ``bwd``. Raises CaptureError if
    ``f`` closes over a tensor that requires grad, which has no rule, ArgumentError if a rule
    returns another structure.

    >>> import torch
    >>> from aotfunc import grad
    >>> @custom_vjp
    ... def clipped(x):
    ...     return x.sin()
    >>> clipped.defvjp(lambda x: (x.sin(), x.cos()), lambda cos, g: ((g * cos).clamp(-0.1, 0.1),))
    >>> grad(lambda x: clipped(x).sum())(torch.zeros(2))
    tensor([0.1000, 0.1000])
    """
    return custom(f, nondiff_argnums, nondiff_argnames)


def custom_jvp(
    f: Callable | None = None,
    *,
    nondiff_argnums: int | tuple[int, ...] = (),
    nondiff_argnames: str | tuple[str, ...] = (),
) -> Any:
    """Return ``f`` with a forward mode of your own, see :meth:`CustomFunction.defjvp`, transposed
    for reverse mode; otherwise as :func:`custom_vjp`.

    >>> import torch
    >>> from aotfunc import grad
    >>> @custom_jvp
    ... def log1pexp(x):
    ...     return torch.log1p(torch.exp(x))
    >>> @log1pexp.defjvp
    ... def rule(primals, tangents):
    ...     (x,), (t,) = primals, tangents
    ...     return log1pexp(x), t * (1 - 1 / (1 + torch.exp(x)))
    >>> grad(log1pexp)(torch.tensor(100.0))
    tensor(1.)
    """
    return custom(f, nondiff_argnums, nondiff_argnames)


def custom_vmap(f: Callable | None = None) -> Any:
    """Return ``f`` with a batching rule of your own, see :meth:`CustomFunction.def_vmap`. Its
    derivative is that of ``f``, under ``vmap`` that of the rule, unless derivatives are stated,
    too.

    >>> import torch
    >>> from aotfunc import vmap
    >>> @custom_vmap
    ... def solve(a, b):
    ...     return torch.linalg.solve(a, b)
    >>> @solve.def_vmap
    ... def rule(size, in_batched, a, b):
    ...     if in_batched == [False, True]:  # one matrix, many right hand sides
    ...         return torch.linalg.solve(a, b.mT).mT, True
    ...     return vmap(torch.linalg.solve, [0 if yes else None for yes in in_batched])(a, b), True
    >>> vmap(solve, (None, 0))(2 * torch.eye(2), torch.ones(3, 2)).shape
    torch.Size([3, 2])
    """
    return custom(f, (), ())

"""One call of a transform: its differentiated leaves, the recording of the function on
them, and its results as trees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ..capture.capture import capture, parameter_names
from ..capture.instances import flatten_tree
from ..capture.tree import Arguments, flatten, in_order_of, leaf_paths, structure, unflatten
from ..debug import where_defined
from ..errors import ArgumentError
from ..runtime.aliasing import change_in_place, ops_in_place
from ..trace.nested import with_items
from ..trace.shapes.sig import floating
from ..trace.tape import signature
from ..transforms.jvp import tangent_sig


def positions(name: str, args: Arguments, argnums: int | tuple[int, ...]) -> list[int]:
    """Return the leaf positions of the differentiated arguments. Raises ArgumentError for a leaf
    that is no floating or complex tensor."""
    count = len(args.spans)
    if args.flat and type(argnums) is int and 0 <= argnums < count:
        if floating(args.leaves[argnums]):
            return [argnums]
    if not isinstance(argnums, int) and not (
        isinstance(argnums, tuple) and all(isinstance(i, int) for i in argnums)
    ):
        raise ArgumentError(f"{name}: argnums must be an int or a tuple of ints, not {argnums!r}")
    chosen = (argnums,) if isinstance(argnums, int) else argnums
    if not chosen:
        raise ArgumentError(f"{name}: argnums is empty")
    found = []
    for i in chosen:
        if not -count <= i < count:
            raise ArgumentError(
                f"{name}: argnums={argnums}, but there are {count} positional arguments"
            )
        for k in args.spans[i]:
            if not floating(args.leaves[k]):
                raise not_differentiable(name, args.leaves[k], args.said(k))
            found.append(k)
    if len({i % count for i in chosen}) != len(chosen):
        raise ArgumentError(f"{name}: argnums={argnums} names an argument twice")
    return found


def all_positions(name: str, args: Arguments) -> list[int]:
    """Return the leaf positions of all arguments. Raises as :func:`positions`."""
    for x in args.leaves:
        if not floating(x):
            return positions(name, args, tuple(range(len(args.spans))))
    return [*range(len(args.leaves))]


def not_differentiable(name: str, x: Any, where: str) -> ArgumentError:
    if not isinstance(x, Tensor):
        return ArgumentError(
            f"{name}: {where} is of type {type(x).__name__}, and only tensors can be "
            "differentiated"
        )
    return ArgumentError(
        f"{name}: {where} has dtype {x.dtype}; only floating and complex tensors can be "
        "differentiated (pass it as another argument, or see argnums)"
    )


def chosen_tree(args: Arguments, argnums: int | tuple[int, ...], values: Sequence[Any]) -> Any:
    """Return ``values`` of the differentiated leaves in the trees of the arguments: one tree, or a
    tuple of them."""
    if args.flat:
        return values[0] if isinstance(argnums, int) else tuple(values)
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    feed = iter(values)
    trees = []
    for i in chosen:
        leaves = [next(feed) for _ in args.spans[i]]
        trees.append(unflatten(leaves, args.specs[i]))
    return trees[0] if isinstance(argnums, int) else tuple(trees)


def tensors_of(args: Arguments) -> list[Tensor]:
    return [x for x in args.leaves if isinstance(x, Tensor)]


class Call:
    """One call of ``f`` by a transform: the arguments, the recording, and the results in trees.

    With ``has_aux`` the function returns ``(output, aux)``; the leaves of the output come first.
    ``apart``: what it closes over is no argument, even where it is the same tensor."""

    def __init__(
        self,
        name: str,
        f: Callable,
        arguments: Arguments,
        differentiated: Sequence[int],
        has_aux: bool,
        apart: bool = False,
    ) -> None:
        self.name, self.f, self.arguments, self.has_aux = name, f, arguments, has_aux
        self.n_out, self.spec, self.aux_spec = 0, None, None

        def flat(*args: Any, **kwargs: Any) -> Any:
            output, aux = self.split(f(*args, **kwargs))
            if output is None:
                raise ArgumentError(
                    f"{name}: {where_defined(f)} returned None: is a `return` missing?"
                )
            leaves, self.spec = flatten(output)
            self.n_out = len(leaves)
            if self.spec is None and not has_aux:
                return output
            more, self.aux_spec = flatten_tree(aux) if has_aux else ([], None)
            return [*leaves, *more]

        names = parameter_names(f, arguments)
        self.rec = capture(
            flat,
            arguments.leaves,
            arguments.rebuilt,
            differentiated=differentiated,
            numbers=True,
            name_of=names,
            apart=apart,
        )
        self.program, self.aliases = self.rec.program(), self.rec.aliases
        self.inputs = [*self.rec.trace.origins, *self.rec.closed_over]
        self.wrt = tuple(differentiated)
        if not arguments.flat:
            primals = [k for k, x in enumerate(arguments.leaves) if isinstance(x, Tensor)]
            self.wrt = tuple(map(primals.index, differentiated))

    def split(self, result: Any) -> tuple[Any, Any]:
        if not self.has_aux:
            return result, None
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ArgumentError(
                f"{self.name}: with has_aux=True {where_defined(self.f)} must return "
                f"(output, aux), not {structure(result)}"
            )
        return result

    def check_tensors(self) -> None:
        """Raise ArgumentError unless every leaf of the output is a tensor."""
        if len(self.rec.tensors) == len(self.rec.leaves):
            return
        for k, x in enumerate(self.rec.leaves[: self.n_out]):
            if not isinstance(x, Tensor):
                raise ArgumentError(
                    f"{self.name}: the output{self.path(k)} is of type {type(x).__name__}; "
                    "outputs must be tensors (see has_aux)"
                )

    def path(self, k: int) -> str:
        """Return the path of leaf ``k`` in the output."""
        return leaf_paths(self.spec)[k] if self.spec is not None else ""

    def check_scalar(self) -> None:
        out = self.rec.leaves[0] if self.rec.leaves else None
        if self.n_out != 1 or not isinstance(out, Tensor) or self.spec is not None:
            kind = type(out).__name__ if self.n_out == 1 and self.spec is None else "a tree"
            raise ArgumentError(
                f"{self.name}: {where_defined(self.f)} must return one scalar tensor, not {kind}"
            )
        if out.dim():
            raise ArgumentError(
                f"{self.name}: {where_defined(self.f)} must return a tensor with zero dimensions, "
                f"not one of shape {list(out.shape)}; sum() it, or use vjp or jacrev"
            )
        if not out.is_floating_point():
            raise ArgumentError(
                f"{self.name}: {where_defined(self.f)} must return a real floating tensor, not "
                f"{out.dtype}; use vjp or jacrev"
            )

    def derived(self, key: tuple, make: Callable[[], Any]) -> Any:
        return self.program.derived((self.name, self.wrt, *key), make)

    def results(self, tensors: Sequence[Tensor], first: int = 0) -> tuple[Any, ...]:
        """Return ``(output, aux)`` of these tensors from the leaf ``first`` on, or no aux."""
        if ops := ops_in_place(self.rec):
            change_in_place(ops, self.inputs, self.wrt)
        leaves = self.leaves(tensors, first)
        output = unflatten(leaves[: self.n_out], self.spec)
        return (
            (output, tree_unflatten(leaves[self.n_out :], self.aux_spec))
            if self.has_aux
            else (output,)
        )

    def tree(self, tensors: Sequence[Tensor]) -> Any:
        """Return the output with these tensors."""
        return unflatten(self.leaves(tensors), self.spec)

    def leaves(self, tensors: Sequence[Tensor], first: int = 0) -> list:
        """Return the flat result of the function with these tensors from leaf ``first`` on."""
        own = self.rec.unlike_inputs(tensors, self.inputs)
        if not first and len(own) == len(self.rec.leaves) == len(self.rec.tensors):
            return list(own)
        return with_items(self.rec.leaves, [i for i in self.rec.tensors if i >= first], own)


def primals_and_tangents(
    name: str, primals: Any, tangents: Any, f: Callable
) -> tuple[Arguments, list[Tensor]]:
    """Return a push-forward's arguments and tangents. Raises ArgumentError for others."""
    if not isinstance(primals, tuple) or not primals:
        raise ArgumentError(
            f"{name}: primals must be a non-empty tuple, not {type(primals).__name__}"
        )
    if not isinstance(tangents, tuple) or len(tangents) != len(primals):
        raise ArgumentError(
            f"{name}: tangents must be a tuple like primals: {unlike(primals, tangents)}"
        )
    arguments, others = Arguments(primals, {}, f), Arguments(in_order_of(primals, tangents), {}, f)
    all_positions(name, arguments)
    if arguments.specs != others.specs:
        raise ArgumentError(
            f"{name}: tangents do not have the structure of primals: {unlike(primals, tangents)}"
        )
    flat = []
    for i, (p, t) in enumerate(zip(arguments.leaves, others.leaves, strict=True)):
        if not isinstance(t, Tensor) or t.shape != p.shape:
            shape = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ArgumentError(
                f"{name}: the tangent of {arguments.said(i)} must have its primal's shape "
                f"{list(p.shape)}, not {shape}"
            )
        if t.dtype != p.dtype and name == "jvp_fn":
            raise ArgumentError(
                f"{name}: the tangent of {arguments.said(i)} must have its primal's dtype "
                f"{p.dtype}, not {t.dtype}"
            )
        if t.is_complex() and not p.is_complex():
            raise ArgumentError(
                f"{name}: the tangent of {arguments.said(i)}, which is real, is complex"
            )
        flat.append(like_tangent(t, p))
    return arguments, flat


def unlike(primals: Any, tangents: Any) -> str:
    return f"primals are {structure(primals)}, tangents {structure(tangents)}"


def like_tangent(t: Tensor, p: Tensor) -> Tensor:
    """Return ``t`` with the dtype and the strides of a tangent of ``p``."""
    want = tangent_sig(signature(p))
    if signature(t) is want:
        return t
    t = t.to(p.dtype)
    if t.stride() != want.stride or t.storage_offset():
        t = torch.empty_strided(
            want.shape, want.stride, dtype=want.dtype, device=want.device
        ).copy_(t)
    return t

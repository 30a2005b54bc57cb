"""Compare derivatives with finite differences, and an op's rules with differences and loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_map, tree_unflatten

from ..capture.tree import Arguments, flatten
from ..errors import ArgumentError
from ..trace.nested import with_items
from ..transforms.rules.schema import overload
from .func import jvp, vjp
from .vmap import vmap


def check_grads(
    f: Callable,
    args: Sequence[Any],
    order: int = 2,
    *,
    modes: Sequence[str] = ("fwd", "rev"),
    eps: float = 1e-5,
    atol: float = 1e-5,
    rtol: float = 1e-4,
) -> None:
    """Check ``f``'s derivatives up to ``order`` at ``args`` against central differences along
    random directions.

    ``args``: trees of float64 (or complex128) tensors, all differentiated. ``modes``: forward and
    reverse; each is checked alone and, for higher orders, on the other. Raises AssertionError with
    the order and the mode if the numbers differ, ArgumentError for other dtypes.

    >>> check_grads(torch.sin, (torch.ones(3, dtype=torch.float64),), order=2)
    """
    arguments = Arguments(args, {})
    for i, x in enumerate(arguments.leaves):
        if not isinstance(x, Tensor) or x.dtype not in (torch.float64, torch.complex128):
            raise ArgumentError(
                f"check_grads: leaf {i} must be a float64 or complex128 tensor, as differences "
                "lose too many digits in less; convert it, say by x.double()"
            )
    _check(f, tuple(args), order, tuple(modes), eps, atol, rtol, "")


def check_rule(
    op: OpOverload | OpOverloadPacket, *samples: Sequence[Any], order: int = 2, batch: int = 3
) -> None:
    """Check the rules of ``op`` under each transform at samples of its positional arguments.

    Derivatives are compared with central differences up to ``order`` (see :func:`check_grads`;
    tensors are converted to float64), batching with a loop over ``batch`` samples, for each choice
    of batched tensors. Raises AssertionError naming the wrong result, RuleError for an op without
    a rule.

    >>> check_rule(torch.ops.aten.atan2, (torch.ones(3), torch.arange(1.0, 4.0)))
    """
    op = overload(op)
    for args in samples:
        given = [
            x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
        ]
        tensors = [i for i, x in enumerate(given) if isinstance(x, Tensor)]
        floating = [i for i in tensors if given[i].dtype in (torch.float64, torch.complex128)]

        def call(*xs: Tensor, at: list[int] = floating, given: list = given) -> Any:
            return op(*with_items(given, at, xs))

        if floating:
            smooth = lambda *xs, call=call: [
                x for x in flatten(call(*xs))[0] if x.is_floating_point()
            ]
            check_grads(smooth, [given[i] for i in floating], order)
        for batched in product((True, False), repeat=len(tensors)):
            if any(batched):
                at = [i for i, yes in zip(tensors, batched, strict=True) if yes]
                scales = [1 + k / (4 * batch) for k in range(batch)]
                stacks = [
                    torch.stack([given[i] * k if i in floating else given[i] for k in scales])
                    for i in at
                ]
                got = flatten(
                    vmap(lambda *xs, at=at: call(*xs, at=at), randomness="same")(*stacks)
                )[0]
                loop = [flatten(call(*xs, at=at))[0] for xs in zip(*stacks, strict=True)]
                for g, want in zip(got, map(torch.stack, zip(*loop, strict=True)), strict=True):
                    said = f"batching arguments {at} is wrong: "
                    torch.testing.assert_close(
                        g, want, equal_nan=True, msg=lambda m, said=said: said + m
                    )


def _directions(tree: Any) -> Any:
    return tree_map(torch.randn_like, tree)


def _stepped(tree: Any, direction: Any, step: float) -> Any:
    return tree_map(lambda x, d: x + step * d, tree, direction)


def _real_dot(a: Any, b: Any) -> Tensor:
    pairs = zip(flatten(a)[0], flatten(b)[0], strict=True)
    return sum(
        (
            torch.real(x.conj() * y).sum()
            for x, y in pairs
            if x.is_floating_point() or x.is_complex()
        ),
        torch.zeros(()),
    )


def _check(
    f: Callable,
    args: tuple,
    order: int,
    modes: tuple,
    eps: float,
    atol: float,
    rtol: float,
    path: str,
) -> None:
    direction = _directions(args)
    with torch.no_grad():
        upper = flatten(f(*_stepped(args, direction, eps)))[0]
        lower = flatten(f(*_stepped(args, direction, -eps)))[0]
    numeric = [(u - v) / (2 * eps) for u, v in zip(upper, lower, strict=True)]
    close = {"atol": atol, "rtol": rtol, "check_dtype": False}
    if "fwd" in modes:
        _, tangent = jvp(f, args, direction)
        for n, t in zip(numeric, flatten(tangent)[0], strict=True):
            torch.testing.assert_close(
                t, n, **close, msg=lambda m: f"forward mode is wrong{path}: {m}"
            )
    if "rev" in modes:
        out, pull = vjp(f, *args)
        cotangent = _directions(out)
        gradient = pull(cotangent)
        got = _real_dot(gradient, direction)
        want = _real_dot(cotangent, _as_tree(numeric, cotangent))
        torch.testing.assert_close(
            got, want, **close, msg=lambda m: f"reverse mode is wrong{path}: {m}"
        )
    if order > 1:
        deeper = (
            ("fwd", "jvp", lambda *a: jvp(f, a, direction)[1]),
            ("rev", "vjp", lambda *a: vjp(f, *a)[1](cotangent)),
        )
        for mode, name, derivative in deeper:
            if mode in modes:
                where = f" in the derivative of {name}{path}"
                _check(derivative, args, order - 1, modes, eps, atol, rtol, where)


def _as_tree(leaves: Sequence[Tensor], tree: Any) -> Any:
    _, spec = flatten(tree)
    return leaves[0] if spec is None else tree_unflatten(list(leaves), spec)

"""Compiled calls on tensors that torch's own vmap has batched, as
``autograd.grad(is_grads_batched=True)`` and ``jacobian(vectorize=True)`` do to run a backward. Our
vmap of the program runs, so that it stays compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..capture.calls import CompiledCall
from ..debug import at, user_line
from ..errors import RuleError
from ..graph import Program, dependents, draws
from ..trace.shapes.sig import Sig, sig_of
from ..transforms.vmap import Axis, vmap

_functorch = torch._C._functorch
# torch has two kinds of vmap: autograd's own is the older
_OLD = torch._C._parse_dispatch_key("Batched")


def has_batches(tensors: Sequence[Tensor]) -> bool:
    """Return whether some are batches, with no other transform of torch.func's inside."""
    if older_levels():
        return any(torch._C._dispatch_keys(t).has(_OLD) for t in tensors)
    return any(map(_functorch.is_batchedtensor, of_level(innermost_level(tensors), tensors)))


def innermost_level(tensors: Sequence[Tensor]) -> int:
    """Return the innermost level of torch.func's that these are of, at most 0 if there is none."""
    return max(map(_functorch.maybe_get_level, tensors), default=0)


def of_level(level: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in tensors if _functorch.maybe_get_level(t) == level]


def call_batched(
    run: Callable[..., Sequence],
    call: Any,
    tensors: Sequence[Tensor],
    beneath: Callable[..., Sequence] | None = None,
) -> Sequence:
    """Return ``run(call, tensors)``, on batches of torch's vmap too; by ``beneath`` (default:
    ``run``) if these are of tensors that torch.func differentiates."""
    if (_functorch.peek_interpreter_stack() is not None or older_levels()) and has_batches(
        tensors
    ):
        return on_batches(run, call, tensors, beneath or run)
    return run(call, tensors)


def on_batches(
    run: Callable[..., Sequence],
    call: CompiledCall | Program,
    tensors: Sequence[Tensor],
    beneath: Callable[..., Sequence],
) -> list:
    """Return ``run(call, tensors)`` of a call or a program, the batch dimensions that the tensors
    have at each level of vmap, down to one that differentiates, made dimensions of the program's;
    random numbers are shared by a batch."""
    wraps: list[tuple[Callable, int, list[bool]]] = []

    def peel(bare: list[Tensor], dims: tuple, wrap: Callable, level: int) -> None:
        nonlocal call, tensors
        size = next(t.shape[d] for t, d in zip(bare, dims, strict=True) if d is not None)
        depend = dependent(flat_program(call), dims)
        call, tensors = over_batch(call, dims, tuple(map(sig_of, bare)), size, depend), bare
        wraps.append((wrap, level, depend))

    for level in range(older_levels(), 0, -1):
        found = [older_batch(t, level) for t in tensors]
        dims = tuple(None if b is None else 0 for b in found)
        if any(b is not None for b in found):
            peel(
                [t if b is None else b for t, b in zip(tensors, found, strict=True)],
                dims,
                torch._add_batch_dim,
                level,
            )
    while (level := innermost_level(tensors)) > 0:
        if not any(map(_functorch.is_batchedtensor, of_level(level, tensors))):
            run = beneath
            break
        mine = [_functorch.maybe_get_level(t) == level for t in tensors]
        dims = tuple(
            _functorch.maybe_get_bdim(t) if yes else None
            for t, yes in zip(tensors, mine, strict=True)
        )
        bare = [
            _functorch.get_unwrapped(t) if yes else t for t, yes in zip(tensors, mine, strict=True)
        ]
        peel(bare, dims, _functorch._add_batch_dim, level)
    with without_levels_above(max(level, 0)), without_older_levels():
        outs = list(run(call, tensors))
    for wrap, level, depend in reversed(wraps):
        outs = [
            wrap(o, 0, level) if yes and isinstance(o, Tensor) else o
            for o, yes in zip(outs, depend, strict=True)
        ]
    return outs


def check_draws(program: Program, tensors: Sequence[Tensor]) -> None:
    """Raise RuleError for a program that draws, where torch.func's vmap has batched its inputs and
    does not say that a batch shares random numbers."""
    if _functorch.peek_interpreter_stack() is None or not has_batches(tensors):
        return
    drawn = program.once("drawn", lambda: any(map(draws, program.graph.nodes)))
    for level in _functorch.get_interpreter_stack() if drawn else ():
        if level.key() == _functorch.TransformType.Vmap:
            said = str(_functorch.CVmapInterpreterPtr(level).randomness()).rpartition(".")[2]
            if said != "Same":
                raise RuleError(
                    "a loop or a branch that draws random numbers, in torch.func.vmap("
                    f"randomness={said.lower()!r}){at(user_line())}: use aotfunc.vmap, or draw "
                    "before it and pass the numbers in"
                )


@contextmanager
def without_levels_above(level: int) -> Iterator[None]:
    """Set torch.func's levels above this one aside."""
    with ExitStack() as stack:
        while (top := _functorch.peek_interpreter_stack()) is not None and top.level() > level:
            stack.callback(
                _functorch.push_dynamic_layer_stack, _functorch.pop_dynamic_layer_stack()
            )
        yield


def flat_program(call: CompiledCall | Program) -> Program:
    return (call.program if isinstance(call, CompiledCall) else call).flat()


def over_batch(
    call: Any, dims: tuple, sigs: tuple[Sig, ...], size: int, depend: list[bool]
) -> Any:
    def make() -> Program:
        outs = [0 if yes else None for yes in depend]
        return vmap(flat_program(call), dims, sigs, Axis(size, "same"), outs)

    if isinstance(call, CompiledCall):
        return call.derived((dims, sigs, size), make, "vmap")
    return call.once(("batch", dims, sigs, size), make)


def dependent(program: Program, dims: Sequence[int | None]) -> list[bool]:
    """Return which outputs depend on an input that has a batch dimension."""
    inputs = [p for p, d in zip(program.placeholders, dims, strict=True) if d is not None]
    found = dependents(program.graph, inputs)
    return [isinstance(o, Node) and o in found for o in program.outputs]


def older_batch(t: Tensor, level: int) -> Tensor | None:
    """Return ``t``'s batch at this level of the older vmap, which would expand others."""
    first, second = (torch._remove_batch_dim(t, level, size, 0) for size in (1, 2))
    return first if first.shape == second.shape else None


def older_levels() -> int:
    """Return how many levels of the older vmap are under way."""
    count = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return count


@contextmanager
def without_older_levels() -> Iterator[None]:
    count = older_levels()
    for _ in range(count):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(count):
            torch._C._vmapmode_increment_nesting()

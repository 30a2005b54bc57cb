"""The ``vmap`` of an ``autograd.Function``: called on the real batch if there is one, else
recorded as the batching rule of the Function's node.

On the real batch it may, as with torch.func, look at values, close over tensors and differentiate
a graph from outside.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_, tree_unflatten

from ..debug import at, user_line
from ..errors import ArgumentError, CaptureError, RuleError
from ..trace.kinds import has_values
from ..trace.memory import version
from ..trace.shapes.sig import make_sig
from ..trace.traced import Traced, current, no_recording, quiet, under_way
from ..trace.tracer import Trace
from .calls import Row, interned
from .concretize import batch_of
from .tree import Operands


class Info(NamedTuple):
    """What a Function's ``vmap`` is told about the batch."""

    batch_size: int
    randomness: str


def call(cls: Any, info: Info, dims: Any, args: Any) -> tuple[list, TreeSpec, list]:
    """Return the flat results of ``cls.vmap``: leaves, their tree, and a dim for each."""
    name = cls.__name__
    if cls.generate_vmap_rule:
        raise RuleError(
            f"{name} has a vmap staticmethod and generate_vmap_rule=True{at(user_line())}: there "
            "can be one rule only"
        )
    result = cls.vmap(info, dims, *args)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ArgumentError(
            f"{name}.vmap must return (output, out_dims), not {type(result).__name__}"
        )
    output, out_dims = result
    leaves, spec = tree_flatten(output)
    flat: list = []
    try:
        tree_map_(lambda d, below: flat.extend([d] * len(tree_leaves(below))), out_dims, output)
    except ValueError:
        raise ArgumentError(
            f"{name}.vmap: out_dims={out_dims!r} does not have the structure of its output"
        ) from None
    for x, d in zip(leaves, flat, strict=True):
        if (
            isinstance(x, Tensor)
            and d is not None
            and not (d < x.dim() and x.shape[d] == info.batch_size)
        ):
            raise ArgumentError(
                f"{name}.vmap: its output of shape {list(x.shape)} does not have the "
                f"{info.batch_size} samples at dimension {d}, as out_dims={out_dims!r} says"
            )
    return leaves, spec, flat


# ----- on the real batch -------------------------------------------------------------------------


def on_real_batch(cls: Any, args: Sequence[Any]) -> Any:
    """Return the results of ``cls.vmap`` on the real batched tensors that the arguments stand for,
    as values of the recording. Return NotImplemented if the recording is not of an outermost
    ``vmap`` over real tensors, or none is batched."""
    trace = current()
    assert trace is not None
    if not may_be_real(trace):
        return NotImplemented
    operands = Operands(args)
    mine = [t for t in operands.tensors if t.__class__ is Traced]
    if not mine or any(t.requires_grad for t in mine):
        return NotImplemented
    pairs = batch_of(trace, mine)
    if all(d is None for _, d in pairs):
        return NotImplemented
    batch = [(in_new_memory(trace, x), d) for x, d in pairs]
    before = [version(x) for x, _ in batch]
    feed = iter(batch)
    given = [next(feed) if t.__class__ is Traced else (t, None) for t in operands.tensors]
    dims = operands.dims([d for _, d in given])
    versions = written_so_often(seen := outside_tensors(trace))
    with set_aside(trace):
        info = Info(*trace.samples.axis[:2])
        leaves, spec, out_dims = call(cls, info, dims, operands.rebuilt([x for x, _ in given]))
    if written_so_often(seen) != versions:
        raise CaptureError(
            f"{cls.__name__}.vmap writes to a tensor that the function under vmap has been given, "
            f"or has read{at(user_line())}: clone() it there first"
        )
    sample = next(t for t, (_, d) in zip(mine, batch, strict=True) if d is not None)
    known: dict[int, Tensor] = {}
    for t, (x, d), was in zip(mine, batch, before, strict=True):
        if version(x) != was:
            with torch.no_grad():
                t.copy_(x if d is None else part_of_sample(trace, x, 0, sample))
            known[id(x)] = t

    def value(x: Any, dim: int | None) -> Any:
        if id(x) in known:
            return known[id(x)]
        return (
            part_of_sample(trace, x, dim, sample)
            if isinstance(x, Tensor) and dim is not None
            else x
        )

    return tree_unflatten([value(x, d) for x, d in zip(leaves, out_dims, strict=True)], spec)


def may_be_real(trace: Trace) -> bool:
    """Return whether the recording is of an outermost ``vmap`` that runs at once on values. It may
    not if it draws, or writes to a tensor from outside."""
    if (
        trace.samples is None
        or not trace.may_ask_constants
        or under_way.traces != [trace]
        or forward_ad._current_level >= 0
        or (trace.mutates and any(root < 0 for root in trace.roots().written))
    ):
        return False
    if trace.looked_at is None:
        trace.looked_at = LookedAt()
    return trace.looked_at.may_be_real(trace)


class LookedAt:
    """What was looked at: tensors from outside, their ``memory``, and the steps, once."""

    def __init__(self) -> None:
        self.tensors = self.steps = 0
        self.memory: set[int] = set()
        self.real = True

    def may_be_real(self, trace: Trace) -> bool:
        """Return whether the tensors have values, and no step draws."""
        tensors, steps = outside_tensors(trace)[self.tensors :], trace.records[self.steps :]
        self.tensors, self.steps = self.tensors + len(tensors), self.steps + len(steps)
        self.real = (
            self.real
            and all(t.__class__ is not Traced and is_unwrapped(t) for t in tensors)
            and not any(instr.facts.random for instr, *_ in steps)
        )
        if self.real:
            self.memory.update([t.untyped_storage()._cdata for t in tensors])
        return self.real


def is_unwrapped(t: Tensor) -> bool:
    return has_values(t) and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def outside_tensors(trace: Trace) -> list[Tensor]:
    return [*trace.origins, *trace.lifted]


def written_so_often(tensors: Sequence[Tensor]) -> list[int]:
    """Return the versions of the tensors."""
    try:
        return [*map(_version, tensors)]
    except RuntimeError:  # tensors of inference mode have none
        return [*map(version, tensors)]


_version = operator.attrgetter("_version")


def in_new_memory(trace: Trace, x: Tensor) -> Tensor:
    """Return ``x`` in new memory: no write to it may be seen before the recording runs."""
    with quiet():
        return x.clone() if x.untyped_storage()._cdata in trace.looked_at.memory else x


@contextmanager
def set_aside(trace: Trace) -> Iterator[None]:
    """Set the recording, autograd, dispatch modes and saved-tensor hooks aside."""
    modes: list = []
    hooks = torch._C._autograd._saved_tensors_hooks_set_tracing(False)
    try:
        while trace not in modes:
            modes.append(torch._C._pop_torch_dispatch_stack(None))
        with no_recording():
            yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_dispatch_stack(mode)
        torch._C._autograd._saved_tensors_hooks_set_tracing(hooks)


def part_of_sample(trace: Trace, x: Tensor, dim: int, sample: Tensor) -> Tensor:
    """Return the part of the real batch ``x`` of the sample of the batched ``sample``."""
    with quiet():
        x = x.movedim(dim, 0)
    sig = make_sig(tuple(x.shape[1:]), tuple(x.stride()[1:]), x.dtype, x.device)
    return trace.record(interned(Row, (sig,)), [x, sample])[0]

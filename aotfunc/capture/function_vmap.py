"""The ``vmap`` of an ``autograd.Function``: called on the real batch if there is one, else
recorded as the batching rule of the Function's node.

On the real batch it may, as with torch.func, look at values, close over tensors and differentiate
a graph from outside.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_, tree_unflatten

from ..cache import Cache
from ..debug import Line, at, user_line
from ..errors import ArgumentError, CaptureError, RuleError
from ..trace.kinds import has_values
from ..trace.memory import version
from ..trace.modes import Surroundings
from ..trace.recording import record_into
from ..trace.shapes.sig import make_sig
from ..trace.traced import Traced, current, no_recording, quiet, under_way
from ..trace.tracer import Trace
from ..transforms.walk import traced
from .calls import Row, interned
from .concretize import batch_of
from .tree import Operands


class Info(NamedTuple):
    """What a Function's ``vmap`` is told about the batch."""

    batch_size: int
    randomness: str


def call(cls: Any, info: Info, dims: Any, args: Any) -> tuple[list, TreeSpec, list]:
    """Return the flat results of ``cls.vmap``: the leaves of its output, their tree, and a dim for
    each."""
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
    batch = [(unshared(trace, x), d) for x, d in pairs]
    before = [version(x) for x, _ in batch]
    feed = iter(batch)
    given = [next(feed) if t.__class__ is Traced else (t, None) for t in operands.tensors]
    dims = operands.dims([d for _, d in given])
    versions = written_so_often(seen := outside(trace))
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
    """Return whether the recording is of an outermost ``vmap`` that runs at once, on tensors with
    values. A draw in it would be drawn again, and a write to a tensor from outside would not be
    seen by the rule: then it may not."""
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
    """What was looked at of a recording: the tensors from outside and their ``memory``, and the
    steps, each once."""

    def __init__(self) -> None:
        self.tensors = self.steps = 0
        self.memory: set[int] = set()
        self.real = True

    def may_be_real(self, trace: Trace) -> bool:
        """Return whether the tensors have values, and no step draws."""
        tensors, steps = outside(trace)[self.tensors :], trace.records[self.steps :]
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


def outside(trace: Trace) -> list[Tensor]:
    return [*trace.origins, *trace.lifted]


def written_so_often(tensors: Sequence[Tensor]) -> list[int]:
    """Return the versions of the tensors."""
    try:
        return [*map(_version, tensors)]
    except RuntimeError:  # tensors of inference mode have none
        return [*map(version, tensors)]


_version = operator.attrgetter("_version")


def unshared(trace: Trace, x: Tensor) -> Tensor:
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
    """Return the part of the real batch ``x`` that belongs to the sample of the batched value
    ``sample``."""
    with quiet():
        x = x.movedim(dim, 0)
    sig = make_sig(tuple(x.shape[1:]), tuple(x.stride()[1:]), x.dtype, x.device)
    return trace.record(interned(Row, (sig,)), [x, sample])[0]


# ----- as a batching rule ------------------------------------------------------------------------


#: operands -> rule, kept as long as it records the same
_rules = Cache(4096)


class OwnRule:
    """``cls.vmap`` as the batching rule of a node, for the tensors among the operands of its
    call, and behind them those that the rule closes over."""

    def __init__(
        self,
        cls: Any,
        operands: Operands,
        surroundings: Surroundings,
        closed: Sequence[Tensor] = (),
    ) -> None:
        self.cls, self.operands, self.surroundings = cls, operands, surroundings
        self.closed = list(map(weakref.ref, closed))
        #: its call -> what it recorded; None if that differed, or cannot be compared
        self.recorded: dict[tuple, tuple | None] = {}
        self.running = False
        self.asked: Any = lambda: None  # refers to the outermost recording in which it was

    @classmethod
    def of(cls, owner: Any, args: Sequence[Any], closed: Sequence[Tensor] = ()) -> OwnRule:
        """Return the rule of an earlier call if it still records the same, so that programs that
        hold it are equal, too. A rule that closes over tensors is new at each call."""
        how = (owner, Operands(args).without_tensors(), Surroundings.now())
        if closed:
            return cls(*how, closed)
        try:
            known = _rules.get(how)
        except TypeError:  # an argument without a hash
            return cls(*how)
        recording = under_way.traces[0]
        if known is None or not (known.running or known.asked() is recording or known.holds()):
            _rules.put(how, known := cls(*how))
        known.asked = weakref.ref(recording)
        return known

    def holds(self) -> bool:
        """Return whether the rule still records the same."""
        if len(self.recorded) > 8:
            return False
        for (info, flags, sigs), before in list(self.recorded.items()):
            inner = Trace("a rule may not look at values", constants=False)
            inner.of_a_rule = True
            values = [inner.input_like(sig) for sig in sigs]
            try:
                record_into(inner, functools.partial(self.body, info, flags, sigs, values))
            except Exception:
                return False
            if before is None or self.recorded[info, flags, sigs] != before:
                return False
        return True

    def body(self, info: Info, flags: tuple, sigs: tuple, tensors: Sequence[Tensor]) -> list:
        """Return the batched results, with the batch in front."""
        count = len(self.operands.places)
        # a Function may write to its argument: the recorded call does so, too
        copies = [t.clone() for t in tensors[:count]]
        dims = self.operands.dims(flags[:count])
        for t, flag, closed in zip(tensors[count:], flags[count:], self.closed, strict=True):
            # the rule may not read tensors that differ between samples
            if flag is None and (real := closed()) is not None:
                current().stand_for(t, real)  # type: ignore[union-attr, arg-type]
        before, self.running = self.running, True  # nested rules need no comparison
        try:
            with self.surroundings.again():
                leaves, _, out_dims = call(self.cls, info, dims, self.operands.rebuilt(copies))
        finally:
            self.running = before
        outs = [(o, d) for o, d in zip(leaves, out_dims, strict=True) if isinstance(o, Tensor)]
        check_closed_over([o for o, _ in outs])
        results = [
            o.movedim(d, 0) if d is not None else o.expand(info.batch_size, *o.shape)
            for o, d in outs
        ]
        how, now = (info, flags, sigs), as_recorded(results)
        self.recorded[how] = now if self.recorded.get(how, now) == now else None
        return results

    def __call__(self, walk: Any, inputs: Sequence[Node], line: Line | None) -> tuple[Any, Any]:
        flags = tuple([0 if walk.has(x) else None for x in inputs])
        info, nodes = Info(*walk.axis[:2]), [walk.env[x] for x in inputs]
        sigs = tuple([n.meta["val"] for n in nodes])
        try:
            outs = traced(lambda *tensors: self.body(info, flags, sigs, tensors))(walk.b, *nodes)
        except (RuleError, CaptureError) as error:
            if isinstance(error, Told) or self.cls.generate_vmap_rule:
                raise
            name = self.cls.__name__
            of_a_function = isinstance(self.cls, type)
            rule = f"{name}.vmap" if of_a_function else f"the batching rule of {name}"
            applied = f"{name}.apply" if of_a_function else name
            raise Told(
                f"{rule} is recorded here, not called on the real batch, and cannot "
                f"be{at(line)}: {error}. Pass what it needs as arguments of {applied}, or call "
                "vmap outside of other transforms and of compiled functions, on tensors that do "
                "not require grad"
            ) from error
        return outs, [True] * len(outs)


def as_recorded(results: Sequence[Tensor]) -> tuple | None:
    """Return the recorded steps of these results; None if they hold tensors, which are not
    compared."""
    trace = current()
    assert trace is not None
    trace.settle()
    refs = tuple([trace.ref_of(x)[0] for x in results])
    return None if trace.lifted else (trace.key(), refs)


class Told(CaptureError):
    """An error whose text already names the Function."""


def check_closed_over(outs: Sequence[Tensor]) -> None:
    """Refuse tensors from outside: the graph has no place for them."""
    trace = current()
    assert trace is not None
    for o in outs:
        trace.ref_of(o)
    for t in trace.foreign():
        raise CaptureError(f"it closes over a tensor of shape {list(t.shape)}")

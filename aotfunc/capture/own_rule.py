"""The batching rule that a user's Python code is, as a part of a graph node: recorded where it is
applied, and found again if it records the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..cache import Cache
from ..debug import Line, at
from ..errors import CaptureError, RuleError
from ..trace.modes import Surroundings, off, outside_inference_mode
from ..trace.recording import record_into
from ..trace.records import instr_op, n_new_values, written_slots
from ..trace.shapes.sig import Sig, contiguous_stride, make_sig
from ..trace.traced import Traced, current, no_recording, quiet, under_way
from ..trace.tracer import Trace
from ..transforms.rules import axes
from ..transforms.walk import placed
from .function_vmap import Info, call, is_unwrapped
from .tree import Operands

aten = torch.ops.aten

#: application -> the rules of earlier ones, which have recorded different things
_rules = Cache(1024)


class Recorded(NamedTuple):
    """What a rule did in one call: it raised ``error``, or recorded ``results`` in ``trace``.
    ``key`` is equal for calls that do the same; None if they cannot be compared."""

    key: tuple | None
    trace: Any = None
    results: Sequence[Tensor] = ()
    error: Exception | None = None


class OwnRule:
    """``cls.vmap`` as the batching rule of a node, for the tensors among the operands of its
    call, and behind them those that the rule closes over.

    The rule may read what Python code changes between two applications. So it is recorded at each
    application, in the call that the innermost ``vmap`` will make, and in those that were made of
    an earlier rule. If it records what an earlier one has recorded, it is that one, and programs
    that hold it are equal, too."""

    def __init__(
        self, cls: Any, operands: Operands, surroundings: Surroundings, closed: Sequence[Tensor]
    ) -> None:
        self.cls, self.operands, self.surroundings = cls, operands, surroundings
        self.closed = list(map(weakref.ref, closed))
        #: (info, flags, sigs) -> what the rule did in this call
        self.recorded: dict[tuple, Recorded] = {}

    @classmethod
    def of(cls, owner: Any, args: Sequence[Any], closed: Sequence[Tensor] = ()) -> OwnRule:
        """Return this application's rule: an earlier one that records the same, or a new one."""
        trace, operands = current(), Operands(args)
        assert trace is not None
        tensors = [*operands.tensors, *closed]
        sigs = tuple([trace.ref_of(t)[1] for t in tensors])
        around = tuple([t.samples.axis for t in under_way.traces if t.samples is not None])
        how = (owner, operands.without_tensors(), Surroundings.now())
        key = (*how, sigs, around, tuple(map(id, closed)))
        try:
            known = [r for r in _rules.get(key) or () if r.closes_over(closed)]
        except TypeError:  # an argument without a hash
            known = None
        new = cls(*how, closed)
        for c in dict.fromkeys([c for rule in known or () for c in [*rule.recorded]]):
            new.does(c)
        if not new.recorded and (c := expected(tensors, sigs)) is not None:
            new.does(c)
        for rule in known or ():
            before = dict(rule.recorded)
            if (before or not new.recorded) and all(
                did.key is not None and new.recorded[c].key == did.key
                for c, did in before.items()
                if c in new.recorded  # another thread may have added one
            ):
                rule.recorded |= {c: did for c, did in new.recorded.items() if did.key} | before
                return rule
        if known is not None and all(did.key is not None for did in new.recorded.values()):
            _rules.put(key, (new, *known[:3]))
        return new

    def closes_over(self, closed: Sequence[Tensor]) -> bool:
        """Return whether it was made for these tensors, not for others that had their ids."""
        return all(c() is t for c, t in zip(self.closed, closed, strict=True))

    def does(self, call: tuple) -> Recorded:
        """Return what the rule does in a call: what it has recorded, or records now."""
        if (known := self.recorded.get(call)) is None:
            self.recorded[call] = known = self.record(*call)
        return known

    @outside_inference_mode
    def record(self, info: Info, flags: tuple, sigs: tuple) -> Recorded:
        """Call the rule on a batch of these signatures in a recording of its own, as if no other
        were under way: it is the same now and later."""
        with no_recording(), off():
            trace = Trace("a rule may not look at values", constants=False)
            trace.of_a_rule, trace.caches_casts = True, self.surroundings.cached
            values = [trace.input_like(sig) for sig in sigs]
            try:
                results = record_into(trace, lambda: self.body(info, flags, values))
            except Exception as error:  # raised if this call is made
                return Recorded(None, error=error)
            owners, trace.owners = trace.owners, frozenset()
        keep_owners(owners)
        return Recorded(as_recorded(trace, results), trace, results)

    def body(self, info: Info, flags: tuple, tensors: Sequence[Tensor]) -> list:
        """Return the batched results, with the batch in front."""
        count = len(self.operands.places)
        # a Function may write to its argument: the recorded call does so, too
        copies = [t.clone() for t in tensors[:count]]
        dims = self.operands.dims(flags[:count])
        for t, flag, closed in zip(tensors[count:], flags[count:], self.closed, strict=True):
            # the rule may not read tensors that differ between samples
            if flag is None and (real := closed()) is not None:
                current().stand_for(t, real)  # type: ignore[union-attr, arg-type]
        with self.surroundings.again():
            leaves, _, out_dims = call(self.cls, info, dims, self.operands.rebuilt(copies))
        outs = [(o, d) for o, d in zip(leaves, out_dims, strict=True) if isinstance(o, Tensor)]
        check_closed_over([o for o, _ in outs])
        return [
            o.movedim(d, 0) if d is not None else o.expand(info.batch_size, *o.shape)
            for o, d in outs
        ]

    def __call__(self, walk: Any, inputs: Sequence[Node], line: Line | None) -> tuple[Any, Any]:
        flags = tuple([0 if walk.has(x) else None for x in inputs])
        pairs = zip([walk.env[x] for x in inputs], flags, strict=True)
        nodes = [as_rules_get_it(walk.b, n) if flag == 0 else n for n, flag in pairs]
        try:
            did = self.late((Info(*walk.axis[:2]), flags, tuple([n.meta["val"] for n in nodes])))
            if did.error is not None:
                raise did.error
            outs = placed(walk.b, self.cls.vmap, did.trace, did.results, nodes)
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

    def late(self, call: tuple) -> Recorded:
        """Return what the rule did in a call when it was applied. Where this call was not
        expected it is recorded now, if the rule still does what it did then."""
        if call not in self.recorded:
            for other, before in [*self.recorded.items()][:1]:
                if before.key is not None and rule_ops(self.record(*other)) != rule_ops(before):
                    raise CaptureError("what it reads has changed since it was applied")
        return self.does(call)


def keep_owners(owners: Iterable[Any]) -> None:
    """Keep functions alive with the recordings under way, which ask for their rules."""
    for trace in under_way.traces:
        trace.owners = trace.owners.union(owners)


def rule_ops(did: Recorded) -> tuple | None:
    """Return the ops that a rule called itself, with their literals: the Functions that it
    applies may find other rules of their own."""
    if did.key is None:
        return None
    instrs = [r[0] for r in did.trace.records]
    own = [(i.anywhere or i) if instr_op(i) is not None else None for i in instrs]
    return tuple(own), did.key[1:]


def as_rules_get_it(b: Any, n: Node) -> Node:
    """Return a batch as every rule gets it, so that it can be told when the rule is applied."""
    if n.meta["val"].plain:
        return n
    return b.call(aten.clone.default, n, memory_format=torch.contiguous_format)


def expected(tensors: Sequence[Tensor], sigs: Sequence[Sig]) -> tuple | None:
    """Return the call that the innermost ``vmap`` around that batches any of these values will
    make: info, flags and signatures. Return None if no ``vmap`` does."""
    for vmap in [t for t in reversed(under_way.traces) if t.samples is not None]:
        flags = tuple([0 if differs(t, vmap) else None for t in tensors])
        if flags != (None,) * len(flags):
            info = Info(*vmap.samples.axis[:2])
            shapes = [(info.batch_size, *sig.shape) for sig in sigs]
            batch = [
                sig
                if flag is None
                else make_sig(shape, contiguous_stride(shape), sig.dtype, sig.device)
                for sig, flag, shape in zip(sigs, flags, shapes, strict=True)
            ]
            return info, flags, tuple(batch)
    return None


def differs(t: Tensor, vmap: Trace) -> bool:
    """Return whether a value depends on what differs between the samples of this ``vmap``."""
    if t.__class__ is not Traced or (trace := t.tracer).finished or trace not in under_way.traces:
        return False
    dims = vmap.samples.dims if trace is vmap else ()
    batched = {i for i, d in enumerate(dims) if d is not None}
    if trace is not vmap:
        batched |= {i for i, x in enumerate(trace.origins) if differs(x, vmap)}
        batched |= {-1 - i for i, x in enumerate(trace.lifted) if differs(x, vmap)}
    number, of = len(trace.inputs), trace.roots().of
    for instr, refs, *_ in trace.records:
        made = range(number, number := number + n_new_values(instr))
        if (
            any(of.get(r, r) in batched for r in refs)
            or instr.facts.random
            or instr_op(instr) in axes.OPS
        ):
            written = [refs[k] for k in written_slots(instr)]
            batched.update([of.get(r, r) for r in (*made, *written)])
    return of.get(t.ref, t.ref) in batched


def as_recorded(trace: Trace, results: Sequence[Tensor]) -> tuple | None:
    """Return the steps of these results and the rule's numbers; None if it made more."""
    if any(t.dim() for t in trace.foreign()) or not all(map(is_unwrapped, trace.lifted)):
        return None
    with quiet():
        numbers = [(t.dtype, t.device, t.shape, repr(t.tolist())) for t in trace.lifted]
    return trace.key(), tuple([trace.ref_of(x)[0] for x in results]), tuple(numbers)


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

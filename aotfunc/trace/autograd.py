"""Answer for autograd about recorded values: requires_grad, leaves, what leads to what."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from .. import debug
from .records import Record, instr_op, n_new_values, result_sigs, written_slots
from .shapes.instr import Instr
from .shapes.sig import Sig
from .traced import Traced

aten = torch.ops.aten
requires_grad = torch._C.TensorBase.requires_grad.__get__  # type: ignore  # as autograd sees it
is_leaf = torch._C.TensorBase.is_leaf.__get__  # type: ignore[attr-defined]


class Autograd:
    """A recording's leaves and the values that require grad, in lists shared with it."""

    # (what few recordings have is made where it is needed)
    leaf_tensors: tuple[Traced, ...] = ()
    #: factories' results, which become leaves if torch.ones(..., requires_grad=True) marks them
    #: after the call
    made: tuple[weakref.ref[Traced], ...] = ()
    #: the leaves that have a history: inputs, results of nested functions
    computed: frozenset[int] = frozenset()
    protected: frozenset[int] = frozenset()  # leaves: autograd refuses writes
    #: inputs that f marks with requires_grad_: the new flag, and the user's line if they were
    #: used before
    flags: Mapping[int, tuple[bool, Any]] = {}
    retained: tuple[Traced, ...] = ()
    kept: Set[int] = frozenset()  # refs of `retained` at the end
    #: which lifted tensors required grad when the recording was over
    settled: list[bool] | None = None
    _reached: Reach | None = None  # see active

    def __init__(
        self,
        inputs: list[Sig],
        lifted: list[Tensor],
        records: list[Record],
        rewritten: list[Tensor],
    ) -> None:
        self.inputs, self.lifted, self.records, self.rewritten = inputs, lifted, records, rewritten
        #: refs that the user, or the transform, marked as requiring grad
        self.leaves: dict[int, bool] = {}
        #: values made in an inference mode that the function switched on
        self.inference: set[int] = set()
        #: records in which a tensor that requires grad gets a value that does not
        self.overwritten: set[int] = set()
        #: records in which an argument that requires grad gets a value that does, too
        self.copied: list[tuple[int, int]] = []

    def mark_leaf(self, t: Traced, value: bool) -> None:
        """Record ``t.requires_grad_(value)``."""
        if 0 <= t.ref < len(self.inputs) and self.requires_grad(t) is not value:
            used = any(t.ref in refs for _, refs, *_ in self.records)
            line = debug.user_line(2) if used else None
            self.flags = {**self.flags, t.ref: (value, line)}
            self.protected = self.protected | {t.ref} if value else self.protected - {t.ref}
        # values computed from it later, views included, have a derivative again
        if value and self.made_quietly(t.ref):
            with torch.enable_grad():
                t.ref = t.detach().ref
        # values computed so far, views aside, do not become results of this leaf
        reach = self.reach()
        self.leaves[t.ref] = value
        if value:
            reach.active.update((t.ref, *reach.views.get(t.ref, ())))
            self.leaf_tensors += (t,)
        else:
            reach.active.discard(t.ref)

    def mark_computed(self, t: Traced) -> None:
        """Note that ``t`` was computed from a leaf that a nested function has made."""
        self.reach().active.add(t.ref)
        self.leaves[t.ref] = True
        self.computed |= {t.ref}

    def made_quietly(self, ref: int) -> bool:
        """Return whether the value ``ref`` was made with gradients off."""
        return ref >= len(self.inputs) and not self.records[self.reach().maker(ref)][2]

    def is_leaf(self, t: Traced) -> bool:
        if not t.requires_grad or (t.ref in self.leaves and t.ref not in self.computed):
            return True
        # a view made under no_grad has no history; a write has given one to any other value
        return t.ref in self.reach().bases and self.made_quietly(t.ref)

    def refuses_writes(self, t: Traced) -> bool:
        """Return whether ``t`` is a leaf that requires grad, or a view of one."""
        base = self.reach().bases.get(t.ref, t.ref)
        leaves = {t.ref, base} - self.computed
        made = any(ref >= len(self.inputs) and self.leaves.get(ref) for ref in leaves)
        return (made or base in self.protected) and (t.ref == base or self.requires_grad(t))

    def adopt_leaves(self) -> None:
        """Mark the factories' results that were told to require grad as leaves."""
        if not self.made:
            return
        for t in [t for r in self.made if (t := r()) is not None and t.ref not in self.leaves]:
            if requires_grad(t) and is_leaf(t):
                self.leaves[t.ref] = True
                self.leaf_tensors += (t,)
                if self._reached is not None:
                    self._reached.active.add(t.ref)
        self.made = ()

    def requires_grad(self, t: Traced, ref: int | None = None) -> bool:
        """Return whether autograd would record an op on ``t``: differentiable steps lead back to a
        leaf that requires grad. ``ref``: an outer recording's value's number here."""
        ref = t.ref if ref is None else ref
        self.adopt_leaves()
        if (known := self.leaves.get(ref)) is not None:
            return known
        return t.sig.differentiable and ref in self.active()

    def active(self) -> set[int]:
        """Return the values that depend differentiably on a leaf, among those recorded so far."""
        return self.reach().active

    def reach(self) -> Reach:
        self.adopt_leaves()
        if self._reached is None:
            self._reached = Reach(
                {ref for ref, yes in self.leaves.items() if yes}, len(self.inputs), self.lifted
            )
            self._reached.settled = self.settled
        self._reached.extend(self.records, self.leaves)
        return self._reached

    def reaches(self, ref: int, outs: Sequence[int]) -> bool:
        """Return whether one of ``outs`` was computed from ``ref``, as autograd sees it."""
        return not self.reach().of(ref, self.records, self.leaves).isdisjoint(outs)

    def leaves_of(self, outs: Sequence[int]) -> tuple[list[int], list[Traced]]:
        """List the tensors that ``.backward()`` of ``outs`` gives a gradient."""
        self.adopt_leaves()
        outside = {i for i in range(len(self.inputs)) if self.leaves.get(i)}
        rewritten = set(map(id, self.rewritten))
        outside |= {
            -1 - i for i, t in enumerate(self.lifted) if t.requires_grad and id(t) not in rewritten
        }
        inside = [
            t
            for t in (*self.leaf_tensors, *self.retained)
            if t.ref not in outside and self.requires_grad(t)
        ]
        reach = self.reach()
        near = reach.leading_to(outs, self.records)
        reaches = lambda ref: reach.bases.get(ref, ref) in near and self.reaches(ref, outs)
        return [r for r in outside if reaches(r)], [t for t in inside if reaches(t.ref)]

    def overwrite(self, refs: Sequence[int], kin: set[int]) -> None:
        """Note that the last record replaced the value ``refs[0]`` by the others. If it, or one of
        its ``kin``, required grad, it still does, with gradient zero. (A copy to a whole argument
        is made outside, too, if no write follows.)"""
        active, base = self.active(), self.reach().bases.get(refs[0], refs[0])
        record = len(self.records) - 1
        copies = instr_op(self.records[-1][0]) in (aten.copy_.default, aten.fill_.Tensor)
        if active.isdisjoint((refs[0], *kin)):
            return
        inside = base >= len(self.inputs) or refs[0] != base
        if active.isdisjoint(refs[1:]) or (copies and inside):
            self.overwritten.add(record)
        elif copies:
            self.copied.append((record, base))

    def forget(self) -> None:
        """Forget the records that the recording went back over."""
        self._reached = None

    def settle(self) -> None:
        """Remember outside tensors as they are: later questions are answered as of now."""
        if self.rewritten:
            self.reach()
        else:
            self.settled = [*map(needs_grad, self.lifted)] if self.lifted else []
            if self._reached is not None:
                self._reached.settled = self.settled

    def finish(self) -> None:
        """Decide which copies to arguments are no last writes, and release the tensors."""
        if self.made:
            self.adopt_leaves()
        for k, base in self.copied:
            bases = self.reach().bases
            later = [refs[s] for i, refs, *_ in self.records[k + 1 :] for s in written_slots(i)]
            if any(bases.get(r, r) == base for r in later):
                self.overwritten.add(k)
        self.leaf_tensors = ()
        if self.retained:
            self.kept = {t.ref for t in self.retained}
            self.retained = ()


def needs_grad(t: Tensor) -> bool:
    """Return whether an outside tensor requires grad; an outer recording may answer."""
    return t.tracer.autograd.requires_grad(t) if t.__class__ is Traced else t.requires_grad


class Reach:
    """The values of a recording that depend differentiably on ``active`` ones, or on tensors of
    ``lifted`` that require grad when they are used."""

    def __init__(self, active: set[int], count: int, lifted: Sequence[Tensor] = ()) -> None:
        self.active, self.lifted = active, lifted
        self.settled: list[bool] | None = None
        #: for each record done so far, the number of values after it
        self.ends: list[int] = []
        self.count = count
        self.bases: dict[int, int] = {}  # view -> the value that it shows
        self.views: dict[int, list[int]] = {}  # value -> its views

    def maker(self, ref: int) -> int:
        """Return the record that made a value."""
        return bisect_right(self.ends, ref)

    def of(self, ref: int, records: list[Record], leaves: dict[int, bool]) -> set[int]:
        """Return the values that depend differentiably on ``ref`` alone."""
        start = self.maker(ref) + 1 if ref >= self.count else 0
        active = {ref}
        for k in range(start, len(records)):
            self.step(active, records[k], k, leaves, unseen_views=False)
        return active

    def leading_to(self, outs: Sequence[int], records: list[Record]) -> set[int]:
        """Return the values, of views what they show, that ``outs`` may depend on differentiably,
        and perhaps more: one walk finds them."""
        bases = self.bases
        found = {bases.get(r, r) for r in outs}
        for k in range(len(records) - 1, -1, -1):
            instr, refs, grad, *_ = records[k]
            if instr.facts.untracked or not (grad or instr.facts.view_of is not None):
                continue
            if hasattr(instr, "live") and not any(map(any, instr.live([True] * len(refs)))):
                continue
            made = range(self.ends[k - 1] if k else self.count, self.ends[k])
            simple = instr.__class__ is Instr and instr.simple
            changed = made if simple else [*made, *(refs[s] for s in written_slots(instr))]
            if not found.isdisjoint([bases.get(r, r) for r in changed]):
                found.update([bases.get(r, r) for r in refs])
        return found

    def extend(self, records: list[Record], leaves: dict[int, bool]) -> None:
        """Extend the reach to the recording's end; ``leaves`` may stop requiring grad."""
        for k in range(len(self.ends), len(records)):
            instr, refs, grad, *_ = records[k]
            first = self.ends[-1] if k else self.count
            simple = instr.__class__ is Instr and instr.simple
            self.ends.append(first + (1 if simple else n_new_values(instr)))
            if (
                not simple
                and instr.facts.view_of is not None
                and refs
                and not instr.facts.untracked
            ):
                base = self.bases.get(refs[0], refs[0])
                self.bases.update(dict.fromkeys(range(first, self.ends[k]), base))
                self.views.setdefault(base, []).extend(range(first, self.ends[k]))
            for i in [-1 - r for r in refs if r < 0]:
                if i < len(self.lifted):  # numbers come behind the lifted tensors
                    self.use(i)
            if grad or not simple:
                self.step(self.active, records[k], k, leaves)

    def use(self, i: int) -> None:
        """Use an outside tensor as it is; an outer recording's value, as before its writes."""
        t = self.lifted[i]
        if needs_grad(t) if self.settled is None else self.settled[i]:
            self.active.add(-1 - i)
        elif t.__class__ is not Traced:
            self.active.discard(-1 - i)

    def step(
        self,
        active: set[int],
        record: Record,
        k: int,
        leaves: dict[int, bool],
        unseen_views: bool = True,
    ) -> None:
        """Add to ``active`` what record ``k`` makes of active values. ``unseen_views``: add views
        made under no_grad, too, which require grad if the value that they show does."""
        instr, refs, grad, *_ = record
        seen = grad or (unseen_views and instr.facts.view_of is not None and refs)
        if active.isdisjoint(refs) or instr.facts.untracked or not seen:
            return
        if instr.__class__ is Instr and instr.simple:
            made = self.ends[k] - 1
            if instr.outs.differentiable and leaves.get(made) is not False:
                active.add(made)
            return
        sigs, slots = result_sigs(instr), written_slots(instr)
        live, written = [True] * len(sigs), [True] * len(slots)
        if hasattr(instr, "live"):
            live, written = instr.live([r in active for r in refs])
        results = range(self.ends[k] - len(sigs), self.ends[k])
        active.update(
            m
            for m, sig, yes in zip(results, sigs, live, strict=True)
            if yes and sig.differentiable and leaves.get(m) is not False
        )
        for slot, yes in zip(slots, written, strict=True):
            if yes:  # the write reaches all views of the memory
                base = self.bases.get(refs[slot], refs[slot])
                active.update((base, *self.views.get(base, ())))

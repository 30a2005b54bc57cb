"""What autograd would answer about the values of a recording: which require grad, are leaves, lead to others."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import debug
from .records import Record, instr_op, result_sigs, results_of, written_slots
from .shapes import Sig
from .traced import Traced

aten = torch.ops.aten
requires_grad = torch._C.TensorBase.requires_grad.__get__  # type: ignore[attr-defined]  # as autograd sees it
is_leaf = torch._C.TensorBase.is_leaf.__get__  # type: ignore[attr-defined]


class Autograd:
    """The leaves of a recording, of which it shares these lists, and what they lead to."""

    def __init__(self, inputs: list[Sig], lifted: list[Tensor], records: list[Record]) -> None:
        self.inputs, self.lifted, self.records = inputs, lifted, records
        self.leaves: dict[int, bool] = {}  # refs that the user, or the transform, marked as requiring grad
        self.leaf_tensors: list[Traced] = []
        self.made: list[weakref.ref[Traced]] = []  # now, of nothing: torch.ones(..., requires_grad=True) says so later
        self.computed: set[int] = set()  # those of the leaves that have a history: inputs, results of nested functions
        self.protected: set[int] = set()  # inputs that autograd does not let be written to
        self.flags: dict[int, tuple[bool, Any]] = {}  # inputs that start to require grad, or stop; where used before
        self.retained: list[Traced] = []
        self.inference: set[int] = set()  # values made in an inference mode that the function switched on
        self.overwritten: set[int] = set()  # records in which a tensor that requires grad gets a value that does not
        self._reached: tuple[Any, Reach] | None = None  # see active

    def mark_leaf(self, t: Traced, value: bool) -> None:
        """``t.requires_grad_(value)``"""
        if 0 <= t.ref < len(self.inputs) and self.requires_grad(t) is not value:
            used = any(t.ref in refs for _, refs, *_ in self.records)
            self.flags[t.ref] = (value, debug.user_line(2) if used else None)
            (self.protected.add if value else self.protected.discard)(t.ref)
        if value and self.made_quietly(t.ref):  # what is computed from it, views included, is not cut off any more
            with torch.enable_grad():
                t.ref = t.detach().ref
        self.leaves[t.ref] = value
        if value:
            self.leaf_tensors.append(t)

    def mark_computed(self, t: Traced) -> None:
        """``t`` was computed from a leaf that a nested function has made."""
        self.leaves[t.ref] = True
        self.computed.add(t.ref)

    def made_quietly(self, ref: int) -> bool:
        """Whether a value was made with gradients off."""
        number = len(self.inputs)
        for instr, _, grad, *_ in self.records:
            number += results_of(instr)
            if number > ref:
                return ref >= len(self.inputs) and not grad
        return False

    def is_leaf(self, t: Traced) -> bool:
        if not self.requires_grad(t) or (t.ref in self.leaves and t.ref not in self.computed):
            return True
        return self.made_quietly(t.ref)  # a view, which has no history

    def adopt_leaves(self) -> None:
        """Note which tensors made of nothing were to require grad."""
        for t in [t for r in self.made if (t := r()) is not None and t.ref not in self.leaves]:
            if requires_grad(t) and is_leaf(t):
                self.leaves[t.ref] = True
                self.leaf_tensors.append(t)
        self.made.clear()

    def requires_grad(self, t: Traced) -> bool:
        """Whether autograd would record from here: a path of differentiable steps leads back to a leaf that requires
        grad.
        """
        if self.made:
            self.adopt_leaves()
        if (known := self.leaves.get(t.ref)) is not None:
            return known
        return t.sig.differentiable and t.ref in self.active()

    def active(self) -> set[int]:
        """The values that a path from a leaf leads to; worked out as far as the recording has come."""
        start = (tuple(self.leaves.items()), tuple([x.requires_grad for x in self.lifted]))
        if self._reached is None or self._reached[0] != start:
            active = {ref for ref, yes in self.leaves.items() if yes}
            active |= {-1 - i for i, yes in enumerate(start[1]) if yes}
            self._reached = (start, Reach(active, len(self.inputs)))
        return self._reached[1].extended(self.records, self.leaves)

    def reaches(self, ref: int, outs: Sequence[int]) -> bool:
        """Whether one of ``outs`` was computed from the value ``ref``, as autograd sees it."""
        found = Reach({ref}, len(self.inputs), unseen_views=False).extended(self.records, self.leaves)
        return not found.isdisjoint(outs)

    def leaves_of(self, outs: Sequence[int]) -> tuple[list[int], list[Traced]]:
        """What ``.backward()`` of ``outs`` would give a gradient: leaves from outside, and tensors made inside."""
        self.adopt_leaves()
        outside = {i for i in range(len(self.inputs)) if self.leaves.get(i)}
        outside |= {-1 - i for i, t in enumerate(self.lifted) if t.requires_grad}
        inside = [t for t in (*self.leaf_tensors, *self.retained) if t.ref not in outside and self.requires_grad(t)]
        return [r for r in outside if self.reaches(r, outs)], [t for t in inside if self.reaches(t.ref, outs)]

    def overwrite(self, refs: Sequence[int]) -> None:
        """The last record gave the first of ``refs`` the value of the others: it requires grad still if it did, though
        nothing of it is left.
        """
        active = self.active()
        if refs[0] in active and active.isdisjoint(refs[1:]):
            self.overwritten.add(len(self.records) - 1)

    def forget(self) -> None:
        """The recording went back."""
        self._reached = None

    def finish(self) -> None:
        """Let go of the tensors."""
        self.adopt_leaves()
        self.leaf_tensors.clear()
        self.retained.clear()


#: ops of whose floating results autograd says that they do not require grad
UNTRACKED = frozenset(
    getattr(packet, name)
    for packet in (aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like, aten.randn_like)
    + (aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided, aten.histc, aten.detach)
    for name in packet.overloads()
)


class Reach:
    """The values of a recording that a differentiable path leads to from ``active`` ones. ``unseen_views``: through
    views made under no_grad, too, which require grad if what they show does.
    """

    def __init__(self, active: set[int], count: int, unseen_views: bool = True) -> None:
        self.active, self.done, self.number = active, 0, count  # so many records and values are done
        self.unseen_views = unseen_views
        self.bases: dict[int, int] = {}  # of each view the value that it shows
        self.views: dict[int, list[int]] = {}  # and the views of each value

    def extended(self, records: list[Record], leaves: dict[int, bool]) -> set[int]:
        """``active``, as far as the recording has come; a value of which ``leaves`` says so requires no grad."""
        active = self.active
        for instr, refs, grad, *_ in records[self.done :]:
            sigs = result_sigs(instr)
            made = range(self.number, self.number + len(sigs))
            self.number = made.stop
            if instr_op(instr) in UNTRACKED:
                continue
            if instr.facts.view_of is not None and refs:
                base = self.bases.get(refs[0], refs[0])
                self.bases.update(dict.fromkeys(made, base))
                self.views.setdefault(base, []).extend(made)
                grad |= self.unseen_views
            if not grad:
                continue
            given = [r in active for r in refs]
            if not any(given):
                continue
            slots = written_slots(instr)
            live, written = instr.live(given) if hasattr(instr, "live") else ([True] * len(sigs), [True] * len(slots))
            active.update(
                m
                for m, sig, yes in zip(made, sigs, live, strict=True)
                if yes and sig.differentiable and leaves.get(m) is not False
            )
            for slot, yes in zip(slots, written, strict=True):
                if yes:  # all that shows the written memory
                    base = self.bases.get(refs[slot], refs[slot])
                    active.update((base, *self.views.get(base, ())))
        self.done = len(records)
        return active

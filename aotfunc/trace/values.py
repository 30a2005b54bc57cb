"""Find the node that holds the value of each recorded tensor, through writes and views.

A write to a view (see :mod:`.storages`) computes the storage's new value through the inverses of
the view's chain; a read through another view replays that view's chain on the current value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import Line, at
from ..errors import CaptureError
from .emit import Builder
from .marks import dead_end, hidden_write
from .memory import MemoryPlace, overlaps_itself
from .scalars import FIRST
from .shapes.instr import Instr
from .shapes.sig import Sig, contiguous_stride
from .storages import Memory, Storage, View, covered
from .tracer import Trace
from .views import COMPUTED, Link, inverse, laid_out, linked, replay_view, restrided

aten = torch.ops.aten


class ValueNodes:
    """The node of each value while a recording's graph is built; steps read and write."""

    def __init__(
        self,
        trace: Trace,
        builder: Builder,
        inputs: Sequence[Node],
        intent: bool = True,
        numbers: Mapping[int, Node] = MappingProxyType({}),
    ) -> None:
        self.trace, self.b = trace, builder
        self.intent = intent  # False inside a derived rule: autograd's own detaches mean nothing
        self.env: dict[int, Any] = {
            FIRST - i: numbers.get(i, x) for i, x in enumerate(trace.numbers)
        }
        #: a written view, and a copy, are the written value; other views are read from the memory
        #: they show
        self.direct = True
        #: made under no_grad, and how it is read where gradients are on
        self.cut: dict[int, OpOverload] = {}
        self.cuts: dict[tuple, Node] = {}  # one cut node for each
        self.snapshots: list[list[Node]] = []  # arguments of the custom functions being recorded
        self.placeholders = list(inputs)
        refs = trace.given_refs()
        self.mutates = trace.mutates
        self.number = len(trace.inputs)
        if not self.mutates:
            self.env.update(zip(refs, self.placeholders, strict=True))
        else:
            self._bind_storages(refs)

    def _bind_storages(self, refs: list[int]) -> None:
        places = self.trace.layout()
        groups: dict[int, list[int]] = {}
        for i, place in enumerate(places):
            groups.setdefault(place.group, []).append(i)
        written = self.trace.roots().written
        for members in groups.values():
            if not any(refs[i] in written for i in members):  # no write: no shared storage
                for i in members:
                    self.env[refs[i]] = View(Storage(self.placeholders[i], refs[i]))
                continue
            sigs: dict[int, Sig] = {i: self.placeholders[i].meta["val"] for i in members}
            base = max(
                members,
                key=lambda i: (sigs[i].stride == contiguous_stride(sigs[i].shape), sigs[i].numel),
            )
            memory = None
            for kin in dict.fromkeys((places[base].kin, *(places[i].kin for i in members))):
                mine = [i for i in members if places[i].kin == kin]
                memory = self._bind_kin(refs, mine, base, places, memory)

    def _bind_kin(
        self,
        refs: list[int],
        mine: list[int],
        base: int,
        places: Sequence[MemoryPlace],
        memory: Any,
    ) -> Memory:
        """Bind inputs that are views of one tensor to the storage of the input ``base``."""
        sigs: dict[int, Sig] = {i: self.placeholders[i].meta["val"] for i in (*mine, base)}
        chains = {i: covered(sigs, places, base, i) for i in mine}
        first = base if base in mine else max(mine, key=lambda i: sigs[i].numel)
        node = self.placeholders[first]
        for link in chains[first]:  # the memory around the inputs has no derivative here
            node = inverse(self.b, link, self.detached(self.placeholders[base]), node)
        storage = Storage(node, refs[first], memory=memory)
        storage.chain = chains[first]
        for i in mine:
            covered(sigs, places, first, i)
            self.env[refs[i]] = View(
                storage, chains[i], self.placeholders[i] if chains[i] else None
            )
        return storage.memory

    def read(self, ref: int, grad: bool = True) -> Node:
        """Return a tensor's current value, cut off if made under no_grad and read with grad."""
        view = self.env[ref]
        if view.__class__ is View:
            storage = view.storage
            if view.version != storage.memory.version:
                node = self.current(storage)
                for link in view.chain:
                    node = storage.seen_through(self.b, link, node)
                view.node, view.version = node, storage.version
            node = view.node
        else:
            node = view
        return self.cut_off(ref, node) if grad else node

    def cut_off(self, ref: int, node: Node) -> Node:
        how = self.cut.get(ref) if self.intent else None
        return node if how is None else self.detached(node, how)

    def current(self, storage: Storage) -> Node:
        """Return a storage's value, with its own derivative even if another one wrote it."""
        memory = storage.memory
        if storage.version != memory.version:
            new = memory.writer.node
            while new.target is hidden_write:
                new = new.args[1]  # type: ignore[assignment]
            if storage.sig.differentiable:
                new = self.b.node(hidden_write, (storage.node, new), {}, new.meta["val"])
            storage.node = new
            storage.version = memory.version
        return storage.node

    def became(self, storage: Storage, node: Node) -> None:
        """Give the storage, and its memory, the new value ``node``."""
        memory = storage.memory
        memory.version, memory.writer = memory.version + 1, storage
        storage.node, storage.version, storage.written = node, memory.version, True

    def through(self, base: View, link: Link) -> View:
        if link[0] is aten.detach.default:
            storage = Storage(
                self.detached(self.current(base.storage)), memory=base.storage.memory
            )
            return View(storage, base.chain)
        return View(base.storage, (*base.chain, link))

    def seen(
        self, base: View, op: OpOverload, args: tuple, kwargs: dict, index: int | None, sig: Sig
    ) -> View:
        """Return the view of ``base`` by a view op; ``base`` itself after an in-place reshape."""
        if op in (aten.as_strided.default, aten.resize.default):
            return View(base.storage, restrided(base.storage.sig, base.chain, sig))
        return self.through(base, linked(base.sig, op, args, kwargs, index, sig))

    def shown(self, ref: int) -> Node:
        """Read a tensor as a view of the memory it shares, even if it was itself written last."""
        view = self.env[ref]
        if view.__class__ is View and view.chain and view.storage.memory.version:
            view.version = -1
        return self.read(ref)

    def memory(self, ref: int) -> Node:
        """Return the current value of a value's memory (a computed value has its own)."""
        view = self.env[ref]
        node = view
        if view.__class__ is View:
            node, ops = self.current(view.storage), [link[0] for link in view.chain]
            for link in view.chain[
                : max((i + 1 for i, op in enumerate(ops) if op in COMPUTED), default=0)
            ]:
                node = replay_view(self.b, link, node)
        return self.cut_off(ref, node)

    def detached(self, node: Node, how: OpOverload = aten.detach.default) -> Node:
        if (node, how) not in self.cuts:
            self.cuts[node, how] = self.b.node(how, (node,), {}, node.meta["val"])
        return self.cuts[node, how]

    def bind(self, node: Node, grad: bool, how: OpOverload = aten.detach.default) -> int:
        """Make ``node`` the value of the recording's next result."""
        ref = self.number
        self.number += 1
        cut = not grad and node.meta["val"].differentiable
        self.env[ref] = View(Storage(node, cut=cut)) if self.mutates else node
        if cut:
            self.cut[ref] = how
        return ref

    def how_cut(self, instr: Instr, refs: Sequence[int]) -> OpOverload:
        """Return the op that cuts results made under no_grad if they are read with grad."""
        if instr.facts.view_of is None or instr.op is aten.detach.default:
            return aten.detach.default
        return self.cut.get(refs[0], dead_end)

    def alias(self, ref: int, base: int, links: Sequence[Link]) -> None:
        """Let a result share the memory of ``base``, seen through ``links``."""
        view, node = self.env[base], self.env[ref].node
        for link in links:
            view = self.through(view, link)
        self.env[ref] = View(view.storage, view.chain, node)
        self.env[ref].version = view.storage.memory.version

    def write(self, ref: int, new: Node, grad: bool = True, line: Line | None = None) -> None:
        """Replace the value of a tensor, and so of every tensor that shares its storage."""
        view = self.env[ref]
        target = view.sig
        if overlaps_itself(target) or overlaps_itself(view.storage.sig):
            raise CaptureError(
                "a write to an expanded tensor: several of its elements share memory; clone() it "
                f"first{at(line)}"
            )
        new = self.fitted(new, target)
        storage = view.storage
        if grad and storage.cut:  # it now carries the derivative of the written value
            self.became(storage, self.detached(self.current(storage)))
            storage.cut = False
            self.cut = {
                r: how for r, how in self.cut.items() if self.env[r].storage is not storage
            }
        bases = [self.current(storage)]
        for link in view.chain[:-1]:
            bases.append(replay_view(self.b, link, bases[-1]))
        whole = new
        for link, base in zip(reversed(view.chain), reversed(bases), strict=False):
            whole = inverse(self.b, link, base, whole)
        whole = self.fitted(whole, storage.sig)
        if not grad and target.differentiable:
            whole = self.b.node(hidden_write, (storage.node, whole), {}, whole.meta["val"])
        self.became(storage, whole)
        if self.direct and (grad or not target.differentiable):
            view.node, view.version = new, storage.version

    def fitted(self, node: Node, sig: Sig) -> Node:
        """Return a value cast and expanded as for a write into a tensor of this signature."""
        val: Sig = node.meta["val"]
        if val.dtype is not sig.dtype or val.device != sig.device:
            node = self.b.call(aten._to_copy.default, node, dtype=sig.dtype, device=sig.device)
        if val.shape != sig.shape:
            node = self.b.call(aten.expand.default, node, list(sig.shape))
        node = laid_out(self.b, node, sig)  # the written tensor keeps its layout
        if not sig.numel and node.meta["val"].stride != sig.stride:
            place = list(sig.shape), list(sig.stride), 0
            node = self.b.call(aten.as_strided.default, node, *place)
        return node

    def as_made(self, ref: int, node: Node) -> Node:
        """Return the value of a tensor with the gaps in memory that it was made with
        (``empty_strided``): what was written to it is a value without."""
        view = self.env[ref]
        if view.__class__ is not View or view.chain or view.storage.ref is not None:
            return node
        sig = view.storage.sig
        dense = sig.extent - sig.offset <= sig.numel
        if dense or node.meta["val"].stride == sig.stride or overlaps_itself(sig):
            return node
        place = list(sig.shape), list(sig.stride), 0
        memory = self.b.call(aten.new_zeros.default, node, [sig.extent - sig.offset])
        memory = self.b.call(aten.as_strided_scatter.default, memory, node, *place)
        return self.b.call(aten.as_strided.default, memory, *place)

    def mutated(self) -> list[tuple[int, Node]]:
        """Return ``(placeholder index, final value)`` of written inputs and lifted tensors."""
        if not self.mutates:
            return []
        found = []
        for index, ref in enumerate(self.trace.given_refs()):
            view = self.env[ref]
            storage = view.storage
            changed = storage.written or (
                storage.memory.version and storage.memory.first is storage
            )
            if changed and storage.ref == ref:
                node = self.current(storage)
                for link in storage.chain:
                    node = replay_view(self.b, link, node)
                found.append((index, node))
        return found
